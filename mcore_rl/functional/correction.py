"""Weights against the mismatch between trainer and rollout engine, rho = pi_old / mu. Never differentiated.

Names say what is truncated or masked and at which level, because the same words mean different things elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcore_rl.functional.policy import sequence_mean, sequence_sum

# kind -> the bounds (low, high) it is published or commonly used with
CORRECTIONS = {
    "none": (0.0, float("inf")),
    "tis_token": (0.0, 2.0),
    "icepop_token": (0.5, 5.0),
    "mask_seq_geo": (0.999, 1.002),
    "tis_seq_geo": (0.0, 2.0),
    "mask_seq_product": (0.0, 3.0),
    "tis_seq_product": (0.0, 3.0),
}


def correction_weights(
    log_rho: Tensor, mask: Tensor, segment_ids: Tensor, *, kind: str, low: float, high: float
) -> Tensor:
    """A weight for every token's policy-gradient term.

    Only the product with high = inf is unbiased: it is the likelihood ratio of the whole response.

    Args:
        log_rho: [T] log pi_old - log mu, 0 where `mask` is False.
        mask: [T] bool. segment_ids: [T] int64, a segment lies whole in this batch.
        kind: none 1; tis_token min(rho, high) (Yao et al. 2025); icepop_token rho where low <= rho <= high, else 0
            (Ring-1T, arXiv 2510.18855); *_seq_geo the same with the geometric mean of a sequence's rho for rho,
            *_seq_product with its product; tis truncates at `high`, mask zeroes outside [low, high] and keeps weight 1
            inside.

    Returns:
        [T], detached.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"correction={kind!r}: allowed are {', '.join(CORRECTIONS)}")
    log_rho = log_rho.detach()
    if kind == "none":
        return torch.ones_like(log_rho)
    if kind.endswith("_geo"):
        log_rho = sequence_mean(log_rho, mask, segment_ids)
    elif kind.endswith("_product"):
        log_rho = sequence_sum(log_rho, segment_ids)
    rho = log_rho.exp()
    if kind.startswith("tis"):
        return rho.clamp(max=high)
    inside = (rho >= low) & (rho <= high)
    return torch.where(inside, rho if kind == "icepop_token" else 1.0, 0.0)
