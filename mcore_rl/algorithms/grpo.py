"""GRPO: group-relative advantages and PPO's token clip (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mcore_rl.algorithms.base import GroupAlgorithm
from mcore_rl.functional.policy import clipped_token_loss, masked_log_ratio
from mcore_rl.types import PolicyOutput, WeightedBatch


@dataclass(frozen=True)
class GRPO(GroupAlgorithm):
    """J = mean_i mean_t min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coef * KL.

    Dr.GRPO (Liu et al. 2025, arXiv 2503.20783) is std_mode="none", aggregation="constant".

    Attributes:
        clip_low, clip_high: distance of the clip from 1.
    """

    scales_with_advantage: ClassVar[bool] = True

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("clip_low", "clip_high")

    def token_loss(self, batch: WeightedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = masked_log_ratio(out.logprobs, batch.old_logprobs, batch.loss_mask)
        return clipped_token_loss(log_ratio, batch.advantages, self.clip_low, self.clip_high)
