"""What models with a score head say of generated sequences: rewards, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mcore_rl.algorithms.gapo import GAPO
from mcore_rl.data.real_fake import REAL, REJECTED, DiscriminatorState, Fake, held_out
from mcore_rl.data.sequences import Sample, Sequences
from mcore_rl.functional.discriminator import Normaliser, auc, labelled, length_only_auc, separation
from mcore_rl.model.forward import Scorer, forward_only
from mcore_rl.parallel.collectives import sum_arrays
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.step.batches import Metrics, bare, deal, flat_responses, full_batches
from mcore_rl.types import RolloutGroup


def sequence_scores(plan: Plan, groups: Groups, scorer: Scorer, sequences: Sequence[NDArray]) -> Tensor:
    """[N] float64, what a model with a score head says at the last token of each sequence, on every rank. Collective.

    Args:
        sequences: token ids [n] of each, on rank 0; elsewhere none.
    """
    share = deal(plan, groups, Sequences.of([scored_sample(tokens) for tokens in sequences]))
    batches = full_batches(plan, groups, share)
    mine = flat_responses(share, batches, [o.values for o in forward_only(scorer, bare(batches))])
    scores = np.zeros(len(share.columns))
    scores[share.of_ranks[groups.coords.dp]] = mine.double().cpu().numpy()
    return torch.from_numpy(sum_arrays(groups, scores, contributes=groups.reports))


def scored_sample(sequence: ArrayLike, label: int = 0) -> Sample:
    """A sequence whose one position with a mask is its last token: the token 0 behind it is a target, never read."""
    return Sample(np.append(sequence, 0), 1, label=label)


def model_rewards(
    plan: Plan, groups: Groups, reward_model: Scorer, rollouts: Sequence[RolloutGroup]
) -> list[RolloutGroup]:
    """The groups, on rank 0, with the reward model's scores for rewards; what the rule said stays as `rule_reward`."""
    scores = sequence_scores(plan, groups, reward_model, token_ids_of(rollouts))
    return rewarded(rollouts, scores.tolist())


def rewarded(groups: Sequence[RolloutGroup], rewards: Sequence[float]) -> list[RolloutGroup]:
    """The groups with other rewards, one a trajectory; what the rule said stays as `rule_reward`."""
    left = iter(rewards)
    return [
        replace(g, trajectories=tuple(replace(t, reward=next(left), rule_reward=t.reward) for t in g.trajectories))
        for g in groups
    ]


def token_ids_of(groups: Sequence[RolloutGroup]) -> list[NDArray[np.int32]]:
    return [np.concatenate([t.prompt_ids, t.response_ids]) for g in groups for t in g.trajectories]


def judge(
    plan: Plan,
    groups: Groups,
    discriminator: Scorer,
    rollouts: Sequence[RolloutGroup],
    state: DiscriminatorState,
    first_example: int,
) -> tuple[list[RolloutGroup], DiscriminatorState, Metrics]:
    """The groups with the discriminator's rewards, and how well it tells apart what it was never trained on.

    All of a step's responses are scored here, by one version: it is updated after the policy was. Rank 0 has the groups
    and keeps the responses; what else the state says is the same on every rank.

    Args:
        first_example: index of the first group's prompt in the task's training data; the others follow.
    """
    algorithm: GAPO = plan.algorithm
    scores = sequence_scores(plan, groups, discriminator, token_ids_of(rollouts))
    normaliser = state.normaliser.merge(Normaliser.of(scores))
    judged = rewarded(rollouts, algorithm.discriminator_rewards(scores, normaliser).tolist())
    fakes = [Fake(first_example + i, t.response_ids) for i, g in enumerate(rollouts) for t in g.trajectories]
    metrics = measure(plan, groups, discriminator, scores, [len(fake.response) for fake in fakes])
    accuracy = metrics["discriminator/accuracy"]
    state = replace(state, normaliser=normaliser, accuracy=accuracy, fresh=(*state.fresh, *fakes))
    metrics |= {"discriminator/updates": float(state.updates), "discriminator/score_std": normaliser.std}
    right = torch.tensor([t.reward >= 1 for g in rollouts for t in g.trajectories])
    if right.any() and not right.all():
        metrics["discriminator/audit_auc"] = float(auc(scores, right))
    return judged, state, metrics


def measure(
    plan: Plan, groups: Groups, discriminator: Scorer, fake_scores: Tensor, fake_lengths: Sequence[int]
) -> Metrics:
    """The discriminator on held-out examples of the data and on responses that are new to it, by kind.

    Args:
        fake_scores: [N] float64. fake_lengths: [N] tokens of the same responses, on rank 0.
    """
    config, task = plan.config.discriminator, plan.task
    known = held_out(task, config.eval_examples)
    scores = sequence_scores(plan, groups, discriminator, [x.token_ids for x in known] if groups.rank == 0 else [])
    kinds = torch.tensor([x.kind for x in known])
    by_kind = {"real": scores[kinds == REAL], "rejected": scores[kinds == REJECTED], "fake": fake_scores}
    metrics = separation(by_kind, plan.algorithm.discriminator_objective, config.fake_share)
    if groups.rank == 0:
        real_lengths = [len(e.response) for e in task.eval_real_examples(config.eval_examples)]
        metrics["length_auc"] = length_only_auc(*labelled(torch.tensor(real_lengths), torch.tensor(fake_lengths)))
    return {f"discriminator/{name}": float(value) for name, value in metrics.items()}
