"""Two policies on one probe: every statistic by name, with its interval.

Names are flat and end in what varies: `flips/set/layer_2`, `inflation/z_w/8`, `sweep/0.01/var_r`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe.measure.decompose import Decomposition, decomposition_statistics
from moe.measure.flips import (
    balance_loss,
    flip_statistics,
    load_health,
    loads,
    margin_report,
    overlap,
    rank_imbalance,
    router_drift,
)
from moe.measure.objectives import (
    GSPO_CLIP,
    SAPO_TAU,
    TOKEN_CLIP,
    clip_statistics,
    coefficients,
    gate_spread_bound,
    gate_statistics,
    matched_width,
)
from moe.measure.probe import Probe
from moe.measure.stats import (
    Answers,
    Estimate,
    autocorrelation,
    between_share,
    ess,
    estimates,
    inflation,
    joint,
    log_weights,
)
from moe.record.trace import RoutingTrace

Pass = tuple[list[Tensor], RoutingTrace, Tensor]  # log-probs of each sequence, routes, router logits [T, L, E]
Forward = Callable[..., Pass]  # (model, sequences, routes, **options)
Estimates = dict[str, Estimate]
SHARES = (0.01, 0.05, 0.15)  # of tokens that matched clips drop


@dataclass(frozen=True)
class Passes:
    """What four forward passes gave, at the scored tokens.

    Attributes:
        parts: log-probs [N].
        old_ids, new_ids: [N, L, K]. old_gates: [N, L, K]. old_logits, new_logits: [N, L, E] of the routers.
        old_routes, new_routes: of all tokens, those of the prompts included.
    """

    parts: Decomposition
    old_ids: Tensor
    new_ids: Tensor
    old_gates: Tensor | None
    old_logits: Tensor
    new_logits: Tensor
    old_routes: RoutingTrace
    new_routes: RoutingTrace

    @property
    def flipped(self) -> Tensor:
        """[N] some layer chose other experts."""
        return (overlap(self.old_ids, self.new_ids) < self.old_ids.shape[-1]).any(1)


@torch.no_grad()
def four_passes(forward: Forward, old: Any, new: Any, probe: Probe, old_pass: Pass | None = None) -> Passes:
    """Weights in {old, new} x routes in {old, new}; a dense model has no routes, so that z_r is 0.

    Args:
        old_pass: of the old weights on their own routes, where it is known already.
    """
    rows = probe.rows
    old_logprobs, old_trace, old_logits = old_pass or forward(old, probe.sequences, None)
    new_logprobs, new_trace, new_logits = forward(new, probe.sequences, None)
    new_on_old = forward(new, probe.sequences, old_trace)[0]
    old_on_new = forward(old, probe.sequences, new_trace)[0]
    each = (old_logprobs, new_logprobs, new_on_old, old_on_new)
    return Passes(
        Decomposition(*(probe.scored(logprobs).double() for logprobs in each)),
        old_trace.expert_ids[rows],
        new_trace.expert_ids[rows],
        None if old_trace.gates is None else old_trace.gates[rows],
        old_logits[rows],
        new_logits[rows],
        old_trace,
        new_trace,
    )


def exactly(value: float) -> Estimate:
    """A number that is no sample of anything."""
    return Estimate(float(value), float(value), float(value))


def prefixed(prefix: str, found: Estimates) -> Estimates:
    return {f"{prefix}/{name}": estimate for name, estimate in found.items()}


def compare(passes: Passes, probe: Probe, draws: int = 1000) -> Estimates:
    """All statistics of one pair of policies; intervals over prompts."""
    answers = probe.answers
    z, z_w, z_r = passes.parts.z, passes.parts.z_w, passes.parts.z_r
    found = estimates(decomposition_statistics(passes.parts, passes.flipped, answers), draws)
    found |= averaging({"z": z, "z_w": z_w, "z_r": z_r}, answers, draws)
    for routes, log_ratio in (("free", z), ("weights", z_w)):
        weights = log_weights(log_ratio, answers)
        found |= prefixed(f"ess/{routes}", estimates({k: ess(*pair) for k, pair in weights.items()}, draws))
    found |= routing(passes, answers, draws) | identities(passes.parts, answers)
    found |= prompt_flips(passes, probe)
    if probe.rewards is not None and probe.rewards.unique().numel() > 1:
        found |= clipping(z, z_w, answers.spread(probe.advantages), answers, draws)
    return found


def identities(of: Decomposition, answers: Answers) -> Estimates:
    """identity/..: by how much these answers break what is proved; anything beyond rounding is a bug.

    parts_abs_max: |z - z_w - z_r|. crossover_abs_max: the two sides of the identity behind chi by its definition,
    relative to the larger one. gate_bound_violations: answers beyond the bound on SAPO's mean gate.
    """
    z, z_w, z_r = of.z, of.z_w, of.z_r
    within, shared = answers.covariance_within, answers.mean(z_r).square()
    sides = (
        (answers.mean((z - z_w).square()), within(z_r, z_r) + shared),
        (answers.mean((answers.spread(answers.mean(z)) - z_w).square()), within(z_w, z_w) + shared),
    )
    worst = max(float(((a - b).abs() / torch.maximum(a, b).clamp_min(1e-20)).max()) for a, b in sides)
    gap, bound = gate_spread_bound(z, max(SAPO_TAU), answers)
    return {
        "identity/parts_abs_max": exactly((z - z_w - z_r).abs().max()),
        "identity/crossover_abs_max": exactly(worst),
        "identity/gate_bound_violations": exactly((gap > bound + 1e-12).sum()),
    }


def prompt_flips(passes: Passes, probe: Probe) -> Estimates:
    """flips/set_prompt: as `flips/set`, over the tokens of the prompts, which nobody sampled."""
    if passes.old_ids.shape[1] == 0:
        return {}
    scored = torch.zeros(len(passes.old_routes.expert_ids), dtype=torch.bool)
    scored[probe.rows] = True
    scored[passes.old_routes.cu_seqlens[1:] - 1] = True  # what follows the last token is not scored
    both = overlap(*(routes.expert_ids[~scored] for routes in (passes.old_routes, passes.new_routes)))
    return {"flips/set_prompt": exactly((both < passes.old_ids.shape[-1]).double().mean())} if both.numel() else {}


def averaging(log_ratios: dict[str, Tensor], answers: Answers, draws: int) -> Estimates:
    """inflation/NAME/n for n = 1, 2, 4 .. the median length, rho/NAME/lag, between/NAME.

    shared/N is the inflation of z_w over that of z_r at the largest n: above 1, what the weights do is more alike
    within an answer than what the flips do, and a mean over the answer removes more of the flips.
    """
    longest = int(answers.lengths.median())
    lengths = [2**i for i in range(longest.bit_length()) if 2**i <= longest]
    found: Estimates = {}
    for name, z in log_ratios.items():
        if z.any():
            curves = {f"inflation/{name}/{n}": inflation(z, answers, n) for n in lengths}
            curves |= {f"rho/{name}/{lag}": autocorrelation(z, answers, lag) for lag in lengths if lag < longest}
            found |= estimates(curves | {f"between/{name}": between_share(z, answers)}, draws)
    if "inflation/z_w/1" in found and "inflation/z_r/1" in found:
        n = lengths[-1]
        both = [inflation(log_ratios[name], answers, n) for name in ("z_w", "z_r")]
        found |= estimates({f"shared/{n}": joint(both, lambda v: v[..., 0] / v[..., 1])}, draws)
    return found


def routing(passes: Passes, answers: Answers, draws: int) -> Estimates:
    """flips/.., margins/.., router/..; nothing for a dense model."""
    old_ids, new_ids = passes.old_ids, passes.new_ids
    if old_ids.shape[1] == 0:
        return {}
    flips = flip_statistics(old_ids, new_ids, answers.token_prompts, passes.old_gates)
    found = prefixed("flips", estimates(flips, draws))
    if passes.old_logits.shape[-1] > old_ids.shape[-1]:
        report = asdict(margin_report(passes.old_logits, passes.new_logits, old_ids, new_ids))
        quantiles, deciles = report.pop("quantiles"), report.pop("flip_by_decile")
        found |= {f"margins/{name}": exactly(value) for name, value in report.items()}
        found |= {f"margins/quantile/{i / 10:g}": exactly(q) for i, q in enumerate(quantiles)}
        found |= {f"margins/flips_in_decile/{i + 1}": exactly(rate) for i, rate in enumerate(deciles)}
    return found | router(passes)


def router(passes: Passes) -> Estimates:
    """Health of the new router by layer, and its drift from the old one."""
    load = loads(passes.new_ids, passes.new_logits.shape[-1])
    drift = router_drift(passes.old_logits, passes.new_logits, passes.old_ids)
    gamma = drift.pop("gamma")
    by_layer = {f"load_{name}": values for name, values in load_health(load).items()}
    fitting = [ranks for ranks in (2, 4, 8) if load.shape[1] % ranks == 0]
    by_layer |= {f"ep{ranks}_max_over_mean": rank_imbalance(load, ranks) for ranks in fitting}
    by_layer |= drift | {"balance_loss": balance_loss(load, passes.new_logits)}
    found = {
        f"router/{name}/layer_{i}": exactly(value)
        for name, values in by_layer.items()
        for i, value in enumerate(values.tolist())
    }
    return found | {
        "router/gamma": exactly(gamma.mean()),
        "router/gamma_below_0.7": exactly((gamma < 0.7).float().mean()),
    }


def clipping(z: Tensor, z_w: Tensor, advantages: Tensor, answers: Answers, draws: int) -> Estimates:
    """clip/..: the usual token clip, SAPO's gate, GSPO's clip as published, and token and sequence clips of equal share
    with the gap between their toggles; `advantages` [N]."""
    ratio, ratio_w = z.exp(), z_w.exp()
    statistics = clip_statistics("token_0.2", ratio, ratio_w, advantages, answers, *TOKEN_CLIP)
    statistics |= gate_statistics(z, advantages, answers)
    sequence, sequence_w = (coefficients("GSPO", x, advantages, answers) for x in (z, z_w))
    statistics |= clip_statistics("GSPO_published", sequence, sequence_w, advantages, answers, *GSPO_CLIP)
    found: Estimates = {}
    for share in SHARES:
        pairs = {"token": (ratio, ratio_w), "sequence": (sequence, sequence_w)}
        for name, (free, weights) in pairs.items():
            width = matched_width(free, advantages, share)
            label = f"matched_{share:g}/{name}"
            found[f"clip/{label}/width"] = exactly(width)
            statistics |= clip_statistics(label, free, weights, advantages, answers, width, width)
        toggled = [statistics[f"matched_{share:g}/{name}/toggled"] for name in pairs]
        statistics[f"matched_{share:g}/toggled_gap"] = joint(toggled, lambda v: v[..., 0] - v[..., 1])
    return found | prefixed("clip", estimates(statistics, draws))


@torch.no_grad()
def noise_floor(forward: Forward, model: Any, probe: Probe, routes: RoutingTrace, logprobs: Tensor) -> Estimates:
    """The same weights twice more: cut into other chunks, which says what counts as no difference, and on their own
    routes replayed, which must change no bit.

    Args:
        routes, logprobs: of the first pass, [N] the latter.
    """
    again, trace, _ = forward(model, probe.sequences, None, chunk_tokens=512)
    replayed = forward(model, probe.sequences, routes)[0]
    d = probe.scored(again).double() - logprobs
    changed = (overlap(routes.expert_ids, trace.expert_ids) < trace.expert_ids.shape[-1]).double()
    return {
        "floor/abs_max": exactly(d.abs().max()),
        "floor/var_z": exactly(d.var(correction=0)),
        "floor/flips_set": exactly(changed.mean() if changed.numel() else 0.0),
        "identity/own_replay_abs_max": exactly((probe.scored(replayed).double() - logprobs).abs().max()),
    }


def by_update(found: Sequence[Estimates]) -> Estimates:
    """The last of several policies under plain names, and all of them as update/k/NAME, k = 1, 2, .."""
    merged = dict(found[-1])
    if len(found) > 1:
        for k, one in enumerate(found, 1):
            merged |= prefixed(f"update/{k}", one)
    return merged
