"""The collecting phase: rollouts on rank 0, their rewards, and the samples they become. Called on every rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from mcore_rl.data.packing import Sample, samples_of
from mcore_rl.model.checkpoint import Progress
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.phases import Metrics, step_seed
from mcore_rl.rollout.collect import Collected, collect, score
from mcore_rl.run import Run, rollout_sampling
from mcore_rl.scoring import judge, model_rewards
from mcore_rl.types import Prompt, RolloutGroup


def collect_rollouts(run: Run, done: Progress) -> tuple[list[Sample], Progress, Metrics]:
    """This step's samples, where the next step begins to collect, and metrics."""
    config, plan = run.plan.config, run.plan
    seconds, state, judged = [], done.discriminator, {}

    def rollout(prompts: Sequence[Prompt], seed: int) -> list[RolloutGroup]:
        nonlocal state, judged
        start = time.perf_counter()
        groups = answers(run, prompts, seed)
        seconds.append(time.perf_counter() - start)
        if run.discriminator is not None:
            first = done.prompts_seen + (len(seconds) - 1) * len(prompts)
            groups, state, judged = judge(run, groups, state, first)
        return groups if run.reward_model is None else model_rewards(run, groups)

    try:
        collected = collect(
            rollout,
            plan.task,
            plan.algorithm,
            cursor=done.prompts_seen,
            num_prompts=config.batch.prompts_per_step,
            seed=step_seed(config, done.step),
            carried=done.carried,
        )
    except ValueError as error:
        error.told = run.groups.rank != 0  # it is the same on every rank (mcore_rl.launch.tell)
        raise
    metrics = rollout_metrics(collected, done.policy_version, sum(seconds)) | judged
    seen = done.prompts_seen + len(collected.sampled)
    after = replace(done, prompts_seen=seen, carried=collected.carried, discriminator=state)
    return samples_of(collected.groups, plan.algorithm), after, metrics


def answers(run: Run, prompts: Sequence[Prompt], seed: int) -> list[RolloutGroup]:
    """Responses of the engine's present policy with what the reward function says of them, on every rank."""
    params = rollout_sampling(run.plan.config)
    return on_rank_0(
        run.groups, lambda: [score(g, run.plan.reward) for g in run.engine.generate(prompts, params, seed=seed)]
    )


def rollout_metrics(collected: Collected, policy_version: int, seconds: float) -> Metrics:
    """Of the responses that were generated, and of those that are trained on."""
    sampled = [t for g in collected.sampled for t in g.trajectories]
    trained = [t for g in collected.groups for t in g.trajectories]
    rewards = torch.tensor([t.reward for t in sampled])
    equal = sum(len({t.reward for t in g.trajectories}) == 1 for g in collected.sampled)
    audits = [t.rule_reward for t in sampled if t.rule_reward is not None]
    stale = sum(any(t.policy_version != policy_version for t in g.trajectories) for g in collected.groups)
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        # without spread a group has no advantages: these responses teach nothing
        "reward/equal_groups_frac": equal / len(collected.sampled),
        "response/length_mean": sum(len(t.response_ids) for t in trained) / len(trained),
        "response/truncated_frac": sum(t.finish_reason == "length" for t in trained) / len(trained),
        "rollout/tokens_per_s": sum(len(t.response_ids) for t in sampled) / seconds,
        "rollout/generations": collected.generations,
        "rollout/kept_frac": collected.num_kept / len(collected.sampled),
        "rollout/stale_groups_frac": stale / len(collected.groups),
    }
    return metrics | ({"reward/audit_mean": sum(audits) / len(audits)} if audits else {})
