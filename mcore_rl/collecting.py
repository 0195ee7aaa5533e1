"""The collecting phase: rollouts on rank 0, their rewards, and the samples they become. Called on every rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from mcore_rl.data.packing import Sample, samples_of
from mcore_rl.model.checkpoint import Progress
from mcore_rl.model.forward import Scorer, forward_only
from mcore_rl.parallel.collectives import on_rank_0, sum_over_ranks
from mcore_rl.phases import Metrics, pack_parts, reports, step_seed
from mcore_rl.rollout.collect import Collected, collect, score
from mcore_rl.run import Run, rollout_sampling
from mcore_rl.types import Prompt, RolloutGroup


def collect_rollouts(run: Run, done: Progress) -> tuple[list[Sample], Progress, Metrics]:
    """This step's samples, where the next step begins to collect, and metrics."""
    config, plan = run.plan.config, run.plan
    params, seconds = rollout_sampling(config), []

    def rollout(prompts: Sequence[Prompt], seed: int) -> list[RolloutGroup]:
        start = time.perf_counter()
        groups = on_rank_0(
            run.groups, lambda: [score(g, plan.reward) for g in run.engine.generate(prompts, params, seed=seed)]
        )
        seconds.append(time.perf_counter() - start)
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
    metrics = rollout_metrics(collected, done.policy_version, sum(seconds))
    after = replace(done, prompts_seen=done.prompts_seen + len(collected.sampled), carried=collected.carried)
    return samples_of(collected.groups, plan.algorithm), after, metrics


def model_rewards(run: Run, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with the reward model's scores for rewards; what the rule said stays as `rule_reward`."""
    sequences = [(*t.prompt_ids, *t.response_ids) for g in groups for t in g.trajectories]
    rewards = iter(sequence_scores(run, run.reward_model, sequences))
    return [
        replace(g, trajectories=tuple(replace(t, reward=next(rewards), rule_reward=t.reward) for t in g.trajectories))
        for g in groups
    ]


def sequence_scores(run: Run, scorer: Scorer, sequences: Sequence[tuple[int, ...]]) -> list[float]:
    """What a model with a score head says at the last token of each sequence, on every rank."""
    # the number of a sequence travels in the place of its advantage, whatever bin it is packed into
    samples = [scored_sample(sequence, float(i)) for i, sequence in enumerate(sequences)]
    (batches,) = pack_parts(run, [samples])
    mine = {}
    for batch, out in zip(batches, forward_only(scorer, batches)):
        numbers = batch.advantages[batch.loss_mask].long().tolist()
        mine |= zip(map(str, numbers), out.values[batch.loss_mask].tolist())
    scores = sum_over_ranks(run.groups, mine, contributes=reports(run))
    return [scores[str(i)] for i in range(len(sequences))]


def scored_sample(sequence: tuple[int, ...], label: float) -> Sample:
    """A sequence whose one position with a mask is its last token: the token 0 behind it is a target, never read."""
    return Sample((*sequence, 0), 1, label, (0.0,))


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
