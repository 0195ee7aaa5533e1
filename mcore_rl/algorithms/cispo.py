"""CISPO: clip the importance weight, keep every token's gradient (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mcore_rl.algorithms.base import GroupAlgorithm
from mcore_rl.functional.policy import masked_log_ratio
from mcore_rl.types import PolicyOutput, WeightedBatch


@dataclass(frozen=True)
class CISPO(GroupAlgorithm):
    """J = mean_t sg[clip(r_t, ratio_min, ratio_max)] A log pi(y_t).

    Attributes:
        ratio_min, ratio_max: absolute bounds of the weight, not distances from 1.
    """

    scales_with_advantage: ClassVar[bool] = True

    aggregation: str = "token_mean"
    ratio_min: float = 0.0
    ratio_max: float = 5.0

    def token_loss(self, batch: WeightedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = masked_log_ratio(out.logprobs, batch.old_logprobs, batch.loss_mask)
        ratio = log_ratio.exp().detach()
        weight = ratio.clamp(self.ratio_min, self.ratio_max)
        metrics = {
            "policy/ratio_mean": ratio,
            "policy/clip_frac": (weight != ratio).to(ratio.dtype),
            "policy/kl_old": ratio - 1 - log_ratio,
        }
        return -weight * batch.advantages * out.logprobs, metrics
