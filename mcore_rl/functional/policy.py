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


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, Schulman et al. 2017, eq. 7).

    Args:
        dual_clip: c > 1 bounds the loss of a negative advantage by c |A|, however large r grows (Ye et al. 2020,
            eq. 5); 0 is off.
    """
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip == 0:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def clipped_token_loss(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """`clipped_surrogate` of each token's own ratio, and its metrics [T]."""
    ratio = log_ratio.exp()
    loss = clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
    metrics = {
        "policy/ratio_mean": ratio,
        "policy/clip_frac": is_clipped(ratio, advantages, clip_low, clip_high).to(loss.dtype),
        "policy/kl_old": ratio - 1 - log_ratio,
    }
    if dual_clip > 0:
        metrics["policy/dual_clip_frac"] = ((advantages < 0) & (ratio > dual_clip)).to(loss.dtype)
    return loss, metrics


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


def kl_loss(log_ratio_ref: Tensor, log_ratio_old: Tensor, estimator: str) -> Tensor:
    """A term for each token sampled from pi_old whose expected gradient is that of KL(pi || ref).

    The weight pi / pi_old, 1 in value on policy, turns the estimators' gradients into the right one: without it k1 has
    none and k3 that of the forward KL. It is differentiated with k1 and k3; k2, whose own gradient is right already,
    only takes its value. Without a step since pi_old the value is the plain estimate.

    Args:
        log_ratio_ref: [T] log pi - log pi_ref. log_ratio_old: [T] log pi - log pi_old.
    """
    weight = log_ratio_old.exp()
    return (weight.detach() if estimator == "k2" else weight) * kl_estimate(log_ratio_ref, estimator)


def segment_sums(x: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """[S] sum of x [T] over each segment."""
    return x.new_zeros(num_segments).index_add(0, segment_ids, x)


def sequence_sum(x: Tensor, segment_ids: Tensor) -> Tensor:
    """Sum of x [T] over each segment, given back to each of its tokens, [T]."""
    num_segments = int(segment_ids[-1]) + 1 if segment_ids.numel() else 0
    return segment_sums(x, segment_ids, num_segments)[segment_ids]


def sequence_mean(x: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    """Mean of x over the masked-in tokens of each segment, given back to each of its tokens.

    Args:
        x: [T], 0 where `mask` is False.
        mask: [T] bool.
        segment_ids: [T] int64, a segment lies whole in this batch.

    Returns:
        [T]; 0 for a segment without tokens.
    """
    return sequence_sum(x, segment_ids) / sequence_sum(mask.to(x.dtype), segment_ids).clamp(min=1)
