"""GSPO: one importance ratio a sequence (Zheng et al. 2025, arXiv 2507.18071)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mcore_rl.algorithms.base import GroupAlgorithm
from mcore_rl.functional.policy import clipped_surrogate, is_clipped, masked_log_ratio, sequence_mean
from mcore_rl.types import PolicyOutput, WeightedBatch


@dataclass(frozen=True)
class GSPO(GroupAlgorithm):
    """J = mean_i min(s_i A_i, clip(s_i) A_i) with s_i = exp(mean_t log r_t), the geometric mean of token ratios.

    Attributes:
        clip_low, clip_high: three orders of magnitude below a token clip; they suit answers of thousands of tokens and
            grow like 1/sqrt(length) for shorter ones.
        token_variant: GSPO-token (eq. 13-14): the same value, the gradient of each token through its own log-prob, so
            that advantages may differ within a sequence.
    """

    scales_with_advantage: ClassVar[bool] = True

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    token_variant: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("clip_low", "clip_high")
        if self.correction.endswith("_token") and not self.token_variant:
            raise ValueError(
                f"algorithm.correction={self.correction!r}: a sequence has one ratio here, through which every token "
                "would get the mean of its sequence's weights; use token_variant=true or a *_seq_* correction"
            )

    def token_loss(self, batch: WeightedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = masked_log_ratio(out.logprobs, batch.old_logprobs, batch.loss_mask)
        log_s = sequence_mean(log_ratio, batch.loss_mask, batch.segment_ids)
        if self.token_variant:
            log_s = log_s.detach() + log_ratio - log_ratio.detach()
        s = log_s.exp()
        clipped = is_clipped(s, batch.advantages, self.clip_low, self.clip_high)
        ratio = log_ratio.exp()
        metrics = {
            "policy/ratio_mean": ratio,
            "policy/sequence_ratio_mean": s,
            "policy/clip_frac": clipped.to(s.dtype),
            "policy/kl_old": ratio - 1 - log_ratio,
        }
        return clipped_surrogate(s, batch.advantages, self.clip_low, self.clip_high), metrics
