"""The collecting phase: rollouts on rank 0, their rewards, and the sequences they become. Called on every rank."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from mcore_rl.data.sequences import Sequences, sequences_of
from mcore_rl.model.checkpoint import Progress
from mcore_rl.parallel.collectives import on_rank_0, on_rank_0_only
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan, rollout_sampling
from mcore_rl.roles.models import Models
from mcore_rl.rollout.ahead import Generated, RolloutsAhead
from mcore_rl.rollout.collect import Collected, collect, score, without_answer
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.step.batches import Metrics, step_seed
from mcore_rl.step.judging import judge, model_rewards
from mcore_rl.types import BatchAhead, Prompt, RolloutGroup


def start_rollouts(plan: Plan, groups: Groups, rollouts: RolloutsAhead | None, done: Progress) -> Progress:
    """Ask the engine for the batches of this step and of `rollout.max_staleness` steps ahead, with its present weights.

    So no token is ever older than that when it is trained on. Those that have been asked for already are `done.ahead`.
    """
    config = plan.config
    if not plan.algorithm.needs_rollouts:
        return done
    next_step = done.ahead[-1].step + 1 if done.ahead else done.step
    for step in range(next_step, min(done.step + config.rollout.max_staleness + 1, config.steps)):
        batch, count = BatchAhead(step, done.prompts_seen), config.batch.prompts_per_step
        on_rank_0(groups, lambda b=batch: rollouts.start(b.step, prompts_from(plan, b.first_prompt), seed_of(plan, b)))
        done = replace(done, prompts_seen=done.prompts_seen + count, ahead=(*done.ahead, batch))
    return done


def prompts_from(plan: Plan, first: int) -> list[Prompt]:
    """The training prompts of one batch."""
    return [plan.task.train_prompt(first + i) for i in range(plan.config.batch.prompts_per_step)]


def seed_of(plan: Plan, batch: BatchAhead) -> int:
    return step_seed(plan.config, batch.step)


def finish_rollouts(plan: Plan, groups: Groups, rollouts: RolloutsAhead | None) -> None:
    """Before weights change: wait for all that is being generated, but for `rollout.partial`."""
    if plan.config.rollout.max_staleness > 0 and not plan.config.rollout.partial:
        on_rank_0(groups, lambda: bool(rollouts.finish()))


def with_rollouts(groups: Groups, rollouts: RolloutsAhead | None, done: Progress) -> Progress:
    """`done` for a checkpoint: on rank 0 with all that was asked for, which is waited for, but the answers."""
    if not done.ahead:
        return done
    batches: dict[int, tuple[RolloutGroup, ...]] = {}
    on_rank_0(groups, lambda: batches.update(rollouts.finish()))
    ahead = (replace(b, groups=tuple(map(without_answer, batches.get(b.step, ())))) for b in done.ahead)
    return replace(done, ahead=tuple(ahead))


def collect_rollouts(
    plan: Plan, groups: Groups, models: Models, rollouts: RolloutsAhead | None, done: Progress
) -> tuple[Sequences, Progress, Metrics]:
    """This step's sequences, on rank 0, where the next step begins to collect, and metrics."""
    version, bound = done.policy_version, plan.config.rollout.max_staleness
    batch, *ahead = done.ahead
    refills: list[float] = []
    state, judged = done.discriminator, {}

    def rewarded(found: list[RolloutGroup], first_prompt: int) -> list[RolloutGroup]:
        nonlocal state, judged
        on_rank_0(groups, lambda: found.__setitem__(slice(None), [score(g, plan.reward) for g in found]))
        if models.discriminator is not None:
            found, state, judged = judge(plan, groups, models.discriminator, found, state, first_prompt)
        return found if models.reward_model is None else model_rewards(plan, groups, models.reward_model, found)

    def rollout(first_prompt: int, seed: int) -> list[RolloutGroup]:
        start, found = time.perf_counter(), []
        on_rank_0(groups, lambda: found.extend(rollouts.now(prompts_from(plan, first_prompt), seed)))
        refills.append(time.perf_counter() - start)
        return rewarded(found, first_prompt)

    generated = on_rank_0_only(groups, lambda: rollouts.take(batch.step))
    scored = rewarded(list(generated.groups) if generated else [], batch.first_prompt)
    first = [g for g in scored if age(g, version) <= bound]
    # what a batch has no room for is at least one update old when its turn comes, in the synchronous loop too
    carried = [g for g in done.carried if age(g, version) <= max(bound, 1)]
    collected = collect(
        rollout,
        plan.algorithm,
        partial(on_rank_0, groups),
        cursor=done.prompts_seen,
        num_prompts=plan.config.batch.prompts_per_step,
        seed=step_seed(plan.config, done.step),
        first=first,
        carried=carried,
    )
    dropped = len(scored) - len(first) + len(done.carried) - len(carried)
    metrics = on_rank_0(
        groups,
        lambda: rollout_metrics(collected, version, generated.seconds + sum(refills))
        | judged
        | staleness(collected, version)
        | {"rollout/dropped_groups": dropped}
        | generation_metrics(generated),
    )
    after = replace(
        done,
        prompts_seen=done.prompts_seen + collected.num_drawn,
        carried=collected.carried,
        ahead=tuple(ahead),
        discriminator=state,
    )
    return sequences_of(collected.groups, plan.algorithm, version if bound > 0 else None), after, metrics


