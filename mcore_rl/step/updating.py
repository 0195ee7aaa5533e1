"""The updates of a step: one optimizer step a mini-batch, of the critic and of the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mcore_rl.config import MoeConfig, RunConfig, due
from mcore_rl.functional.reduce import metric_means
from mcore_rl.model.forward import Model, Policy, forward_backward
from mcore_rl.model.optimizer import Training
from mcore_rl.parallel.collectives import sum_over_ranks
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.roles.models import Models
from mcore_rl.step.batches import Metrics
from mcore_rl.step.replaying import router_weighted
from mcore_rl.step.scoring import MiniBatches, mismatch, update_knows_old
from mcore_rl.types import LossOutput, PackedBatch, PolicyOutput, WeightedBatch
from mcore_rl.weights.sync import WeightExporter, export_hf


def update(
    plan: Plan, groups: Groups, models: Models, exporter: WeightExporter, mini_batches: MiniBatches, step: int
) -> Metrics:
    """One optimizer step a mini-batch, `epochs` times over, of the critic and, after its warm-up, of the policy."""
    config, algorithm = plan.config, plan.algorithm
    metrics: Metrics = {}
    rounds = mini_batches * config.batch.epochs
    if models.critic is not None:

        def value_loss(batch: WeightedBatch, out: PolicyOutput) -> LossOutput:
            return algorithm.value_loss(batch, out.values)

        metrics |= optimise(groups, models.trained["critic"], models.critic, rounds, value_loss, "critic")
    if models.critic is None or step >= config.critic.warmup_steps:
        after = updates_exporter(config, exporter, step)
        before = weighing_routers(models.policy, config.moe)
        training, own = models.trained["policy"], OwnOldLogprobs(algorithm.loss)
        loss = own if update_knows_old(plan) else algorithm.loss
        metrics |= optimise(groups, training, models.policy, rounds, loss, "policy", before, after)
        if update_knows_old(plan):
            metrics |= own.mismatch(groups)
    positions = float(sum(b.token_ids.numel() for part in mini_batches for b in part))
    totals = sum_over_ranks(groups, {"positions": positions * config.batch.epochs}, contributes=groups.reports)
    return {**metrics, "num_positions": totals["positions"]}


class OwnOldLogprobs:
    """A loss whose old log-probs are those of its own forward pass: the only update of a rollout begins at the weights
    before the step. Ratios are exactly 1, and a forward pass is saved."""

    def __init__(self, loss: Callable[[WeightedBatch, PolicyOutput], LossOutput]):
        self._loss = loss
        self._differences: list[torch.Tensor] = []
        self._lags: list[torch.Tensor] = []

    def __call__(self, batch: WeightedBatch, out: PolicyOutput) -> LossOutput:
        old = torch.where(batch.loss_mask, out.logprobs.detach(), 0.0)
        self._differences.append((old - batch.rollout_logprobs)[batch.loss_mask])
        if batch.lags is not None:
            self._lags.append(batch.lags[batch.loss_mask])
        return self._loss(replace(batch, old_logprobs=old), out)

    def mismatch(self, groups: Groups) -> Metrics:
        """Of all micro-batches so far, as `scoring.mismatch`."""
        nothing = torch.zeros(0, device=groups.device)
        lags = torch.cat(self._lags) if self._lags else None
        return mismatch(groups, torch.cat([nothing, *self._differences]), lags)


def updates_exporter(config: RunConfig, exporter: WeightExporter, step: int) -> Callable[[int], object] | None:
    """Of `moe.export_every`: leaves the policy as updates/step_N/K after optimizer step K of training step N."""
    if not due(config.moe.export_every, step + 1):
        return None
    return lambda k: export_hf(exporter, config.run_dir / f"updates/step_{step + 1:06d}/{k}", config.model.path)


def weighing_routers(policy: Policy, moe: MoeConfig) -> Callable[[list[WeightedBatch]], list[WeightedBatch]] | None:
    """Of `moe.router_shift`: gives a mini-batch the weights of its tokens, just before its update."""
    return (lambda batches: router_weighted(policy, batches, moe.router_shift_floor)) if moe.router_shift else None


def adapt_kl(plan: Plan, metrics: Metrics, num_samples: int) -> Plan:
    """The plan with the KL coefficient of the next step."""
    return replace(plan, algorithm=plan.algorithm.adapt_kl(metrics.get("policy/kl_rollout", 0.0), num_samples))


def optimise(
    groups: Groups,
    training: Training,
    model: Model,
    mini_batches: Sequence[Sequence[PackedBatch]],
    loss: Callable[[PackedBatch, PolicyOutput], LossOutput],
    name: str,
    before: Callable[[list[PackedBatch]], list[PackedBatch]] | None = None,
    after: Callable[[int], object] | None = None,
) -> Metrics:
    """Optimizer steps of one model; its losses and metrics averaged over them.

    Args:
        before: what becomes of a mini-batch at the weights its update starts from.
        after: is told the number of each optimizer step, from 1.
    """
    sums: Metrics = {"num_loss": 0.0}
    norms, lr = [], 0.0
    for mini_batch in mini_batches:
        if before is not None:
            mini_batch = before(mini_batch)
        training.zero_grad()
        for result in forward_backward(model, mini_batch, loss):
            add(sums, {"num_loss": result.loss, **result.metrics})
        grad_norm, lr = training.step()
        norms.append(grad_norm)
        if after is not None:
            after(len(norms))
    totals = sum_over_ranks(groups, sums, contributes=groups.reports)
    optimizer = "optimizer" if name == "policy" else f"{name}_optimizer"
    return {
        f"{name}/loss": totals.pop("num_loss") / len(norms),
        **metric_means(totals),
        f"{optimizer}/grad_norm_mean": sum(norms) / len(norms),
        f"{optimizer}/grad_norm_max": max(norms),
        f"{optimizer}/lr": lr,
    }


def add(sums: Metrics, metrics: dict[str, torch.Tensor]) -> None:
    """Add a batch's metrics to the sums so far, in one transfer from the device."""
    for name, value in zip(metrics, torch.stack(list(metrics.values())).tolist()):
        sums[name] = sums.get(name, 0.0) + value
