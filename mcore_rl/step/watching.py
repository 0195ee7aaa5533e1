"""What a training step does to the routers: statistics of the first micro-batches, before and after the update.

Before the update one forward pass records the routes; after it one pass records the new ones and a third takes the old
ones at the new weights, which splits every log-ratio into weights and routing (`moe.measure.decompose`, weights first).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mcore_rl.config import MoeConfig, RunConfig, due
from mcore_rl.model.forward import Policy, forward_only, forward_recorded
from mcore_rl.parallel.collectives import gather_objects
from mcore_rl.parallel.groups import Groups
from mcore_rl.step.batches import Metrics
from mcore_rl.step.scoring import MiniBatches
from mcore_rl.types import PolicyOutput, WeightedBatch
from moe.judge.watch import Level, alarms_of
from moe.measure.decompose import crossover, parts
from moe.measure.flips import flip_statistics, load_health, loads, router_shift
from moe.measure.stats import Answers
from moe.record.megatron import Recorded
from moe.record.trace import RoutingTrace


@dataclass(frozen=True)
class Watched:
    """Some micro-batches without routes to take, and what the policy before the step did with them."""

    batches: list[WeightedBatch]
    outputs: list[PolicyOutput]  # on the last pipeline stage
    recorded: list[Recorded]


def watch_routers(
    moe: MoeConfig, groups: Groups, policy: Policy, mini_batches: MiniBatches, step: int
) -> Watched | None:
    """The policy before the step on this rank's first micro-batches, or None where the step is not looked at."""
    layout = groups.layout
    if not (due(moe.log_every, step + 1) or due(moe.record_every, step + 1)):
        return None
    count = layout.pp if layout.vpp > 1 else 1  # the interleaved schedule works in rounds
    batches = [replace(b, expert_ids=None, observed_ids=None) for b in mini_batches[0][:count]]
    return Watched(batches, *forward_recorded(policy, batches, statistics=True))


def router_metrics(
    config: RunConfig, groups: Groups, policy: Policy, before: Watched | None, step: int
) -> Metrics:
    """Statistics over the response tokens of all ranks; routes go to disk where that is due. {} if nothing is.

    moe/flip_*: old routes against new ones. moe/chi, k_star, share_routing: how much of the token log-ratios the flips
    make. moe/load_*, router_entropy, margin_median: the routers after the step. mismatch/flip_*: the engine's routes
    against those of the policy before the step.
    """
    if before is None:
        return {}
    moe = config.moe
    following = [replace(b, observed_ids=r.expert_ids) for b, r in zip(before.batches, before.recorded)]
    outputs, recorded = forward_recorded(policy, following, statistics=True)
    if due(moe.record_every, step + 1) and groups.reports:
        _keep(config.run_dir / "routes", groups, policy, before, recorded, step)
    if not due(moe.log_every, step + 1):
        return {}
    on_old = [replace(b, expert_ids=r.expert_ids) for b, r in zip(before.batches, before.recorded)]
    replayed = forward_only(policy, on_old)
    after = Watched(before.batches, outputs, recorded)
    shares = gather_objects(groups, _response_tokens(before, after, replayed) if groups.reports else {})
    shares = [s for s in shares if s and len(s["lengths"])]
    if not shares:
        return {}
    joined = {name: torch.cat([s[name] for s in shares]) for name in shares[0]}
    return summary(joined, policy.routers.num_experts)


def router_alarms(name: str, groups: Groups, metrics: Metrics, step: int) -> Metrics:
    """moe/alarm_level (0 ok, 1 watch, 2 unstable) of a step that was looked at; rank 0 says why, and what to change.

    The thresholds and their sources are in `moe.judge.watch`.
    """
    if "moe/flip_any" not in metrics:
        return {}
    found = alarms_of(metrics, step)
    if groups.rank == 0:
        for alarm in found:
            print(f"{name}: routers {alarm}", flush=True)
    return {"moe/alarm_level": float(max((alarm.level for alarm in found), default=Level.OK))}


