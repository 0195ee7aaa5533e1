"""What the training loop asks of an algorithm: a frozen dataclass of pure hooks, all with defaults.

The loop calls them in this order. `keep` decides on the raw rewards whether a group is trained on, `reward` shapes
what the reward function said, `trains_on` takes single responses out of the loss, `batch_advantages` turns the groups'
rewards into one number a response. With a critic, `token_advantages` turns that number, values and log-probs into an
advantage a token, and `normalise_advantages` sees the sums over the whole batch. `token_loss` gives a loss a token,
`loss` weighs and adds those up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mcore_rl.functional.advantage import BASELINES, STD_MODES, group_advantages
from mcore_rl.functional.correction import CORRECTIONS, correction_weights
from mcore_rl.functional.policy import KL_ESTIMATORS, kl_estimate, kl_loss, masked_log_ratio
from mcore_rl.functional.reduce import AGGREGATIONS
from mcore_rl.types import LossOutput, PolicyOutput, RolloutGroup, ScoredBatch, Trajectory, WeightedBatch


@dataclass(frozen=True)
class Algorithm:
    """Base of all algorithms; the fields are the ones every policy-gradient method shares.

    Attributes:
        aggregation: how token losses are weighed, see `functional.reduce.sequence_weights`.
        kl_coef: coefficient of the KL to the frozen reference policy, added to the loss; 0 needs no reference.
        kl_estimator: k1, k2 or k3, see `functional.policy.kl_loss`.
        entropy_coef: coefficient of the entropy bonus.
        correction: weight of the policy-gradient term (not of KL and entropy) against the mismatch between trainer and
            rollout engine, see `functional.correction.correction_weights`.
        old_logprobs: of the policy that the ratio is to. "trainer": the trainer's, computed again at the weights before
            the step (the proximal policy, where rollouts are older than that). "rollout": what the engine said when it
            sampled (the behaviour policy; elsewhere "bypass"): ratio and clip then hold staleness and mismatch as well,
            a forward pass is saved, and there is nothing to correct.
        correction_low, correction_high: its bounds; null takes those of `functional.correction.CORRECTIONS`.
    """

    needs_rollouts: ClassVar[bool] = True  # False: the data already holds the responses (SFT, DPO)
    scales_with_advantage: ClassVar[bool] = False  # advantage 0: no policy loss and no gradient, whatever the ratio
    carry_surplus: ClassVar[bool] = False  # whether kept groups beyond the batch are trained on in the next step

    aggregation: str = "sequence_mean"
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    correction: str = "none"
    correction_low: float | None = None
    correction_high: float | None = None
    old_logprobs: str = "trainer"

    def __post_init__(self) -> None:
        self.check_range("kl_coef", "entropy_coef")
        self.check_choice("kl_estimator", KL_ESTIMATORS)
        self.check_choice("aggregation", AGGREGATIONS)
        self.check_choice("correction", tuple(CORRECTIONS))
        self.check_choice("old_logprobs", ("trainer", "rollout"))
        if self.old_logprobs == "rollout" and (self.correction != "none" or not self.needs_rollouts):
            raise ValueError(
                "algorithm.old_logprobs='rollout' makes the ratio one to the policy that sampled: it needs rollouts, "
                f"and nothing is left for correction={self.correction!r}; set one of them to 'trainer' or 'none'"
            )
        low, high = self.correction_bounds
        if not 0 <= low < high:
            raise ValueError(
                f"algorithm.correction_low={low:g} and correction_high={high:g}: "
                "bounds of a weight, 0 <= correction_low < correction_high"
            )
        if self.correction != "none" and not self.needs_rollouts:
            raise ValueError(
                f"algorithm.correction={self.correction!r}: {type(self).__name__} trains on given responses, there is "
                "no rollout to correct for; leave it at 'none'"
            )

    def check_range(self, *names: str, low: float = 0.0, high: float = math.inf, above: bool = False) -> None:
        """Raises ValueError where a field is not in [low, high], or with `above` equals `low`."""
        for name in names:
            value = getattr(self, name)
            if not low <= value <= high or (above and value == low):
                upper = "" if high == math.inf else f" and <= {high:g}"
                raise ValueError(f"algorithm.{name}={value}: must be {'>' if above else '>='} {low:g}{upper}")

    def check_choice(self, name: str, allowed: Sequence[str]) -> None:
        """Raises ValueError where a field is none of `allowed`."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"algorithm.{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")

    @property
    def correction_bounds(self) -> tuple[float, float]:
        low, high = CORRECTIONS[self.correction]
        return (
            low if self.correction_low is None else self.correction_low,
            high if self.correction_high is None else self.correction_high,
        )

    @property
    def kl_in_loss(self) -> bool:
        """Whether `loss` holds the KL term; PPO has it in the reward."""
        return self.kl_coef > 0

    @property
    def needs(self) -> frozenset[str]:
        """Beside the policy: "reference", "critic", "discriminator" models, "pairs" for data."""
        return frozenset({"reference"}) if self.kl_coef > 0 else frozenset()

    @property
    def unit(self) -> int:
        """Consecutive samples that the loss compares with each other: they stay in one micro-batch."""
        return 2 if "pairs" in self.needs else 1

    def keep(self, group: RolloutGroup) -> bool:
        """Whether a scored group is trained on; its rewards are not shaped yet."""
        return True

    def reward(self, trajectory: Trajectory) -> float:
        """The reward after shaping."""
        return float(trajectory.reward)

    def trains_on(self, trajectory: Trajectory) -> bool:
        """Whether a response of a kept group has a loss; without one it still counts in the group's statistics."""
        return True

    def advantages(self, group: RolloutGroup) -> Tensor:
        """[G] float64, one advantage a response."""
        raise NotImplementedError(f"{type(self).__name__} does not define advantages")

    def batch_advantages(self, groups: Sequence[RolloutGroup]) -> list[Tensor]:
        """[G] of every group of a step, for statistics that span groups."""
        return [self.advantages(group) for group in groups]

    def token_advantages(self, batch: ScoredBatch) -> tuple[ScoredBatch, dict[str, Tensor]]:
        """The batch with `advantages` (and `returns`) a token, and metrics [] that are sums over its loss tokens.

        Called once log-probs and values of before the step are in the batch, for all micro-batches of the step.
        """
        return batch, {}

    def normalise_advantages(self, batch: ScoredBatch, totals: Mapping[str, Tensor]) -> ScoredBatch:
        """The batch once the metrics of `token_advantages` were summed over micro-batches and ranks, into `totals`."""
        return batch

    def adapt_kl(self, kl: float, num_samples: int) -> Algorithm:
        """The algorithm of the next step, after `num_samples` responses whose mean "policy/kl_rollout" was `kl`."""
        return self

    def with_kl_coef(self, kl_coef: float) -> Algorithm:
        """The algorithm of a resumed run whose `adapt_kl` had come to `kl_coef`; a fixed coefficient stays."""
        return self

    def token_loss(self, batch: WeightedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [T] to minimise and metrics [T], both meaningful where `batch.loss_mask` is True."""
        raise NotImplementedError(f"{type(self).__name__} does not define token_loss")

    def loss(self, batch: WeightedBatch, out: PolicyOutput) -> LossOutput:
        """This batch's share of the global mini-batch's loss: sum_t weights_t * per_token_t, plus KL and entropy.

        Masked positions may hold anything, NaN included.
        """
        batch, out = blank_masked(batch), blank_masked_output(batch, out)
        mask = batch.loss_mask
        per_token, metrics = self.token_loss(batch, out)
        if self.correction != "none":
            log_rho = masked_log_ratio(batch.old_logprobs, batch.rollout_logprobs, mask)
            low, high = self.correction_bounds
            weight = correction_weights(log_rho, mask, batch.segment_ids, kind=self.correction, low=low, high=high)
            per_token = weight * per_token
            metrics = {
                **metrics,
                "policy/correction_mean": weight,
                "policy/correction_masked_frac": (weight == 0).to(weight.dtype),
            }
        if batch.router_weights is not None:
            weight = batch.router_weights.to(per_token.dtype)
            per_token = weight * per_token
            metrics = {
                **metrics,
                "policy/router_shift_mean": weight,
                "policy/router_shift_masked_frac": (weight == 0).to(weight.dtype),
            }
        if self.kl_in_loss:
            log_ratio_ref = masked_log_ratio(out.logprobs, batch.ref_logprobs, mask)
            log_ratio_old = masked_log_ratio(out.logprobs, batch.old_logprobs, mask)
            per_token = per_token + self.kl_coef * kl_loss(log_ratio_ref, log_ratio_old, self.kl_estimator)
            metrics = {**metrics, "policy/kl_ref": kl_estimate(log_ratio_ref, self.kl_estimator)}
        if self.entropy_coef > 0:
            per_token = per_token - self.entropy_coef * out.entropy
        return reduce_tokens(batch, per_token, {**metrics, "policy/entropy": out.entropy})


@dataclass(frozen=True)
class GroupAlgorithm(Algorithm):
    """Base of the critic-free methods: a response's advantage is its reward against the others of its prompt.

    Attributes:
        baseline: mean of the group or leave_one_out.
        std_mode: divide by the standard deviation of the rewards of the group, of the batch, or by nothing (none; with
            aggregation "constant" that is Dr.GRPO).
        ddof: 0 population standard deviation, 1 Bessel's.
        advantage_eps: added to the standard deviation.
    """

    baseline: str = "mean"
    std_mode: str = "group"
    ddof: int = 0
    advantage_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("baseline", BASELINES)
        self.check_choice("std_mode", STD_MODES)
        self.check_range("ddof", high=1)
        self.check_range("advantage_eps")

    def advantages(self, group: RolloutGroup) -> Tensor:
        return self.batch_advantages([group])[0]

    def batch_advantages(self, groups: Sequence[RolloutGroup]) -> list[Tensor]:
        rewards = [group.rewards for group in groups]
        everything = torch.cat(rewards)
        return [
            group_advantages(
                r,
                baseline=self.baseline,
                std_mode=self.std_mode,
                ddof=self.ddof,
                eps=self.advantage_eps,
                batch_rewards=everything,
            )
            for r in rewards
        ]


def reduce_tokens(batch: WeightedBatch, per_token: Tensor, metrics: Mapping[str, Tensor]) -> LossOutput:
    """The weighted sum of a loss [T] and the plain sums of metrics [T], over the loss tokens."""
    mask = batch.loss_mask
    sums = {name: torch.where(mask, x.detach(), 0.0).sum() for name, x in metrics.items()}
    sums["num_tokens"] = mask.sum().to(per_token.dtype)
    return LossOutput(loss=(batch.weights * torch.where(mask, per_token, 0.0)).sum(), metrics=sums)


def blank_masked(batch: WeightedBatch) -> WeightedBatch:
    """Zero wherever nothing was sampled, so that no later arithmetic can carry a masked value on."""
    before = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "returns", "router_weights")
    names = ("weights", "advantages", *before)
    return replace(batch, **{name: blank(getattr(batch, name), batch.loss_mask) for name in names})


def blank_masked_output(batch: WeightedBatch, out: PolicyOutput) -> PolicyOutput:
    """The same of what the model says."""
    return PolicyOutput(*(blank(x, batch.loss_mask) for x in (out.logprobs, out.entropy, out.values)))


def blank(x: Tensor | None, mask: Tensor) -> Tensor | None:
    """x [T] with zeros where `mask` is False."""
    return None if x is None else torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
