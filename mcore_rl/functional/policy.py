"""Per-token terms of policy-gradient losses. All tensors are [T]; results are to be minimised."""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")


def masked_log_ratio(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_reference) where `mask`, 0 elsewhere.

    The mask is applied to the inputs: whatever stands at a masked position, NaN included, reaches neither the value
    nor the gradient.
    """
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, reference, 0.0)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, Schulman et al. 2017, eq. 7)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def is_clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """[T] bool: tokens whose gradient the clip removes (only the side that the advantage pushes towards)."""
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    """Estimators of KL(pi || ref) from D = log pi - log ref of tokens sampled from pi (Schulman 2020).

    k1 = D is unbiased with zero expected gradient when used as a loss; k2 = D^2/2 has the gradient of KL(pi || ref);
    k3 = exp(-D) - 1 + D is unbiased and never negative, with the gradient of the forward KL(ref || pi).

    Raises:
        ValueError: unknown estimator.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator={estimator!r}: allowed are {', '.join(KL_ESTIMATORS)}")


def sequence_mean(x: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    """Mean of x over the masked-in tokens of each segment, given back to each of its tokens.

    Args:
        x: [T], 0 where `mask` is False.
        mask: [T] bool.
        segment_ids: [T] int64, a segment lies whole in this batch.

    Returns:
        [T]; 0 for a segment without tokens.
    """
    segments = int(segment_ids[-1]) + 1 if segment_ids.numel() else 0
    zeros = x.new_zeros(segments)
    total = zeros.index_add(0, segment_ids, x)
    count = zeros.index_add(0, segment_ids, mask.to(x.dtype))
    return (total / count.clamp(min=1))[segment_ids]
