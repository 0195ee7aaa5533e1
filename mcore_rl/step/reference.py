"""What the reference says of a step's responses, in whatever layout it has, or of all responses before the first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mcore_rl.data.packing import Packed
from mcore_rl.data.sequences import Sample, Sequences
from mcore_rl.model.forward import Policy, forward_only
from mcore_rl.parallel.collectives import gather_objects, max_abs_over_ranks, on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan, precomputes_reference
from mcore_rl.roles.given_logprobs import GivenLogprobs, cache_file, describe, digest_of, digests_of, read, write
from mcore_rl.roles.models import Models
from mcore_rl.roles.reference import load_reference
from mcore_rl.step.batches import (
    Share,
    bare,
    brought,
    deal,
    flat_responses,
    full_batches,
    on_rank_0_alone,
    pair_samples,
)

PAIRS_AT_ONCE = 512  # whose tensors exist at the same time


def with_reference(plan: Plan, groups: Groups, models: Models, started: bool) -> Models:
    """The models with the reference's log-probs of all its pairs, where they are known before training.

    Args:
        started: the run goes on from a checkpoint: the policy is not its reference any more.

    Raises:
        ValueError: the policy starts as its own reference, and they give other log-probs.
    """
    if precomputes_reference(plan.config, plan.algorithm):
        began = time.perf_counter()
        description = on_rank_0(groups, lambda: describe(plan))
        path = cache_file(plan, description)
        rows = on_rank_0(groups, lambda: read(path))
        how = "read from"
        if rows is None:
            rows, how = score_all(plan, groups), "computed and kept in"
            on_rank_0(groups, lambda: write(path, rows, description))
        models = replace(models, reference=GivenLogprobs(rows))
        if groups.rank == 0:
            took = time.perf_counter() - began
            print(f"reference log-probs of {len(rows)} responses {how} {path} in {took:.1f} s", flush=True)
    if "pairs" in plan.algorithm.needs and plan.config.reference.path is None and not started:
        check_start(plan, groups, models)
    return models


def check_start(plan: Plan, groups: Groups, models: Models) -> None:
    """Policy and reference are one model before the first step, so every margin must be exactly 0."""
    share = deal(plan, groups, on_rank_0_alone(groups, held_out_samples(plan)))
    batches = full_batches(plan, groups, share)
    policy = flat_responses(share, batches, [o.logprobs for o in forward_only(models.policy, bare(batches))])
    reference = reference_logprobs(plan, groups, models, share, batches)
    worst = max_abs_over_ranks(groups, [policy - reference], contributes=groups.reports)
    limit = plan.config.reference.max_logprob_diff
    if not worst <= limit:
        raise ValueError(
            "the policy starts as its reference, but their log-probs of the held-out pairs differ by up to "
            f"{worst:.3g}; allowed is reference.max_logprob_diff={limit:g}. Kernels that are not deterministic do so, "
            "and other layouts: raise it to what they may do. If the policy is meant to start elsewhere, name the "
            "reference in reference.path"
        )


def held_out_samples(plan: Plan) -> list[Sample]:
    """Of the pairs that `evaluate` takes, each sequence once."""
    pairs = plan.task.eval_pairs(plan.config.evaluate.prompts)
    samples = [sample for pair in pairs for sample in pair_samples(pair)]
    return list({digest_of(s.token_ids, s.num_response): s for s in samples}.values())


def reference_logprobs(
    plan: Plan, groups: Groups, models: Models, share: Share, batches: Sequence[Packed]
) -> Tensor | None:
    """[response tokens of the share]; None where there is no reference, 0 where another pipeline stage knows them.

    Args:
        batches: the share's, where the reference is in the policy's layout.
    """
    reference = models.reference
    if isinstance(reference, GivenLogprobs):
        return reference.of(share.mine).to(groups.device)
    if reference is None:
        return None
    if reference.groups is groups:
        return flat_responses(share, batches, [o.logprobs for o in forward_only(reference, bare(batches))])
    return scored_elsewhere(plan, groups, reference, share).to(groups.device)


def scored_elsewhere(plan: Plan, groups: Groups, policy: Policy, share: Share) -> Tensor:
    """[response tokens of the share], from a policy in another layout of the same ranks: there and back. Collective."""
    owned = plain(share.mine) if groups.reports else Sequences.of([])
    there = deal(plan, policy.groups, owned)
    batches = full_batches(plan, policy.groups, there)
    found = flat_responses(there, batches, [o.logprobs for o in forward_only(policy, bare(batches))])
    answers = replace(there.mine, rollout_logprobs=found.float().cpu().numpy())
    # there the sequences are numbered as the ranks that gave them follow each other, and so are the answers
    given = np.concatenate([share.of_ranks[dp] for dp in groups.layout.reporters])
    answered = given[np.concatenate([there.of_ranks[dp] for dp in policy.groups.layout.reporters])]
    place = np.zeros(len(share.columns), np.int64)
    place[answered] = np.arange(len(answered))
    back = answers if policy.groups.reports else Sequences.of([])
    wanted = [place[numbers] for numbers in share.of_ranks]
    return torch.from_numpy(brought(groups, back, wanted).rollout_logprobs)


def plain(sequences: Sequences) -> Sequences:
    """Without what only the policy's own passes look at."""
    return replace(sequences, lags=None, expert_ids=None)


def score(plan: Plan, groups: Groups, policy: Policy, samples: list[Sample]) -> dict[bytes, Tensor]:
    """Log-probs of all samples by their digests, on every rank of `groups`, from a policy in any layout of them."""
    share = deal(plan, policy.groups, on_rank_0_alone(groups, samples))
    batches = full_batches(plan, policy.groups, share)
    flat = flat_responses(share, batches, [o.logprobs for o in forward_only(policy, bare(batches))]).cpu()
    parts = flat.split(share.mine.columns.num_response.tolist())
    mine = {digest: part.clone() for digest, part in zip(digests_of(share.mine), parts, strict=True)}
    rows: dict[bytes, Tensor] = {}
    for found in gather_objects(groups, mine if policy.groups.reports else {}):
        rows |= found
    return rows


def score_all(plan: Plan, groups: Groups) -> dict[bytes, Tensor]:
    """Load the reference, score every pair, drop it; the same result on every rank."""
    policy = load_reference(plan, groups)
    pairs = plan.task.train_pairs()
    parts = [pairs[i : i + PAIRS_AT_ONCE] for i in range(0, len(pairs), PAIRS_AT_ONCE)]
    # packed as `check_start` packs them, and last, so that theirs are the numbers it sees
    samples = [[s for pair in part for s in pair_samples(pair)] for part in parts] + [held_out_samples(plan)]
    rows: dict[bytes, Tensor] = {}
    for part in samples:
        rows |= score(plan, groups, policy, part)
    return rows
