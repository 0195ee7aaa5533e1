"""PPO: a critic, GAE and the token clip (Schulman et al. 2017, arXiv 1707.06347)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mcore_rl.algorithms.base import Algorithm, blank, blank_masked, reduce_tokens
from mcore_rl.functional.advantage import gae, moments, terminal_rewards, whiten
from mcore_rl.functional.policy import clipped_token_loss, masked_log_ratio
from mcore_rl.functional.reward import adaptive_kl_coef
from mcore_rl.functional.value import clipped_value_loss
from mcore_rl.types import LossOutput, PolicyOutput, RolloutGroup, ScoredBatch, WeightedBatch


@dataclass(frozen=True)
class PPO(Algorithm):
    """J = mean_t min(r A, clip(r) A), A by GAE; R_t = -kl_coef log(pi_old / pi_ref), plus the score at the end.

    Attributes:
        clip_low, clip_high: distance of the clip from 1. dual_clip: bound c > 1 of r for A < 0; 0 is off.
        gamma, lam: of GAE; lam = 1 suits responses of thousands of tokens.
        whiten: advantages of the step's batch get mean 0 and variance 1; returns never do.
        value_clip: how far a value may move from the critic's of before the step; 0 is off.
        kl_in_reward: False puts the KL in the loss. kl_target, kl_horizon: with a target > 0, `adapt_kl` moves kl_coef.
    """

    aggregation: str = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_clip: float = 0.2
    kl_in_reward: bool = True
    kl_target: float = 0.0
    kl_horizon: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("clip_low", "clip_high", "value_clip", "kl_target")
        self.check_range("gamma", "lam", high=1)
        self.check_range("kl_horizon", low=1)
        if self.dual_clip != 0 and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"algorithm.dual_clip={self.dual_clip}: must be > 1 + clip_high; 0 turns it off")
        if self.kl_target > 0 and self.kl_coef == 0:
            raise ValueError("algorithm.kl_target adapts kl_coef, which is 0; start it above 0, e.g. at 0.05")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"critic"}

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and not self.kl_in_reward

    def advantages(self, group: RolloutGroup) -> Tensor:
        return group.rewards  # token_advantages replaces them

    def token_advantages(self, batch: ScoredBatch) -> tuple[ScoredBatch, dict[str, Tensor]]:
        """GAE of scores (in `advantages`), `values`, `old_logprobs` and, with KL in the reward, `ref_logprobs`."""
        mask, metrics = batch.loss_mask, {}
        rewards = terminal_rewards(batch.advantages, mask, batch.segment_ids)
        if self.kl_coef > 0 and self.kl_in_reward:
            metrics["policy/kl_rollout"] = masked_log_ratio(batch.old_logprobs, batch.ref_logprobs, mask)
            rewards = rewards - self.kl_coef * metrics["policy/kl_rollout"]
        advantages, returns = gae(rewards, batch.values, mask, batch.segment_ids, gamma=self.gamma, lam=self.lam)
        metrics = metrics | moments("critic/advantage", advantages) | moments("critic/return", returns)
        sums = {name: x.double().sum() for name, x in metrics.items()} | {"num_tokens": mask.sum().double()}
        return replace(batch, advantages=advantages, returns=returns), sums

    def normalise_advantages(self, batch: ScoredBatch, totals: Mapping[str, Tensor]) -> ScoredBatch:
        if not self.whiten:
            return batch
        count, total, squares = (totals[k] for k in ("num_tokens", "critic/advantage_mean", "critic/advantage_square"))
        whitened = whiten(batch.advantages, batch.loss_mask, count=count, total=total, square_total=squares)
        return replace(batch, advantages=whitened)

    def token_loss(self, batch: WeightedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = masked_log_ratio(out.logprobs, batch.old_logprobs, batch.loss_mask)
        return clipped_token_loss(log_ratio, batch.advantages, self.clip_low, self.clip_high, self.dual_clip)

    def value_loss(self, batch: WeightedBatch, values: Tensor) -> LossOutput:
        """The critic's loss from its present values [T]; needs `batch.values` and `returns` of before the step."""
        batch, values = blank_masked(batch), blank(values, batch.loss_mask)
        loss, clipped = clipped_value_loss(values, batch.values, batch.returns, self.value_clip)
        metrics = {"critic/loss": loss, "critic/value_mean": values, "critic/clip_frac": clipped.to(loss.dtype)}
        return reduce_tokens(batch, loss, metrics)

    def adapt_kl(self, kl: float, num_samples: int) -> PPO:
        if self.kl_target == 0:
            return self
        rule = dict(target=self.kl_target, num_samples=num_samples, horizon=self.kl_horizon)
        return self.with_kl_coef(adaptive_kl_coef(self.kl_coef, kl, **rule))

    def with_kl_coef(self, kl_coef: float) -> PPO:
        return replace(self, kl_coef=kl_coef) if self.kl_target > 0 else self
