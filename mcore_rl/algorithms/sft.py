"""SFT: maximum likelihood of given responses; the warm start of every RL run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.types import PolicyOutput, WeightedBatch


@dataclass(frozen=True)
class SFT(Algorithm):
    """L = -sum_t log pi(y_t) / number of response tokens."""

    needs_rollouts: ClassVar[bool] = False

    aggregation: str = "token_mean"

    def token_loss(self, batch: WeightedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        return -out.logprobs, {}
