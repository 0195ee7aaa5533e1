"""Which experts changed, how near to changing they were, and how evenly they are used.

Expert ids are [N, L, K] (token, router layer, chosen expert), router logits [N, L, E]. Chosen experts are compared as
sets: their order is no part of the model's function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.measure.stats import Statistic, mean_of, ratio_of, stack


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """[N, L] experts chosen both times, 0 .. K."""
    return (old[..., :, None] == new[..., None, :]).any(-1).sum(-1)


def flip_statistics(old: Tensor, new: Tensor, prompts: Tensor, old_gates: Tensor | None = None) -> dict[str, Statistic]:
    """The definitions of "routing changed" that are in use, and per layer.

    Returns:
        expert: share of chosen experts replaced. set: share of (token, layer) whose set changed. token_any: share of
        tokens with a change in some layer. layers_per_token: layers changed, a token. jaccard: mean of |both| / |any|.
        gate_mass: gate weight of the experts that left, of what there was (only with `old_gates` [N, L, K]).
        token_any_independent: what token_any would be were layers independent. set/layer_I: `set` of layer I.
        Nothing for a dense model, whose ids are [N, 0, K].
    """
    if old.shape[1] == 0:
        return {}
    chosen = old.shape[-1]
    both = overlap(old, new).double()
    flipped = (both < chosen).double()
    layers = flipped.shape[1]
    by_layer = stack(torch.ones(len(old)), *flipped.unbind(1))
    statistics = {
        "expert": mean_of((1 - both / chosen).mean(1), prompts),
        "set": mean_of(flipped.mean(1), prompts),
        "token_any": mean_of(flipped.amax(1), prompts),
        "layers_per_token": mean_of(flipped.sum(1), prompts),
        "jaccard": mean_of((both / (2 * chosen - both)).mean(1), prompts),
        "token_any_independent": Statistic(by_layer, prompts, lambda s: 1 - (1 - s[..., 1:] / s[..., :1]).prod(-1)),
        **{f"set/layer_{i}": mean_of(flipped[:, i], prompts) for i in range(layers)},
    }
    if old_gates is not None:
        left = (old[..., :, None] != new[..., None, :]).all(-1)
        lost, total = (old_gates * left).double().sum((1, 2)), old_gates.double().sum((1, 2))
        statistics["gate_mass"] = ratio_of(lost, total, prompts)
    return statistics


# ---------------------------------------------------------------- margins


@dataclass(frozen=True)
class MarginReport:
    """Margins of the old router against the changes of its logits, over all (token, layer).

    Theorem: while every logit moves by less than half the margin, the chosen set stays.

    Attributes:
        violations: cases that break the theorem; anything but 0 is a bug of the recording.
        explained: share of the unchanged sets that the theorem explains; the bound is sufficient, not necessary.
        flip_rate: share of sets that changed.
        predicted: share where the old last-chosen and first-rejected expert changed places.
        linear: small-step law, density of the margin at 0 times the mean closing of the gap.
        quantiles: of the margin at 0, 10, .. 100%.
        flip_by_decile: flip rate within each tenth of the margins, smallest first.
    """

    violations: int
    explained: float
    flip_rate: float
    predicted: float
    linear: float
    quantiles: tuple[float, ...]
    flip_by_decile: tuple[float, ...]


def margin_report(old: Tensor, new: Tensor, old_ids: Tensor, new_ids: Tensor) -> MarginReport:
    """Compare router logits [N, L, E] and recorded routes [N, L, K] of the same tokens before and after a change.

    Raises:
        ValueError: every expert is always chosen, so that there is no margin.
    """
    top_k = old_ids.shape[-1]
    if old.shape[-1] <= top_k:
        raise ValueError(f"{old.shape[-1]} experts and top-{top_k}: every expert is chosen and no route can change")
    old, new = old.double(), new.double()
    order = old.topk(top_k + 1, dim=-1).indices
    flipped = overlap(old_ids, new_ids) < top_k
    gaps = [x.gather(-1, order[..., -2:]) for x in (old, new)]
    margin, gap_after = (gap[..., 0] - gap[..., 1] for gap in gaps)
    safe = (new - old).abs().amax(-1) < margin / 2
    deciles = margin.flatten().quantile(torch.linspace(0, 1, 11, dtype=torch.float64))
    which = torch.bucketize(margin, deciles[1:-1])
    near = margin.flatten().quantile(0.05)
    closing = (margin - gap_after).clamp_min(0).mean()
    return MarginReport(
        violations=int((flipped & safe).sum()),
        explained=float((safe & ~flipped).sum() / (~flipped).sum().clamp_min(1)),
        flip_rate=float(flipped.double().mean()),
        predicted=float((gap_after < 0).double().mean()),
        linear=float(0.05 / near * closing),
        quantiles=tuple(deciles.tolist()),
        flip_by_decile=tuple(float(flipped[which == i].double().mean()) for i in range(10)),
    )


# ---------------------------------------------------------------- health of the router


def loads(expert_ids: Tensor, num_experts: int) -> Tensor:
    """[L, E] share of the chosen slots each expert takes; a row sums to 1."""
    layers = expert_ids.shape[1]
    flat = (expert_ids.long() + num_experts * torch.arange(layers)[None, :, None]).flatten()
    counts = torch.bincount(flat, minlength=layers * num_experts).view(layers, num_experts).double()
    return counts / counts.sum(1, keepdim=True)


def load_health(load: Tensor) -> dict[str, Tensor]:
    """By layer [L], from loads [L, E]: cv (std / mean), max_over_mean, min_over_mean, dead (share of experts without
    tokens), entropy (of the load over that of an even one, 1 is even)."""
    mean = 1 / load.shape[1]
    return {
        "cv": load.std(1, correction=0) / mean,
        "max_over_mean": load.amax(1) / mean,
        "min_over_mean": load.amin(1) / mean,
        "dead": (load == 0).double().mean(1),
        "entropy": torch.special.entr(load).sum(1) / torch.tensor(load.shape[1], dtype=load.dtype).log(),
    }


def rank_imbalance(load: Tensor, ranks: int) -> Tensor:
    """[L] tokens of the fullest expert-parallel rank over those of the mean one, from loads [L, E], when neighbouring
    experts share a rank: a step waits for the fullest."""
    return load.view(len(load), ranks, -1).sum(-1).amax(-1) * ranks


def router_shift(old: Tensor, new: Tensor) -> Tensor:
    """RSPO's gamma [N] = exp(-mean over layers and experts |new - old|), from log-probs [N, L, K] that the router gave
    to the experts chosen before the change (arXiv 2510.23027). 1 where nothing moved."""
    return (-(new - old).abs().mean((1, 2))).exp()


def router_drift(old: Tensor, new: Tensor, old_ids: Tensor) -> dict[str, Tensor]:
    """By layer [L], from router logits [N, L, E]: entropy of the router's distribution (new), KL(old || new), its
    z-loss mean logsumexp^2 (new); and gamma [N], see `router_shift`."""
    log_old, log_new = old.double().log_softmax(-1), new.double().log_softmax(-1)
    chosen = [x.gather(-1, old_ids.long()) for x in (log_old, log_new)]
    return {
        "entropy": -(log_new.exp() * log_new).sum(-1).mean(0),
        "kl": (log_old.exp() * (log_old - log_new)).sum(-1).mean(0),
        "z_loss": new.double().logsumexp(-1).square().mean(0),
        "gamma": router_shift(*chosen),
    }


def balance_loss(load: Tensor, logits: Tensor) -> Tensor:
    """[L] E sum_e f_e P_e with load f and mean router probability P: 1 when both are even (arXiv 2101.03961, eq. 4)."""
    return load.shape[1] * (load * logits.double().softmax(-1).mean(0)).sum(-1)
