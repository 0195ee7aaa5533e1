"""DAPO: a higher upper clip, token-mean loss and only groups that teach (Yu et al. 2025, arXiv 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.algorithms.grpo import GRPO
from mcore_rl.functional.reward import overlong_penalty
from mcore_rl.types import RolloutGroup, Trajectory


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO's objective summed over all tokens of the mini-batch, with four changes.

    Attributes:
        clip_high: above `clip_low`, so that unlikely tokens can become likely.
        aggregation: token_mean, over the tokens of the mini-batch, as all published code; eq. 8 is group_token_mean.
        dynamic_sampling: drop groups whose raw rewards are all equal; the loop samples until the batch is full.
        carry_surplus: kept groups beyond the batch begin the next one, as the buffer of algorithm 1 does; they are one
            policy version old then, a mismatch that only `correction` weighs. False drops them.
        overlong_max_length, overlong_cache: soft punishment, see `functional.reward.overlong_penalty`; it sets in at
            overlong_max_length - overlong_cache response tokens. Both 0: off. The paper's are 20480 and 4096.
        overlong_filter: responses cut off at the length limit have no loss, but count in their group's statistics.
    """

    aggregation: str = "token_mean"
    clip_high: float = 0.28
    dynamic_sampling: bool = True
    carry_surplus: bool = True
    overlong_max_length: int = 0
    overlong_cache: int = 0
    overlong_filter: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        longest, cache = self.overlong_max_length, self.overlong_cache
        if (longest, cache) != (0, 0) and not 0 < cache <= longest:
            raise ValueError(
                f"algorithm.overlong_max_length={longest} and overlong_cache={cache}: the punishment grows over the "
                "last overlong_cache tokens before overlong_max_length, 0 < overlong_cache <= overlong_max_length; "
                "both 0 turn it off"
            )

    def keep(self, group: RolloutGroup) -> bool:
        return not self.dynamic_sampling or bool(group.rewards.max() > group.rewards.min())

    def reward(self, trajectory: Trajectory) -> float:
        if self.overlong_max_length == 0:
            return float(trajectory.reward)
        return trajectory.reward + overlong_penalty(
            len(trajectory.response_ids), max_length=self.overlong_max_length, cache=self.overlong_cache
        )

    def trains_on(self, trajectory: Trajectory) -> bool:
        return not (self.overlong_filter and trajectory.finish_reason == "length")
