"""Per-token loss of a critic."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) (Schulman et al., code of PPO, 2017).

    Args:
        values, old_values, returns: [T]; the old ones are the critic's before the step.
        clip: 0 leaves the squared error.

    Returns:
        (loss [T], [T] bool of tokens whose gradient the clip removes).
    """
    error = (values - returns).square()
    if clip == 0:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    near_error = (near - returns).square()
    return 0.5 * torch.maximum(error, near_error), (near != values) & (near_error > error)


def explained_variance(error_mean: Tensor, error_square: Tensor, return_mean: Tensor, return_square: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) from the means and mean squares of R - V and R over a batch; at most 1, 0 for V constant.

    0 where the returns do not vary.
    """
    variance = return_square - return_mean.square()
    residual = error_square - error_mean.square()
    return torch.where(variance > 0, 1 - residual / torch.where(variance > 0, variance, 1.0), 0.0)
