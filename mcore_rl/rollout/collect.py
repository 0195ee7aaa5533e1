"""From prompts to scored groups: roll out, keep, shape; refilled until the batch is full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.data.task import Task
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams, Trajectory

T = TypeVar("T")
Reward = Callable[[Prompt, Trajectory], float]
Rollout = Callable[[int, int], Sequence[RolloutGroup]]
Agreed = Callable[[Callable[[], T]], T]


@dataclass(frozen=True)
class Collected:
    """One step's rollouts, on the rank that has them; elsewhere only `generations` and `num_drawn` say something.

    Attributes:
        groups: scored and shaped, what the step trains on; the carried ones of the step before come first.
        sampled: everything generated in this step, kept or not, with raw rewards.
        num_kept: groups of `sampled` that passed the filter.
        carried: those of them that the batch had no room for, shaped, without answers: the next step begins with them.
        generations: rounds, the one that was there already included.
        num_drawn: prompts drawn from `cursor` on.
    """

    groups: tuple[RolloutGroup, ...]
    sampled: tuple[RolloutGroup, ...]
    num_kept: int
    carried: tuple[RolloutGroup, ...]
    generations: int
    num_drawn: int


def collect(
    rollout: Rollout,
    algorithm: Algorithm,
    agreed: Agreed,
    *,
    cursor: int,
    num_prompts: int,
    seed: int,
    first: Sequence[RolloutGroup] = (),
    carried: Sequence[RolloutGroup] = (),
    max_rounds: int = 10,
) -> Collected:
    """Sample until `num_prompts` groups pass `algorithm.keep`. Called on every rank.

    What is rolled out here is of the engine's present policy version; the first round and the carried groups say in
    `policy_version` how old they are. There is at least one round, as fewer groups are carried than a batch takes: none
    is ever carried twice. One rank has the groups, and decides.

    Args:
        rollout: groups with raw rewards of the prompts from an index on and a seed; called on every rank.
        agreed: what a function says on the rank that has the groups, on every rank.
        cursor: index of the next training prompt.
        seed: of this step; every round of refilling derives its own.
        first: the first round, where it has been sampled already, with raw rewards.
        carried: `Collected.carried` of the step before.
        max_rounds: generations before giving up.

    Raises:
        ValueError: `max_rounds` generations did not fill the batch, or the reward function failed.
        RolloutError: the engine died.
    """
    kept: list[RolloutGroup] = []
    sampled: list[RolloutGroup] = []
    drawn = 0
    for round_ in range(max_rounds):
        if round_ == 0 and agreed(lambda: bool(first)):
            groups = first
        else:
            groups = rollout(cursor + drawn, seed + round_)
            drawn += num_prompts
        sampled += groups
        kept += [_shape(g, algorithm) for g in groups if algorithm.keep(g)]
        ready = [*carried, *kept]
        if agreed(partial(_is_full, ready, num_prompts)):
            surplus = ready[num_prompts:] if algorithm.carry_surplus else []
            return Collected(
                groups=tuple(ready[:num_prompts]),
                sampled=tuple(sampled),
                num_kept=len(kept),
                carried=tuple(map(without_answer, surplus)),
                generations=round_ + 1,
                num_drawn=drawn,
            )
    agreed(partial(_give_up, max_rounds, num_prompts, len(kept)))
    raise AssertionError("unreachable: the rank that has the groups gave up")


def _is_full(ready: Sequence[RolloutGroup], num_prompts: int) -> bool:
    return len(ready) >= num_prompts


def _give_up(rounds: int, num_prompts: int, num_kept: int) -> None:
    raise ValueError(
        f"{rounds} generations of {num_prompts} prompts kept only {num_kept} groups: the reward tells the responses of "
        "too few prompts apart; use easier or harder prompts, or an algorithm without group filtering"
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


def without_answer(group: RolloutGroup) -> RolloutGroup:
    """What a checkpoint can hold: answers and metadata may be objects of any kind, and their use is over."""
    return replace(group, prompt=replace(group.prompt, answer=None, metadata={}))
