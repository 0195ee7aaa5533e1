"""From prompts to scored groups: generate, reward, shape, keep; refilled until the batch is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.data.tasks import Task
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams, Trajectory

Reward = Callable[[Prompt, Trajectory], float]


@dataclass(frozen=True)
class Collected:
    """One step's rollouts.

    Attributes:
        groups: scored and shaped, what the step trains on.
        raw_rewards: of every generated response before shaping, kept or not.
        prompts_used: how far the data cursor moved.
    """

    groups: tuple[RolloutGroup, ...]
    raw_rewards: tuple[float, ...]
    prompts_used: int


def collect(
    engine: RolloutEngine,
    task: Task,
    reward: Reward,
    algorithm: Algorithm,
    params: SamplingParams,
    *,
    cursor: int,
    num_prompts: int,
    seed: int,
    max_rounds: int = 10,
) -> Collected:
    """Sample until `num_prompts` groups pass `algorithm.keep`, all with the engine's present policy version.

    Args:
        cursor: index of the next training prompt.
        seed: of this step; every round of refilling derives its own.
        max_rounds: generations before giving up.

    Raises:
        ValueError: `max_rounds` generations did not fill the batch, or the reward function failed.
        RolloutError: the engine died.
    """
    kept: list[RolloutGroup] = []
    raw: list[float] = []
    used = 0
    for round_ in range(max_rounds):
        prompts = [task.train_prompt(cursor + used + i) for i in range(num_prompts)]
        groups = [score(g, reward) for g in engine.generate(prompts, params, seed=seed + round_)]
        used += len(prompts)
        raw += [t.reward for g in groups for t in g.trajectories]
        kept += [_shape(g, algorithm) for g in groups if algorithm.keep(g)]
        if len(kept) >= num_prompts:
            return Collected(tuple(kept[:num_prompts]), tuple(raw), used)
    raise ValueError(
        f"{max_rounds} generations of {num_prompts} prompts kept only {len(kept)} groups: the reward tells the "
        "responses of too few prompts apart; use easier or harder prompts, or an algorithm without group filtering"
    )


def evaluate(
    engine: RolloutEngine, task: Task, reward: Reward, params: SamplingParams, *, num_prompts: int, seed: int
) -> dict[str, float]:
    """Answer held-out prompts. Accuracy is the share of responses whose reward is at least 1."""
    groups = engine.generate(task.eval_prompts(num_prompts), params, seed=seed)
    rewards = [t.reward for g in groups for t in score(g, reward).trajectories]
    return {
        "eval/accuracy": sum(r >= 1 for r in rewards) / len(rewards),
        "eval/reward_mean": sum(rewards) / len(rewards),
    }


def score(group: RolloutGroup, reward: Reward) -> RolloutGroup:
    """The group with the reward of every trajectory filled in."""
    return replace(group, trajectories=tuple(replace(t, reward=reward(group.prompt, t)) for t in group.trajectories))


def _shape(group: RolloutGroup, algorithm: Algorithm) -> RolloutGroup:
    return replace(group, trajectories=tuple(replace(t, reward=algorithm.reward(t)) for t in group.trajectories))
