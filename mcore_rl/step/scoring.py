"""What is known of a rollout before the step: old and reference log-probs, values, and the advantages they lead to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.data.packing import Packed
from mcore_rl.data.scores import Scores, routed, scored, weighted
from mcore_rl.functional.reduce import metric_means
from mcore_rl.functional.value import explained_variance
from mcore_rl.model.forward import Policy, forward_only, forward_recorded
from mcore_rl.parallel.collectives import max_abs_over_ranks, sum_over_ranks
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.roles.models import Models
from mcore_rl.step.batches import Metrics, Share, bare, flat_positions, flat_responses, full_batches, packed
from mcore_rl.step.reference import reference_logprobs
from mcore_rl.types import ScoredBatch, WeightedBatch

MiniBatches = list[list[WeightedBatch]]


def score(plan: Plan, groups: Groups, models: Models, share: Share) -> tuple[MiniBatches, Metrics]:
    """The share's mini-batches, with what is known before the step. Collective.

    All that no update changes is asked in full micro-batches, whatever mini-batches the sequences are in.
    """
    scores, metrics = Scores.of(share.mine, groups.device), {"train/sequences_run_frac": share.run_frac}
    if plan.algorithm.needs_rollouts and plan.config.moe.routing_replay == "rollout":
        scores = replace(scores, routes=scores.rollout_routes)
    batches: list[Packed] = []
    if not asks_nothing(plan, groups, models):
        batches = full_batches(plan, groups, share, plan.algorithm.unit)
    if plan.algorithm.needs_rollouts:
        scores = _old(plan, models.policy, share, batches, scores)
        if scores.old is not None:
            metrics |= mismatch(groups, _trained(share, scores.old - scores.rollout), _lags(share, scores))
    scores = replace(scores, ref=reference_logprobs(plan, groups, models, share, batches))
    if models.critic is not None:
        values = flat_responses(share, batches, [o.values for o in forward_only(models.critic, bare(batches))])
        scores, advised = token_advantages(plan.algorithm, groups, share, batches, replace(scores, values=values))
        metrics |= advised
    return mini_batches_of(groups, share, scores), metrics


def asks_nothing(plan: Plan, groups: Groups, models: Models) -> bool:
    """Whether no model is asked anything before the update."""
    alone = not plan.algorithm.needs_rollouts or plan.algorithm.old_logprobs == "rollout" or update_knows_old(plan)
    elsewhere = not isinstance(models.reference, Policy) or models.reference.groups is not groups
    return alone and elsewhere and models.critic is None


def update_knows_old(plan: Plan) -> bool:
    """Whether the old log-probs are those of the update's own forward pass: one update, and nothing needs them earlier.

    The routes of "old" replay and the routers' log-probs of `moe.router_shift` are those of a pass before it, and a
    critic's advantages may hold a KL of the old log-probs.
    """
    batch, moe, algorithm = plan.config.batch, plan.config.moe, plan.algorithm
    earlier = moe.routing_replay == "old" or moe.router_shift or "critic" in algorithm.needs
    one = batch.mini_batches * batch.epochs == 1
    return one and algorithm.needs_rollouts and algorithm.old_logprobs == "trainer" and not earlier


def _trained(share: Share, flat: Tensor) -> Tensor:
    """Of one number a response token those that are trained on."""
    return flat[torch.from_numpy(share.mine.loss_mask).to(flat.device)]


def _lags(share: Share, scores: Scores) -> Tensor | None:
    return None if scores.lags is None else _trained(share, scores.lags)


def _old(plan: Plan, policy: Policy, share: Share, batches: list[Packed], scores: Scores) -> Scores:
    """With the old log-probs, and what the routers did meanwhile.

    Under "old" (R2 of arXiv:2512.01374) this pass chooses the routes of every pass of the step; under "rollout" (R3,
    arXiv:2510.11370) they are the engine's, in this pass too.
    """
    moe = plan.config.moe
    if plan.algorithm.old_logprobs == "rollout":
        return replace(scores, old=scores.rollout)
    if update_knows_old(plan):
        return scores
    given = [routed(b, scores) for b in batches]
    if moe.routing_replay != "old" and not moe.router_shift:
        return replace(scores, old=flat_responses(share, batches, [o.logprobs for o in forward_only(policy, given)]))
    outputs, recorded = forward_recorded(policy, given, statistics=moe.router_shift)
    taken = flat_positions(share, batches, [r.expert_ids for r in recorded])
    scores = replace(scores, old=flat_responses(share, batches, [o.logprobs for o in outputs]))
    if moe.router_shift:
        logprobs = flat_positions(share, batches, [r.log_p for r in recorded])
        scores = replace(scores, observed=taken, observed_logprobs=logprobs)
    return replace(scores, routes=taken) if moe.routing_replay == "old" else scores


def mini_batches_of(groups: Groups, share: Share, scores: Scores) -> MiniBatches:
    """[mini_batch][micro_batch] of this rank."""
    weights = torch.from_numpy(share.weights).float().to(groups.device)
    return [[weighted(p, scores, weights) for p in packed(groups, share.mine, parts)] for parts in share.mini_batches]


def token_advantages(
    algorithm: Algorithm, groups: Groups, share: Share, batches: list[Packed], scores: Scores
) -> tuple[Scores, Metrics]:
    """With advantages and returns a token from the critic's values, normalised over the whole rollout."""
    given = [scored(b, scores) for b in batches] if groups.is_pipeline_last else []
    advised, means = advised_batches(algorithm, groups, given)
    if not advised:
        return scores, means
    found = {name: flat_responses(share, batches, [getattr(b, name) for b in advised])
             for name in ("advantages", "returns")}  # fmt: skip
    return replace(scores, **found), means


def advised_batches(
    algorithm: Algorithm, groups: Groups, batches: list[ScoredBatch]
) -> tuple[list[ScoredBatch], Metrics]:
    """The batches, all of a rollout, with advantages and returns a token; none on all but the last pipeline stage."""
    sums: Metrics = {}
    advised = [algorithm.token_advantages(b) for b in batches]
    for _, metrics in advised:
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    totals = sum_over_ranks(groups, sums, contributes=groups.reports)
    tensors = {k: torch.tensor(v, dtype=torch.float64, device=groups.device) for k, v in totals.items()}
    found = [algorithm.normalise_advantages(b, tensors) for b, _ in advised]
    means = metric_means(totals)
    if means:  # a return minus the value it was made from is the advantage, so their moments tell the critic's error
        names = [f"critic/{x}_{moment}" for x in ("advantage", "return") for moment in ("mean", "square")]
        of_critic = (torch.tensor(means[name], dtype=torch.float64) for name in names)
        means["critic/explained_variance"] = explained_variance(*of_critic).item()
    return found, means


def mismatch(groups: Groups, d: Tensor, lags: Tensor | None) -> Metrics:
    """How far the trainer's log-probs are from the engine's, d = log pi_old - log mu [n], over all response tokens.

    Args:
        lags: [n], where tokens can be older than the weights: mismatch/* is then of those that the present weights
            sampled, staleness/* of the others.
    """
    if lags is None:
        return difference(groups, d.double(), "mismatch")
    return difference(groups, d[lags == 0].double(), "mismatch") | difference(groups, d[lags > 0].double(), "staleness")


def difference(groups: Groups, d: Tensor, name: str) -> Metrics:
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