def summary(tokens: dict[str, Tensor], num_experts: int) -> Metrics:
    """The metrics, from what `_response_tokens` gathered of N tokens in answers of `lengths`; no NaN among them."""
    answer_ids = torch.repeat_interleave(torch.arange(len(tokens["lengths"])), tokens["lengths"])
    answers = Answers(answer_ids, torch.arange(len(tokens["lengths"])))
    flips = flip_statistics(tokens["old_ids"], tokens["new_ids"], answer_ids, tokens["old_gates"])
    names = {"token_any": "any", "expert": "expert", "set": "set", "gate_mass": "gate_mass"}
    metrics = {f"moe/flip_{name}": flips[key].value() for key, name in names.items()}
    metrics["moe/flip_layers_per_token"] = flips["layers_per_token"].value()
    z_w, z_r = tokens["on_old"] - tokens["old"], tokens["new"] - tokens["on_old"]
    metrics |= {f"moe/{name}": s.value() for name, s in crossover(z_w, z_r, answers).items()}
    metrics["moe/share_routing"] = parts(z_w, z_r, answers)["share_routing"].value()
    health = load_health(loads(tokens["new_ids"], num_experts))
    metrics |= {
        "moe/load_cv": health["cv"].mean().item(),
        "moe/load_max_over_mean": health["max_over_mean"].max().item(),
        "moe/dead_experts_frac": health["dead"].mean().item(),
        "moe/router_entropy": tokens["entropy"].mean().item(),
        "moe/margin_median": tokens["margins"].median().item(),
        "moe/gamma_mean": tokens["gamma"].mean().item(),
        "moe/gamma_below_0.7": (tokens["gamma"] < 0.7).double().mean().item(),
    }
    for layer, cv in enumerate(health["cv"].tolist()):
        metrics[f"moe/layer_{layer:02d}/flip_set"] = flips[f"set/layer_{layer}"].value()
        metrics[f"moe/layer_{layer:02d}/load_cv"] = cv
    if "engine_ids" in tokens:
        against = flip_statistics(tokens["engine_ids"], tokens["old_ids"], answer_ids)
        metrics |= {f"mismatch/flip_{name}": against[key].value() for key, name in names.items() if key in against}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _response_tokens(before: Watched, after: Watched, replayed: list[PolicyOutput]) -> dict[str, Tensor]:
    """This rank's response tokens, [n, ...] on the CPU, and how many of them each answer has."""
    masks = [b.loss_mask for b in before.batches]

    def picked(tensors: list[Tensor]) -> Tensor:
        return torch.cat([x[mask] for x, mask in zip(tensors, masks, strict=True)]).cpu()

    counts = [torch.bincount(b.segment_ids[m].cpu()) for b, m in zip(before.batches, masks)]
    found = {
        "lengths": torch.cat([c[c > 0] for c in counts]),
        "old": picked([o.logprobs for o in before.outputs]).double(),
        "new": picked([o.logprobs for o in after.outputs]).double(),
        "on_old": picked([o.logprobs for o in replayed]).double(),
        "old_ids": picked([r.expert_ids.int() for r in before.recorded]),
        "new_ids": picked([r.expert_ids.int() for r in after.recorded]),
        "old_gates": picked([r.gates for r in before.recorded]),
        "margins": picked([r.margins for r in after.recorded]),
        "entropy": picked([r.entropy for r in after.recorded]),
        "gamma": picked([router_shift(a.log_p, b.log_p) for a, b in zip(before.recorded, after.recorded)]),
    }
    if before.batches[0].rollout_expert_ids is not None:
        found["engine_ids"] = picked([b.rollout_expert_ids.int() for b in before.batches])
    return found


def _keep(
    folder: Path, groups: Groups, policy: Policy, before: Watched, after: list[Recorded], step: int
) -> None:
    """Write step_N.rank_R.{before,after,tokens}.safetensors into the folder of the run's routes."""
    folder.mkdir(exist_ok=True)
    name = f"step_{step + 1:06d}.rank_{groups.rank}"
    lengths = torch.cat([b.cu_seqlens.diff() for b in before.batches])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).cpu()
    for when, recorded in (("before", before.recorded), ("after", after)):
        whole = {k: torch.cat([getattr(r, k).cpu() for r in recorded]) for k in ("expert_ids", "margins", "gates")}
        trace = RoutingTrace(**whole, num_experts=policy.routers.num_experts, cu_seqlens=cu_seqlens)
        trace.save(folder / f"{name}.{when}.safetensors")
    fields = ("token_ids", "targets", "loss_mask")
    tokens = {field: torch.cat([getattr(b, field).cpu() for b in before.batches]) for field in fields}
    save_file(tokens, folder / f"{name}.tokens.safetensors")
