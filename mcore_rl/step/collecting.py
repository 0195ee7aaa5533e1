"""The collecting phase: rollouts on rank 0, their rewards, and the samples they become. Called on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from mcore_rl.data.packing import Sample, samples_of
from mcore_rl.launch import RunFailure, exit_code
from mcore_rl.model.checkpoint import Progress
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan, rollout_sampling
from mcore_rl.roles.models import Models
from mcore_rl.rollout.ahead import RolloutsAhead
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
        with same_on_every_rank(groups):
            prompts = [plan.task.train_prompt(batch.first_prompt + i) for i in range(count)]
        if rollouts is not None:
            rollouts.start(step, prompts, step_seed(config, step))
        done = replace(done, prompts_seen=done.prompts_seen + count, ahead=(*done.ahead, batch))
    return done


def finish_rollouts(plan: Plan, groups: Groups, rollouts: RolloutsAhead | None) -> None:
    """Before weights change: wait for all that is being generated, but for `rollout.partial`."""
    if plan.config.rollout.max_staleness > 0 and not plan.config.rollout.partial:
        on_rank_0(groups, lambda: bool(rollouts.finish()))


def with_rollouts(groups: Groups, rollouts: RolloutsAhead | None, done: Progress) -> Progress:
    """`done` for a checkpoint: with all that was asked for, which is waited for, but the answers."""
    if not done.ahead:
        return done
    batches = on_rank_0(groups, lambda: rollouts.finish())
    ahead = (replace(b, groups=tuple(map(without_answer, batches[b.step]))) for b in done.ahead)
    return replace(done, ahead=tuple(ahead))


def collect_rollouts(
    plan: Plan, groups: Groups, models: Models, rollouts: RolloutsAhead | None, done: Progress
) -> tuple[list[Sample], Progress, Metrics]:
    """This step's samples, where the next step begins to collect, and metrics."""
    config, version = plan.config, done.policy_version
    batch, *ahead = done.ahead
    refills: list[float] = []
    state, judged = done.discriminator, {}

    def rewarded(found: list[RolloutGroup], first_prompt: int) -> list[RolloutGroup]:
        nonlocal state, judged
        if models.discriminator is not None:
            found, state, judged = judge(plan, groups, models.discriminator, found, state, first_prompt)
        return found if models.reward_model is None else model_rewards(plan, groups, models.reward_model, found)

    def rollout(prompts: Sequence[Prompt], seed: int) -> list[RolloutGroup]:
        first_prompt, start = done.prompts_seen + len(refills) * len(prompts), time.perf_counter()
        found = on_rank_0(groups, lambda: [score(g, plan.reward) for g in rollouts.now(prompts, seed)])
        refills.append(time.perf_counter() - start)
        return rewarded(found, first_prompt)

    generated = on_rank_0(groups, lambda: rollouts.take(batch.step))
    scored = on_rank_0(groups, lambda: [score(g, plan.reward) for g in generated.groups])
    scored = rewarded(scored, batch.first_prompt)
    bound = config.rollout.max_staleness
    first = [g for g in scored if age(g, version) <= bound]
    # what a batch has no room for is at least one update old when its turn comes, in the synchronous loop too
    carried = [g for g in done.carried if age(g, version) <= max(bound, 1)]
    with same_on_every_rank(groups):
        collected = collect(
            rollout,
            plan.task,
            plan.algorithm,
            cursor=done.prompts_seen,
            num_prompts=config.batch.prompts_per_step,
            seed=step_seed(config, done.step),
            first=first,
            carried=carried,
        )
    metrics = rollout_metrics(collected, version, generated.seconds + sum(refills))
    metrics |= judged | staleness(collected, version)
    metrics["rollout/dropped_groups"] = len(scored) - len(first) + len(done.carried) - len(carried)
    metrics["rollout/generate_s"] = generated.seconds
    if generated.seconds > 0:
        metrics["rollout/overlap_frac"] = generated.overlap_s / generated.seconds
    after = replace(
        done,
        prompts_seen=done.prompts_seen + collected.num_drawn,
        carried=collected.carried,
        ahead=tuple(ahead),
        discriminator=state,
    )
    return samples_of(collected.groups, plan.algorithm, version if bound > 0 else None), after, metrics


@contextmanager
def same_on_every_rank(groups: Groups) -> Iterator[None]:
    """A ValueError in here is raised on every rank, and told by one."""
    try:
        yield
    except ValueError as error:
        if groups.rank == 0:
            raise
        raise RunFailure(exit_code(error)) from error


def age(group: RolloutGroup, policy_version: int) -> int:
    """Weight updates since the oldest token of a group was sampled."""
    return policy_version - min(t.policy_version for t in group.trajectories)


def answers(
    plan: Plan, groups: Groups, engine: RolloutEngine | None, prompts: Sequence[Prompt], seed: int
) -> list[RolloutGroup]:
    """Responses of the engine's present policy with what the reward function says of them, on every rank."""
    params = rollout_sampling(plan.config)
    return on_rank_0(groups, lambda: [score(g, plan.reward) for g in engine.generate(prompts, params, seed=seed)])


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
    tokens = (v for g in collected.groups for t in g.trajectories for v in t.token_versions)
    lags = policy_version - torch.tensor(list(tokens), dtype=torch.float64)
    return {
        "staleness/mean": lags.mean().item(),
        "staleness/max": lags.max().item(),
        "staleness/stale_tokens_frac": (lags > 0).double().mean().item(),
    }
