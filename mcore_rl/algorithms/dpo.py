"""DPO: learn preferences between given responses, without rollouts (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mcore_rl.algorithms.base import Algorithm, blank_masked, blank_masked_output, reduce_tokens
from mcore_rl.functional.policy import segment_sums
from mcore_rl.functional.preference import PREFERENCE_LOSSES, preference_loss
from mcore_rl.types import LossOutput, PolicyOutput, WeightedBatch


@dataclass(frozen=True)
class DPO(Algorithm):
    """L = mean over pairs of -log sigma(beta Delta), Delta = log(pi / ref)(chosen) - log(pi / ref)(rejected).

    Segments 2i and 2i + 1 of a batch are chosen and rejected of pair i; a last segment without partner is padding.
    A pair's share of the global mini-batch is the sum of its two responses' token weights: with `aggregation`
    "sequence_sum", 1 / (2 pairs) on every response token, the shares are 1 / pairs.

    Attributes:
        preference_loss: sigmoid, cdpo, robust, hinge or ipo, see `functional.preference.preference_loss`.
        beta: strength of the tie to the reference.
        label_smoothing: share of wrong labels that cdpo and robust assume.
        length_normalised: means over tokens instead of sums in Delta.
        nll_coef: adds nll_coef times the chosen response's mean negative log-likelihood (Pang et al. 2024).
    """

    needs_rollouts: ClassVar[bool] = False

    aggregation: str = "sequence_sum"
    preference_loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    nll_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("preference_loss", PREFERENCE_LOSSES)
        self.check_choice("aggregation", ("sequence_sum",))
        self.check_range("beta", above=True)
        self.check_range("nll_coef")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"algorithm.label_smoothing={self.label_smoothing}: must be >= 0 and < 0.5")
        if self.label_smoothing > 0 and self.preference_loss not in ("cdpo", "robust"):
            raise ValueError(
                f"algorithm.label_smoothing={self.label_smoothing} has no effect on preference_loss="
                f"{self.preference_loss!r}; use cdpo or robust, or 0"
            )
        if self.kl_coef > 0 or self.entropy_coef > 0:
            raise ValueError("algorithm.kl_coef and entropy_coef: DPO has no such terms, beta ties it to the reference")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference", "pairs"})

    def loss(self, batch: WeightedBatch, out: PolicyOutput) -> LossOutput:
        """The pairs' weighted losses. Metrics "pairs/..." are sums over pairs, their number is "num_pairs"."""
        batch, out = blank_masked(batch), blank_masked_output(batch, out)

        def of_pairs(x: Tensor) -> Tensor:  # [T] -> [P, 2]
            sums = segment_sums(x, batch.segment_ids, batch.cu_seqlens.numel() - 1)
            return sums[: len(sums) // 2 * 2].view(-1, 2)

        lengths = of_pairs(batch.loss_mask.to(out.logprobs.dtype)).clamp(min=1)
        shares = (of_pairs(batch.weights) / lengths).sum(1)
        log_ratios = of_pairs(out.logprobs - batch.ref_logprobs) / (lengths if self.length_normalised else 1)
        margins = log_ratios[:, 0] - log_ratios[:, 1]
        per_pair = preference_loss(margins, self.preference_loss, beta=self.beta, label_smoothing=self.label_smoothing)
        if self.nll_coef > 0:
            per_pair = per_pair - self.nll_coef * of_pairs(out.logprobs)[:, 0] / lengths[:, 0]
        rewards, h = self.beta * log_ratios.detach(), self.beta * margins.detach()
        metrics = {
            "pairs/loss": per_pair.detach(),
            "pairs/margin": h,
            "pairs/accuracy": (1 + h.sign()) / 2,  # a tie is half right
            "pairs/chosen_reward": rewards[:, 0],
            "pairs/rejected_reward": rewards[:, 1],
        }
        real = shares > 0
        sums = {name: torch.where(real, x, 0.0).sum() for name, x in metrics.items()}
        sums["num_pairs"] = real.sum().to(per_pair.dtype)
        tokens = reduce_tokens(batch, torch.zeros_like(out.logprobs), {"policy/entropy": out.entropy})
        return LossOutput((shares * per_pair).sum(), tokens.metrics | sums)