def generation_metrics(generated: Generated) -> Metrics:
    """Of the first round, which may have been generated ahead."""
    metrics = {"rollout/generate_s": generated.seconds}
    if generated.seconds > 0:  # else it comes from a checkpoint
        metrics["rollout/overlap_frac"] = generated.overlap_s / generated.seconds
    return metrics


def age(group: RolloutGroup, policy_version: int) -> int:
    """Weight updates since the oldest token of a group was sampled."""
    return policy_version - min(t.policy_version for t in group.trajectories)


def answers(
    plan: Plan, groups: Groups, engine: RolloutEngine | None, first_prompt: int, seed: int
) -> list[RolloutGroup]:
    """Responses of the engine's present policy with what the reward function says of them, on rank 0."""
    found: list[RolloutGroup] = []

    def ask() -> None:
        prompts = prompts_from(plan, first_prompt)
        generated = engine.generate(prompts, rollout_sampling(plan.config), seed=seed)
        found.extend(score(g, plan.reward) for g in generated)

    on_rank_0(groups, ask)
    return found


def rollout_metrics(collected: Collected, policy_version: int, seconds: float) -> Metrics:
    """Of the responses that were generated, and of those that are trained on."""
    sampled = [t for g in collected.sampled for t in g.trajectories]
    trained = [t for g in collected.groups for t in g.trajectories]
    rewards = torch.tensor([t.reward for t in sampled])
    equal = sum(len({t.reward for t in g.trajectories}) == 1 for g in collected.sampled)
    audits = [t.rule_reward for t in sampled if t.rule_reward is not None]
    stale = sum(age(g, policy_version) > 0 for g in collected.groups)
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        # without spread a group has no advantages: these responses teach nothing
        "reward/equal_groups_frac": equal / len(collected.sampled),
        "response/length_mean": sum(len(t.response_ids) for t in trained) / len(trained),
        "response/truncated_frac": sum(t.finish_reason == "length" for t in trained) / len(trained),
        "rollout/generations": collected.generations,
        "rollout/kept_frac": collected.num_kept / len(collected.sampled),
        "rollout/stale_groups_frac": stale / len(collected.groups),
    }
    if seconds > 0:  # a resumed run begins with rollouts of a checkpoint
        metrics["rollout/tokens_per_s"] = sum(len(t.response_ids) for t in sampled) / seconds
    return metrics | ({"reward/audit_mean": sum(audits) / len(audits)} if audits else {})


def staleness(collected: Collected, policy_version: int) -> Metrics:
    """Weight updates since they were sampled, over the response tokens that are trained on."""
    lags = policy_version - np.concatenate([t.versions for g in collected.groups for t in g.trajectories])
    return {
        "staleness/mean": float(lags.mean()),
        "staleness/max": float(lags.max()),
        "staleness/stale_tokens_frac": float((lags > 0).mean()),
    }
