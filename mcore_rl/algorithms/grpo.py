"""GRPO: group-relative advantages and PPO's token clip (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.functional.advantage import group_advantages
from mcore_rl.functional.policy import clipped_surrogate, is_clipped, masked_log_ratio
from mcore_rl.types import PackedBatch, PolicyOutput, RolloutGroup


@dataclass(frozen=True)
class GRPO(Algorithm):
    """J = mean_i mean_t min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coef * KL.

    Attributes:
        clip_low, clip_high: distance of the clip from 1.
        normalise_std: divide by the group's standard deviation (False: Dr.GRPO).
        ddof: 0 population standard deviation, 1 Bessel's.
        advantage_eps: added to the standard deviation.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalise_std: bool = True
    ddof: int = 0
    advantage_eps: float = 1e-6

    def advantages(self, group: RolloutGroup) -> Tensor:
        return group_advantages(
            group.rewards, normalise_std=self.normalise_std, ddof=self.ddof, eps=self.advantage_eps
        )

    def token_loss(self, batch: PackedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = masked_log_ratio(out.logprobs, batch.old_logprobs, batch.loss_mask)
        ratio = log_ratio.exp()
        loss = clipped_surrogate(ratio, batch.advantages, self.clip_low, self.clip_high)
        clipped = is_clipped(ratio, batch.advantages, self.clip_low, self.clip_high)
        metrics = {
            "policy/ratio_mean": ratio,
            "policy/clip_frac": clipped.to(loss.dtype),
            "policy/kl_old": ratio - 1 - log_ratio,
        }
        return loss, metrics
