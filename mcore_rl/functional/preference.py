"""Losses on preference pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PREFERENCE_LOSSES = ("sigmoid", "cdpo", "robust", "hinge", "ipo")


def preference_loss(margins: Tensor, kind: str, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair from its margin Delta = log(pi / ref)(chosen) - log(pi / ref)(rejected); h = beta * Delta.

    Args:
        margins: [P].
        kind: sigmoid, -log sigma(h) (DPO, Rafailov et al. 2023, eq. 7); with e = `label_smoothing`, cdpo,
            -(1-e) log sigma(h) - e log sigma(-h) (Mitchell 2023), stationary at sigma(h) = 1 - e; robust,
            (-(1-e) log sigma(h) + e log sigma(-h)) / (1-2e), unbiased when a share e of the labels is flipped
            (Chowdhury et al. 2024); hinge, max(0, 1 - h) (SLiC, Zhao et al. 2023); ipo, (Delta - 1 / (2 beta))^2
            (Azar et al. 2024).

    Returns:
        [P].

    Raises:
        ValueError: unknown kind.
    """
    h = beta * margins
    e = label_smoothing
    if kind == "sigmoid":
        return -F.logsigmoid(h)
    if kind == "cdpo":
        return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
    if kind == "robust":
        return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)
    if kind == "hinge":
        return torch.relu(1 - h)
    if kind == "ipo":
        return (margins - 1 / (2 * beta)).square()
    raise ValueError(f"preference loss {kind!r}: allowed are {', '.join(PREFERENCE_LOSSES)}")
