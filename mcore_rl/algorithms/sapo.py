"""SAPO: a smooth gate in place of the clip (Gao et al. 2025, arXiv 2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mcore_rl.algorithms.base import GroupAlgorithm
from mcore_rl.functional.policy import masked_log_ratio
from mcore_rl.types import PolicyOutput, WeightedBatch


@dataclass(frozen=True)
class SAPO(GroupAlgorithm):
    """J = mean_i mean_t f(r_t) A, f(r) = (4 / tau) sigmoid(tau (r - 1)).

    The coefficient of a token is A r sech^2(tau (r - 1) / 2): A at r = 1, falling smoothly on both sides.
    The value at r = 1 is 2 A / tau: losses of different tau cannot be compared, gradients can.

    Attributes:
        tau_positive, tau_negative: temperature of the gate for A > 0 and for the rest.
    """

    scales_with_advantage: ClassVar[bool] = True

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("tau_positive", "tau_negative", above=True)

    def token_loss(self, batch: WeightedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = masked_log_ratio(out.logprobs, batch.old_logprobs, batch.loss_mask)
        # beyond e^20 the gate is flat whatever tau is; the bound keeps exp finite
        ratio = log_ratio.clamp(-20, 20).exp()
        tau = torch.where(batch.advantages > 0, self.tau_positive, self.tau_negative).to(ratio.dtype)
        p = torch.sigmoid(tau * (ratio - 1))
        gate = 4 * p * (1 - p)
        metrics = {
            "policy/ratio_mean": ratio,
            "policy/gate_mean": gate,
            "policy/gate_mass": gate * ratio,
            "policy/kl_old": ratio - 1 - log_ratio,
        }
        return -(4 / tau) * p * batch.advantages, metrics
