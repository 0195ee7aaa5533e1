"""One batch under every objective: how much of it counts, and how noisy and how biased its gradient is.

Every objective weighs the same log-probs by its own coefficients, so one graph of log-probs serves all of them. Router
noise says how much of a gradient hangs on which experts a token happened to take: it is added to the router logits of
the new policy, in the ratio alone ("noise") or also in the pass that is differentiated ("noise_all").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.measure.compare import Estimates, Forward
from moe.measure.gradients import PolicyGraph, noisy_routes, quadratic_estimate
from moe.measure.objectives import (
    COEFFICIENTS,
    GSPO_CLIP,
    Coefficient,
    coefficients,
    gspo_clipped,
    matched_width,
    token_clipped,
    token_weights,
)
from moe.measure.probe import Probe
from moe.measure.stats import Answers, Statistic, estimates, ratio_of, stack
from moe.record.trace import RoutingTrace

SIGMAS = (0.1, 1.0)  # standard deviations of the noise on router logits
MATCHED = 0.05  # share of tokens that the matched clips drop
BASE, AVERAGED = "token", "GSPO"  # the ratio without a clip, and its mean over an answer
Told = Callable[[str], None]


@dataclass(frozen=True)
class Batch:
    """Answers of the old policy, scored by both.

    Attributes:
        probe: sequences of one prompt follow each other.
        old: [N] log-probs before. z: [N] log-ratio of new to old. advantages: [N].
        routes: of the new policy, all tokens. logits: of its routers [T, L, E].
    """

    probe: Probe
    old: Tensor
    z: Tensor
    advantages: Tensor
    routes: RoutingTrace
    logits: Tensor

    def noisy(self, sigma: float, seed: int) -> RoutingTrace:
        """The routes after normal noise on the router logits."""
        top_k = self.routes.expert_ids.shape[-1]
        ids = noisy_routes(self.logits, top_k, sigma, torch.Generator().manual_seed(seed))
        return RoutingTrace(ids, None, None, self.routes.num_experts, self.routes.cu_seqlens)


@torch.no_grad()
def batch_of(forward: Forward, old: Any, new: Any, probe: Probe) -> Batch:
    """Raises ValueError where there are no rewards, or no prompt with different ones."""
    advantages = probe.answers.spread(probe.advantages)
    before = probe.scored(forward(old, probe.sequences, None)[0]).double()
    after, routes, logits = forward(new, probe.sequences, None)
    return Batch(probe, before, probe.scored(after).double() - before, advantages, routes, logits)


def objectives_of(batch: Batch) -> dict[str, Coefficient]:
    """Every objective by name, and clips of token and sequence ratio so wide that they drop equally many tokens."""
    sequence = coefficients(AVERAGED, batch.z, batch.advantages, batch.probe.answers)
    wide, narrow = (matched_width(r, batch.advantages, MATCHED) for r in (batch.z.exp(), sequence))
    return COEFFICIENTS | {
        "GSPO, published clip": gspo_clipped(*GSPO_CLIP),
        "token, matched clip": token_clipped(wide, wide),
        "GSPO, matched clip": gspo_clipped(narrow, narrow),
    }


def usage(batch: Batch, named: Mapping[str, Coefficient], draws: int) -> Estimates:
    """objectives/NAME/ess of the coefficients as weights (dropped tokens weigh 0), /used: sum |c A| / sum |A|, and
    /dropped: share of the tokens with an advantage whose coefficient is 0."""
    answers, size = batch.probe.answers, batch.advantages.abs()
    prompts, active = answers.token_prompts, (size > 0).double()
    found = {}
    for name, coefficient in named.items():
        c = coefficient(batch.z, batch.advantages, answers)
        found[f"objectives/{name}/used"] = ratio_of(c * size, size, prompts)
        found[f"objectives/{name}/dropped"] = ratio_of((c == 0) * active, active, prompts)
        terms = stack(torch.ones_like(c), c, c.square())
        found[f"objectives/{name}/ess"] = Statistic(terms, prompts, _ess)
    return estimates(found, draws)


def _ess(s: Tensor) -> Tensor:
    return s[..., 1].square() / (s[..., 0] * s[..., 2])


# ---------------------------------------------------------------- gradients


def graph_of(
    forward: Forward, model: Any, probe: Probe, routes: RoutingTrace | None, parameters: Sequence[Tensor]
) -> PolicyGraph:
    """Log-probs with their graph, one graph a prompt, in the order of the probe."""
    logprobs = []
    for keep in _groups(probe):
        part = probe.subset(keep)
        mine = None if routes is None else _routes_of(routes, keep)
        logprobs.append(part.scored(forward(model, part.sequences, mine)[0]))
    return PolicyGraph(logprobs, parameters)


def _groups(probe: Probe) -> list[list[int]]:
    ids = probe.prompt_ids
    if (ids.diff() < 0).any():
        raise ValueError("the answers to one prompt must follow each other, and prompts be numbered in order")
    return [(ids == prompt).nonzero()[:, 0].tolist() for prompt in ids.unique()]


def _routes_of(routes: RoutingTrace, keep: Sequence[int]) -> RoutingTrace:
    start, end = routes.cu_seqlens[keep[0]], routes.cu_seqlens[keep[-1] + 1]
    bounds = routes.cu_seqlens[keep[0] : keep[-1] + 2] - start
    return RoutingTrace(routes.expert_ids[start:end], None, None, routes.num_experts, bounds)


def rows_of(graph: PolicyGraph, c: Tensor, answers: Answers, keep: Tensor | None = None) -> Tensor:
    """[B, P]: the gradient of each prompt's answers, scaled to estimate the whole.

    Args:
        c: [N] coefficients times advantages. keep: [N] bool, cuts answers short.
    """
    weights = token_weights(answers)
    if keep is not None:
        weights = answers.spread(1 / answers.sum(keep.double())) / len(answers.prompt_ids) * keep
    rows = graph.gradients(weights * c)
    return rows * len(rows)


def norm_ratio(draws: int, *grams: Tensor):
    """|mean of the first rows| / |mean of the second|, over the same of a third and fourth where given."""

    def finish(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        norms = [whole.clamp_min(0).sqrt() for whole, _ in pairs]
        first = norms[0] / norms[1]
        return first / (norms[2] / norms[3]) if len(norms) == 4 else first

    return quadratic_estimate(grams, finish, draws)


def gradient_estimates(
    forward: Forward,
    new: Any,
    batch: Batch,
    named: Mapping[str, Coefficient],
    parameters: Sequence[Tensor],
    *,
    fresh: Probe | None = None,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 1000,
    seed: int = 0,
    told: Told = lambda what: None,
) -> Estimates:
    """Noise, and bias where there are fresh answers, of every objective's gradient on this batch.

    Names begin with objectives/NAME. noise/SIGMA: |g noisy - g| / |g| with noise in the ratio alone; noise_vs_token/
    SIGMA: the same over the token ratio's; noise_all: with the first noise in the differentiated pass too. bias2:
    |E g - E g*|^2 / |E g*|^2, unbiased, so that it may be below 0 (NaN where g* is lost in its noise); cosine to g*;
    snr: |E g|^2 over the variance of its estimate. g* is the gradient of fresh answers of the new policy, without a
    ratio. reference/noise2: its variance over |E g*|^2. reference/ceiling: the cosine of a gradient without error.
    And `averaging_law`.

    Args:
        fresh: answers of the new policy to the same prompts in the same order, with rewards.

    Raises:
        ValueError: fresh answers to another number of prompts, or whose rewards do not differ.
    """
    answers, advantages = batch.probe.answers, batch.advantages
    clean = graph_of(forward, new, batch.probe, None, parameters)
    found: Estimates = {}
    if fresh is not None:
        reference = _reference(forward, new, fresh, parameters, len(clean.logprobs))
        found |= _of_reference(reference, draws)
    if batch.routes.expert_ids.shape[1] == 0:
        sigmas = ()  # no router, no noise
    shaken = [_shaken(forward, new, batch, sigma, seed + i, parameters) for i, sigma in enumerate(sigmas)]
    base: dict[float, tuple[Tensor, Tensor]] = {}
    for name in sorted(named, key=lambda name: name != BASE):
        told(f"gradient of {name}")
        label = f"objectives/{name}"
        c = named[name](batch.z, advantages, answers) * advantages
        rows = rows_of(clean, c, answers)
        size = rows @ rows.T
        if fresh is not None:
            found |= {f"{label}/{k}": e for k, e in _against(rows, reference, draws).items()}
        for i, (sigma, (graph, z)) in enumerate(zip(sigmas, shaken)):
            c_noisy = named[name](z, advantages, answers) * advantages
            change = rows_of(clean, c_noisy - c, answers)
            noise = change @ change.T
            base.setdefault(sigma, (noise, size))
            found[f"{label}/noise/{sigma:g}"] = norm_ratio(draws, noise, size)
            found[f"{label}/noise_vs_token/{sigma:g}"] = norm_ratio(draws, noise, size, *base[sigma])
            if i == 0:
                moved = rows_of(graph, c_noisy, answers) - rows
                found[f"{label}/noise_all/{sigma:g}"] = norm_ratio(draws, moved @ moved.T, size)
    return found | (averaging_law(clean, batch, named, shaken[0][1], draws) if shaken else {})


def _shaken(
    forward: Forward, new: Any, batch: Batch, sigma: float, seed: int, parameters: Sequence[Tensor]
) -> tuple[PolicyGraph, Tensor]:
    """Graph and log-ratios on noisy routes."""
    graph = graph_of(forward, new, batch.probe, batch.noisy(sigma, seed), parameters)
    return graph, torch.cat([x.detach().double() for x in graph.logprobs]) - batch.old


def _reference(forward: Forward, new: Any, fresh: Probe, parameters: Sequence[Tensor], num_prompts: int) -> Tensor:
    graph = graph_of(forward, new, fresh, None, parameters)
    if len(graph.logprobs) != num_prompts:
        raise ValueError(f"{len(graph.logprobs)} prompts in the reference, {num_prompts} in the batch")
    return rows_of(graph, fresh.answers.spread(fresh.advantages), fresh.answers)


def _of_reference(rows: Tensor, draws: int) -> Estimates:
    truth = rows @ rows.T
    return {
        "reference/noise2": quadratic_estimate([truth], lambda p: (p[0][0] - p[0][1]) / _positive(p[0][1]), draws),
        "reference/ceiling": quadratic_estimate([truth], lambda p: (p[0][1].clamp_min(0) / p[0][0]).sqrt(), draws),
    }


def _positive(squared: Tensor) -> Tensor:
    """An unbiased estimate of a squared norm, NaN where it is not above 0: nothing can be measured in units of it."""
    return torch.where(squared > 0, squared, torch.nan)


def _against(rows: Tensor, reference: Tensor, draws: int) -> Estimates:
    apart, own, truth = (x @ x.T for x in (rows - reference, rows, reference))
    both = rows @ reference.T
    return {
        "bias2": quadratic_estimate([apart, truth], lambda p: p[0][1] / _positive(p[1][1]), draws),
        "cosine": quadratic_estimate([both, own, truth], lambda p: p[0][0] / (p[1][0] * p[2][0]).sqrt(), draws),
        "snr": quadratic_estimate([own], lambda p: p[0][1] / (p[0][0] - p[0][1]), draws),
    }


def averaging_law(
    graph: PolicyGraph, batch: Batch, named: Mapping[str, Coefficient], z_noisy: Tensor, draws: int
) -> Estimates:
    """length/n and length/slope; independent jumps give n^-1/2."""
    answers = batch.probe.answers
    longest = int(answers.lengths.median())
    lengths = [2**i for i in range(longest.bit_length()) if 2**i <= longest]
    grams: list[Tensor] = []
    found: Estimates = {}
    for n in lengths:
        keep = answers.positions < n
        tokens = keep.nonzero()[:, 0]
        cut = Answers(answers.answer_ids[tokens], answers.prompt_ids)
        of_length = []
        for name in (AVERAGED, BASE):
            c = [torch.zeros_like(batch.z) for _ in range(2)]
            for target, z in zip(c, (batch.z, z_noisy)):
                advantages = batch.advantages[tokens]
                target[tokens] = named[name](z[tokens], advantages, cut) * advantages
            rows, change = (rows_of(graph, x, answers, keep) for x in (c[0], c[1] - c[0]))
            of_length += [change @ change.T, rows @ rows.T]
        found[f"length/{n}"] = norm_ratio(draws, *of_length)
        grams += of_length
    if len(lengths) >= 3:
        found["length/slope"] = quadratic_estimate(grams, lambda pairs: _slope(pairs, lengths), draws)
    return found


def _slope(pairs: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int]) -> Tensor:
    x = torch.tensor(lengths, dtype=torch.float64).log()
    x = x - x.mean()
    norms = torch.stack([whole.clamp_min(0).log() / 2 for whole, _ in pairs], -1).unflatten(-1, (-1, 4))
    y = norms[..., 0] - norms[..., 1] - norms[..., 2] + norms[..., 3]
    return (y * x).sum(-1) / x.square().sum()
