"""What is known of a rollout before the step: old and reference log-probs, values, and the advantages they lead to."""

from __future__ import annotations

from dataclasses import replace

import torch

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.functional.reduce import metric_means
from mcore_rl.functional.value import explained_variance
from mcore_rl.model.forward import forward_only
from mcore_rl.parallel.collectives import max_abs_over_ranks, sum_over_ranks
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.roles.models import Models
from mcore_rl.step.batches import Metrics, MiniBatches
from mcore_rl.step.reference import reference_logprobs
from mcore_rl.step.replaying import score_policy, with_rollout_routes
from mcore_rl.step.updating import add
from mcore_rl.types import PackedBatch


def score_old(
    plan: Plan, groups: Groups, models: Models, mini_batches: MiniBatches
) -> tuple[MiniBatches, Metrics]:
    """Fill in what is known before the step: old and reference log-probs, values, and the advantages they lead to."""
    flat, metrics = [b for part in mini_batches for b in part], {}
    if plan.algorithm.needs_rollouts:
        moe = plan.config.moe
        if plan.algorithm.old_logprobs == "rollout":
            flat = [replace(b, old_logprobs=b.rollout_logprobs) for b in with_rollout_routes(flat, moe.routing_replay)]
        else:
            flat, outputs = score_policy(models.policy, flat, moe.routing_replay, moe.router_shift)
            flat = filled(flat, "old_logprobs", [o.logprobs for o in outputs])
            metrics = mismatch(groups, flat, plan.config.rollout.max_staleness > 0)
    flat = filled(flat, "ref_logprobs", reference_logprobs(plan, groups, models, flat))
    if models.critic is not None:
        flat = filled(flat, "values", [o.values for o in forward_only(models.critic, flat)])
        flat, advantage_metrics = token_advantages(plan.algorithm, groups, flat)
        metrics |= advantage_metrics
    batches = iter(flat)
    return [[next(batches) for _ in part] for part in mini_batches], metrics


def filled(batches: list[PackedBatch], field: str, values: list[torch.Tensor]) -> list[PackedBatch]:
    """The batches with one more field; unchanged where `values` is empty, as on all but the last pipeline stage."""
    return [replace(b, **{field: v}) for b, v in zip(batches, values, strict=True)] if values else batches


def token_advantages(
    algorithm: Algorithm, groups: Groups, batches: list[PackedBatch]
) -> tuple[list[PackedBatch], Metrics]:
    """Advantages and returns a token from the critic's values, normalised over the whole rollout."""
    sums: Metrics = {}
    if groups.is_pipeline_last:
        advised = [algorithm.token_advantages(b) for b in batches]
        batches = [b for b, _ in advised]
        for _, metrics in advised:
            add(sums, metrics)
    totals = sum_over_ranks(groups, sums, contributes=groups.reports)
    if groups.is_pipeline_last:
        tensors = {k: torch.tensor(v, dtype=torch.float64, device=groups.device) for k, v in totals.items()}
        batches = [algorithm.normalise_advantages(b, tensors) for b in batches]
    means = metric_means(totals)
    if means:  # a return minus the value it was made from is the advantage, so their moments tell the critic's error
        names = [f"critic/{x}_{moment}" for x in ("advantage", "return") for moment in ("mean", "square")]
        of_critic = (torch.tensor(means[name], dtype=torch.float64) for name in names)
        means["critic/explained_variance"] = explained_variance(*of_critic).item()
    return batches, means


def mismatch(groups: Groups, batches: list[PackedBatch], stale: bool) -> Metrics:
    """How far the trainer's log-probs are from the engine's, d = log pi_old - log mu, over all response tokens.

    Args:
        stale: tokens may be older than the weights: mismatch/* is of those that the present weights sampled,
            staleness/* of the others.
    """
    d = torch.cat([(b.old_logprobs - b.rollout_logprobs)[b.loss_mask] for b in batches]).double()
    if not stale:
        return difference(groups, d, "mismatch")
    older = torch.cat([b.lags[b.loss_mask] for b in batches]) > 0
    return difference(groups, d[~older], "mismatch") | difference(groups, d[older], "staleness")


def difference(groups: Groups, d: torch.Tensor, name: str) -> Metrics:
    """k3, mean and largest absolute value of the differences [n] of all ranks; nothing where there are none."""
    contributes = groups.reports
    sums = {"n": float(d.numel()), "k3": (d.exp() - 1 - d).sum().item(), "abs": d.abs().sum().item()}
    totals = sum_over_ranks(groups, sums, contributes=contributes)
    if totals["n"] == 0:  # every response was taken out of the loss, or was of the other kind
        return {}
    return {
        f"{name}/k3": totals["k3"] / totals["n"],
        f"{name}/abs_mean": totals["abs"] / totals["n"],
        f"{name}/abs_max": max_abs_over_ranks(groups, [d], contributes=contributes),
    }
