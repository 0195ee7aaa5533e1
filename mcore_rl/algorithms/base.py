"""What the training loop asks of an algorithm: a frozen dataclass with five hooks, all with defaults.

The hooks are pure. The loop calls them in this order: `reward` shapes what the reward function said, `keep` decides
whether a group is trained on, `advantages` turns a group's rewards into one number a response, `token_loss` gives a
loss a token, `loss` weighs and adds those up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mcore_rl.functional.advantage import group_advantages
from mcore_rl.functional.policy import KL_ESTIMATORS, kl_estimate, masked_log_ratio
from mcore_rl.functional.reduce import AGGREGATIONS
from mcore_rl.types import LossOutput, PackedBatch, PolicyOutput, RolloutGroup, Trajectory


@dataclass(frozen=True)
class Algorithm:
    """Base of all algorithms; the fields are the ones every policy-gradient method shares.

    Attributes:
        aggregation: how token losses are weighed, see `functional.reduce.sequence_weights`.
        kl_coef: coefficient of the KL to the frozen reference policy, added to the loss; 0 needs no reference.
        kl_estimator: k1, k2 or k3, see `functional.policy.kl_estimate`.
        entropy_coef: coefficient of the entropy bonus.
    """

    needs_rollouts: ClassVar[bool] = True  # False: the data already holds the responses (SFT)

    aggregation: str = "sequence_mean"
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kl_coef", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"algorithm.{name}={getattr(self, name)}: must be >= 0")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"algorithm.kl_estimator={self.kl_estimator!r}: allowed are {', '.join(KL_ESTIMATORS)}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"algorithm.aggregation={self.aggregation!r}: allowed are {', '.join(AGGREGATIONS)}")

    @property
    def needs(self) -> frozenset[str]:
        """Models beside the policy that the loop must hold."""
        return frozenset({"reference"}) if self.kl_coef > 0 else frozenset()

    def keep(self, group: RolloutGroup) -> bool:
        """Whether a scored group is trained on."""
        return True

    def reward(self, trajectory: Trajectory) -> float:
        """The reward after shaping."""
        return float(trajectory.reward)

    def advantages(self, group: RolloutGroup) -> Tensor:
        """[G] float64, one advantage a response."""
        raise NotImplementedError(f"{type(self).__name__} does not define advantages")

    def token_loss(self, batch: PackedBatch, out: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [T] to minimise and metrics [T], both meaningful where `batch.loss_mask` is True."""
        raise NotImplementedError(f"{type(self).__name__} does not define token_loss")

    def loss(self, batch: PackedBatch, out: PolicyOutput) -> LossOutput:
        """This batch's share of the global mini-batch's loss: sum_t weights_t * per_token_t, plus KL and entropy.

        Masked positions may hold anything, NaN included.
        """
        batch, out = _blank_masked(batch, out)
        per_token, metrics = self.token_loss(batch, out)
        if self.kl_coef > 0:
            kl = kl_estimate(masked_log_ratio(out.logprobs, batch.ref_logprobs, batch.loss_mask), self.kl_estimator)
            # the ratio makes the gradient that of KL(pi || ref) when the tokens come from the old policy
            ratio = masked_log_ratio(out.logprobs, batch.old_logprobs, batch.loss_mask).exp()
            per_token = per_token + self.kl_coef * ratio * kl
            metrics = {**metrics, "policy/kl_ref": kl}
        if self.entropy_coef > 0:
            per_token = per_token - self.entropy_coef * out.entropy
        mask = batch.loss_mask
        sums = {name: torch.where(mask, x.detach(), 0.0).sum() for name, x in metrics.items()}
        sums["policy/entropy"] = out.entropy.detach().sum()
        sums["num_tokens"] = mask.sum().to(per_token.dtype)
        return LossOutput(loss=(batch.weights * torch.where(mask, per_token, 0.0)).sum(), metrics=sums)


@dataclass(frozen=True)
class GroupAlgorithm(Algorithm):
    """Base of the critic-free methods: a response's advantage is its reward against the others of its prompt.

    Attributes:
        normalise_std: divide by the group's standard deviation (False: Dr.GRPO).
        ddof: 0 population standard deviation, 1 Bessel's.
        advantage_eps: added to the standard deviation.
    """

    normalise_std: bool = True
    ddof: int = 0
    advantage_eps: float = 1e-6

    def advantages(self, group: RolloutGroup) -> Tensor:
        return group_advantages(group.rewards, normalise_std=self.normalise_std, ddof=self.ddof, eps=self.advantage_eps)


def _blank_masked(batch: PackedBatch, out: PolicyOutput) -> tuple[PackedBatch, PolicyOutput]:
    """Zero wherever nothing was sampled, so that no later arithmetic can carry a masked value on."""
    mask = batch.loss_mask

    def blank(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    names = ("weights", "advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs", "returns")
    clean = replace(batch, **{name: blank(getattr(batch, name)) for name in names})
    return clean, PolicyOutput(blank(out.logprobs), blank(out.entropy), blank(out.values))
