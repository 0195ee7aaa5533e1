"""Weights against the mismatch between trainer and rollout engine, rho = pi_old / mu. Never differentiated.

Names say what is truncated or masked and at which level, because the same words mean different things elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcore_rl.functional.policy import sequence_mean

CORRECTIONS = (
    "none",
    "tis_token",
    "icepop_token",
    "mask_seq_geo",
    "tis_seq_geo",
    "mask_seq_product",
    "tis_seq_product",
)


def correction_weights(
    log_rho: Tensor, mask: Tensor, segment_ids: Tensor, *, kind: str, low: float, high: float
) -> Tensor:
    """A weight for every token's policy-gradient term.

    Args:
        log_rho: [T] log pi_old - log mu, 0 where `mask` is False.
        mask: [T] bool. segment_ids: [T] int64.
        kind: none 1; tis_token min(rho, high); icepop_token rho where low <= rho <= high, else 0 (Ring-1T,
            arXiv 2510.18855); *_seq_geo the same with the geometric mean of a sequence's rho for rho, *_seq_product
            with its product; tis truncates at `high`, mask zeroes outside [low, high] and keeps weight 1 inside.

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
    if "_seq_" in kind:
        mean = sequence_mean(log_rho, mask, segment_ids)
        count = sequence_mean(mask.to(log_rho.dtype), torch.ones_like(mask), segment_ids)
        lengths = count * torch.bincount(segment_ids)[segment_ids]
        log_rho = mean if kind.endswith("geo") else mean * lengths
    rho = log_rho.exp()
    inside = (rho >= low) & (rho <= high)
    if kind.startswith("tis"):
        return rho.clamp(max=high)
    return torch.where(inside, rho if kind == "icepop_token" else 1.0, 0.0)
