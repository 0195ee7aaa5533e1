"""Gradients of the objectives on one batch: noise, bias against an on-policy reference, sensitivity to router noise.

A gradient is kept as one row a group of prompts [B, P]; the gradient of the batch is the sum of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.measure.stats import Estimate, resample


@dataclass(frozen=True)
class PolicyGraph:
    """Log-probs of the batch with their graphs, one graph a group of prompts.

    Attributes:
        logprobs: B tensors, together the N scored tokens in order.
        parameters: what is differentiated.
    """

    logprobs: Sequence[Tensor]
    parameters: Sequence[Tensor]

    def gradients(self, coefficients: Tensor) -> Tensor:
        """[B, P] rows sum_t coefficients_t grad log p_t, from coefficients [N]."""
        sizes = [len(group) for group in self.logprobs]
        rows = []
        for group, c in zip(self.logprobs, coefficients.split(sizes)):
            parts = torch.autograd.grad(group, self.parameters, c.to(group.dtype), retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, self.parameters)]
            rows.append(torch.cat([g.flatten() for g in parts]))
        return torch.stack(rows)

    def gradient(self, coefficients: Tensor) -> Tensor:
        """[P] of the whole batch."""
        return self.gradients(coefficients).sum(0)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def relative_change(clean: Tensor, change: Tensor) -> float:
    """|change| / |clean|."""
    return float(change.norm() / clean.norm())


def noise_trace(rows: Tensor) -> float:
    """Trace of the covariance of a group's gradient, from rows [B, P] of equal-sized groups, each scaled to be an
    estimate of the whole: sum_b |g_b - mean|^2 / (B - 1)."""
    return float((rows - rows.mean(0)).square().sum() / (len(rows) - 1))


def signal_to_noise(rows: Tensor) -> float:
    """(|mean|^2 - tr / B) / (tr / B): the squared true gradient over the variance of its estimate from B groups."""
    noise = noise_trace(rows) / len(rows)
    return (float(rows.mean(0).square().sum()) - noise) / noise


def squared_bias(rows: Tensor, reference: Tensor) -> float:
    """Unbiased estimate of |E g - E reference|^2 from rows [B, P] and [C, P], each an estimate of the whole.

    Both are halved and the differences of the halves multiplied, since the square of one difference would be inflated
    by noise; averaged over the two ways to pair the halves. May be negative where there is no bias.
    """
    a, b = (half.mean(0) for half in rows.tensor_split(2))
    c, d = (half.mean(0) for half in reference.tensor_split(2))
    return float(((a - c) @ (b - d) + (a - d) @ (b - c)) / 2)


def noise_ceiling(reference: Tensor) -> float:
    """Cosine between two halves of the reference: what even a perfect estimator of its size would reach."""
    return cosine(*(half.mean(0) for half in reference.tensor_split(2)))


def quadratic_estimate(
    grams: Sequence[Tensor],
    finish: Callable[[list[tuple[Tensor, Tensor]]], Tensor],
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A function of inner products of gradients, with its bootstrap interval over the groups of prompts.

    Args:
        grams: matrices [B, B] of inner products a_i . b_j of rows that each estimate a whole gradient.
        finish: takes (of the means, of distinct groups) for every matrix: the inner product of the two means, and its
            unbiased estimate, which leaves out a group's product with itself.

    Where more than 5% of the resamples have no value, as when a squared gradient is estimated to be negative, there is
    no interval: noise decides.
    """
    num_groups = len(grams[0])
    counts = torch.cat([torch.ones(1, num_groups, dtype=torch.float64), resample(num_groups, draws, seed)])
    pairs = []
    for gram in grams:
        gram = gram.double()
        total = torch.einsum("di,ij,dj->d", counts, gram, counts)
        itself = counts.square() @ gram.diagonal()
        size, repeats = num_groups**2, counts.square().sum(1)
        pairs.append((total / size, (total - itself) / (size - repeats)))
    values = finish(pairs)
    resampled = values[1:][values[1:].isfinite()]
    if len(resampled) < 0.95 * draws:
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(values[0]), low, high)


def noisy_routes(logits: Tensor, top_k: int, sigma: float, generator: torch.Generator) -> Tensor:
    """[T, L, K] the experts chosen after normal noise of standard deviation `sigma` on the router logits [T, L, E]."""
    noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    return (logits + sigma * noise).topk(top_k, dim=-1).indices
