"""From rewards to advantages."""

from __future__ import annotations

from torch import Tensor


def group_advantages(rewards: Tensor, *, normalise_std: bool = True, ddof: int = 0, eps: float = 1e-6) -> Tensor:
    """(R - mean) / (std + eps) within one prompt's responses (GRPO, Shao et al. 2024, section 4.1.2).

    Args:
        rewards: [G].
        normalise_std: False leaves R - mean (Dr.GRPO, Liu et al. 2025).
        ddof: 0 population, 1 Bessel's correction.
        eps: added to the standard deviation.

    Returns:
        [G] of the rewards' dtype; all zero where all rewards are equal.
    """
    centred = rewards - rewards.mean()
    if not normalise_std:
        return centred
    variance = centred.square().sum() / max(len(rewards) - ddof, 1)
    return centred / (variance.sqrt() + eps)
