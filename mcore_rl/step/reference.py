"""What the reference says of a step's responses, in whatever layout it has, or of all responses before the first."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from mcore_rl.data.packing import Sample
from mcore_rl.model.forward import Policy, forward_only
from mcore_rl.parallel.collectives import gather_objects, max_abs_over_ranks, on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan, precomputes_reference
from mcore_rl.roles.given_logprobs import GivenLogprobs, cache_file, describe, digest_of, read, sequences, write
from mcore_rl.roles.models import Models
from mcore_rl.roles.reference import load_reference
from mcore_rl.step.batches import pack_parts, pair_samples
from mcore_rl.types import PackedBatch

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
    (batches,) = pack_parts(plan, groups, [held_out_samples(plan)])
    policy = [o.logprobs for o in forward_only(models.policy, batches)]
    reference = reference_logprobs(plan, groups, models, batches)
    differences = [p - r for p, r in zip(policy, reference)]
    worst = max_abs_over_ranks(groups, differences, contributes=groups.reports)
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
    return list(dict.fromkeys(sample for pair in pairs for sample in pair_samples(pair)))


def reference_logprobs(
    plan: Plan, groups: Groups, models: Models, batches: list[PackedBatch]
) -> list[Tensor]:
    """[T] of each of this rank's batches; an empty list where there is no reference, or another stage knows them."""
    reference = models.reference
    if isinstance(reference, GivenLogprobs):
        return [reference.of(b) for b in batches]
    if reference is None:
        return []
    if reference.groups is groups:
        return [o.logprobs for o in forward_only(reference, batches)]
    mine = [(tokens.tolist(), len(places)) for b in batches for tokens, places in sequences(b)]
    everyone = gather_objects(groups, mine if groups.reports else [])
    samples = [Sample(tuple(tokens), n, 0.0, (0.0,) * n) for part in everyone for tokens, n in part]
    given = GivenLogprobs(score(plan, groups, reference, samples))
    return [given.of(b) for b in batches]


def score(plan: Plan, groups: Groups, policy: Policy, samples: list[Sample]) -> dict[bytes, Tensor]:
    """Log-probs of all samples by their digests, on every rank of `groups`, from a policy in any layout of them."""
    (batches,) = pack_parts(plan, policy.groups, [samples])
    mine: dict[bytes, Tensor] = {}
    for batch, out in zip(batches, forward_only(policy, batches)):
        logprobs = out.logprobs.cpu()
        mine |= {digest_of(tokens, len(places)): logprobs[places].clone() for tokens, places in sequences(batch)}
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
