"""What is known of a rollout before the step: old and reference log-probs, values, and the advantages they lead to."""

from __future__ import annotations

from dataclasses import replace

import torch

from mcore_rl.functional.reduce import metric_means
from mcore_rl.functional.value import explained_variance
from mcore_rl.model.forward import forward_only
from mcore_rl.parallel.collectives import max_over_ranks, sum_over_ranks
from mcore_rl.phases import Metrics, MiniBatches, add, largest, reports
from mcore_rl.reference import reference_logprobs
from mcore_rl.routing import score_policy, with_rollout_routes
from mcore_rl.run import Run
from mcore_rl.types import PackedBatch


def score_old(run: Run, mini_batches: MiniBatches) -> tuple[MiniBatches, Metrics]:
    """Fill in what is known before the step: old and reference log-probs, values, and the advantages they lead to."""
    flat, metrics = [b for part in mini_batches for b in part], {}
    if run.plan.algorithm.needs_rollouts:
        moe = run.plan.config.moe
        if run.plan.algorithm.old_logprobs == "rollout":
            flat = [replace(b, old_logprobs=b.rollout_logprobs) for b in with_rollout_routes(flat, moe.routing_replay)]
        else:
            flat, outputs = score_policy(run.policy, flat, moe.routing_replay, moe.router_shift)
            flat = filled(flat, "old_logprobs", [o.logprobs for o in outputs])
            metrics = mismatch(run, flat)
    flat = filled(flat, "ref_logprobs", reference_logprobs(run, flat))
    if run.critic is not None:
        flat = filled(flat, "values", [o.values for o in forward_only(run.critic, flat)])
        flat, advantage_metrics = token_advantages(run, flat)
        metrics |= advantage_metrics
    batches = iter(flat)
    return [[next(batches) for _ in part] for part in mini_batches], metrics


def filled(batches: list[PackedBatch], field: str, values: list[torch.Tensor]) -> list[PackedBatch]:
    """The batches with one more field; unchanged where `values` is empty, as on all but the last pipeline stage."""
    return [replace(b, **{field: v}) for b, v in zip(batches, values, strict=True)] if values else batches


def token_advantages(run: Run, batches: list[PackedBatch]) -> tuple[list[PackedBatch], Metrics]:
    """Advantages and returns a token from the critic's values, normalised over the whole rollout."""
    algorithm = run.plan.algorithm
    sums: Metrics = {}
    if run.groups.is_pipeline_last:
        advised = [algorithm.token_advantages(b) for b in batches]
        batches = [b for b, _ in advised]
        for _, metrics in advised:
            add(sums, metrics)
    totals = sum_over_ranks(run.groups, sums, contributes=reports(run))
    if run.groups.is_pipeline_last:
        tensors = {k: torch.tensor(v, dtype=torch.float64, device=run.groups.device) for k, v in totals.items()}
        batches = [algorithm.normalise_advantages(b, tensors) for b in batches]
    means = metric_means(totals)
    if means:  # a return minus the value it was made from is the advantage, so their moments tell the critic's error
        names = [f"critic/{x}_{moment}" for x in ("advantage", "return") for moment in ("mean", "square")]
        of_critic = (torch.tensor(means[name], dtype=torch.float64) for name in names)
        means["critic/explained_variance"] = explained_variance(*of_critic).item()
    return batches, means


def mismatch(run: Run, batches: list[PackedBatch]) -> Metrics:
    """How far the trainer's log-probs are from the engine's, d = log pi_old - log mu, over all response tokens.

    Where tokens say how old they are: mismatch/* of those that the present weights sampled, staleness/* of the others.
    """
    d = torch.cat([(b.old_logprobs - b.rollout_logprobs)[b.loss_mask] for b in batches]).double()
    if run.plan.config.rollout.max_staleness == 0:
        return difference(run, d, "mismatch")
    stale = torch.cat([b.lags[b.loss_mask] for b in batches]) > 0
    return difference(run, d[~stale], "mismatch") | difference(run, d[stale], "staleness")


def difference(run: Run, d: torch.Tensor, name: str) -> Metrics:
    """k3, mean and largest absolute value of the differences [n] of all ranks; nothing where there are none."""
    contributes = reports(run)
    sums = {"n": float(d.numel()), "k3": (d.exp() - 1 - d).sum().item(), "abs": d.abs().sum().item()}
    totals = sum_over_ranks(run.groups, sums, contributes=contributes)
    if totals["n"] == 0:  # every response was taken out of the loss, or was of the other kind
        return {}
    worst = max_over_ranks(run.groups, largest([d]) if contributes else 0.0)
    return {
        f"{name}/k3": totals["k3"] / totals["n"],
        f"{name}/abs_mean": totals["abs"] / totals["n"],
        f"{name}/abs_max": worst,
    }
