"""GAPO, Generative Adversarial Policy Optimization: a discriminator as the reward (arXiv 2503.20194)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mcore_rl.algorithms.ppo import PPO
from mcore_rl.functional.advantage import group_advantages
from mcore_rl.functional.discriminator import (
    REWARD_TRANSFORMS,
    Normaliser,
    bce_loss,
    bradley_terry_loss,
    discriminator_metrics,
    discriminator_reward,
    steps_in_band,
)
from mcore_rl.types import LossOutput, RolloutGroup, ScoredBatch


@dataclass(frozen=True)
class GAPO(PPO):
    """PPO on R = transform(l), l the log-odds that the discriminator gives a response of being real.

    Attributes:
        baseline: critic (PPO's GAE), or group: advantages within a prompt's responses, no critic, KL in the loss.
        discriminator_objective: bce or bradley_terry. label_smoothing: of real ones in bce, e.g. 0.1.
        reward_transform: logit (clipped at reward_clip), sigmoid, softplus or logsigmoid.
        normalise_reward: logits get mean 0 and deviation 1 over what the same version of the discriminator scored.
        discriminator_steps: updates a round; none from accuracy band_high on, twice as many below band_low.
    """

    kl_coef: float = 0.01
    baseline: str = "critic"
    discriminator_objective: str = "bce"
    label_smoothing: float = 0.0
    reward_transform: str = "logit"
    reward_clip: float = 10.0
    normalise_reward: bool = True
    discriminator_steps: int = 1
    band_low: float = 0.55
    band_high: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("baseline", ("critic", "group"))
        self.check_choice("discriminator_objective", ("bce", "bradley_terry"))
        self.check_choice("reward_transform", REWARD_TRANSFORMS)
        self.check_range("reward_clip", above=True)
        self.check_range("discriminator_steps")
        self.check_range("label_smoothing", high=0.5)
        self.check_range("band_high", low=self.band_low, high=1)

    @property
    def needs(self) -> frozenset[str]:
        return (super().needs if self.baseline == "critic" else super().needs - {"critic"}) | {"discriminator"}

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and (self.baseline == "group" or not self.kl_in_reward)

    def advantages(self, group: RolloutGroup) -> Tensor:
        return group_advantages(group.rewards) if self.baseline == "group" else group.rewards

    def token_advantages(self, batch: ScoredBatch) -> tuple[ScoredBatch, dict[str, Tensor]]:
        return super().token_advantages(batch) if self.baseline == "critic" else (batch, {})

    def normalise_advantages(self, batch: ScoredBatch, totals: Mapping[str, Tensor]) -> ScoredBatch:
        return super().normalise_advantages(batch, totals) if self.baseline == "critic" else batch

    def discriminator_rewards(self, scores: Tensor, normaliser: Normaliser) -> Tensor:
        """[N] rewards of scores [N] that one version of the discriminator gave to a whole rollout."""
        rewards = discriminator_reward(scores, self.reward_transform)
        seen = normaliser if self.normalise_reward else Normaliser()  # of nothing: mean 0, deviation 1
        return seen.normalise(rewards, self.reward_clip) if self.reward_transform == "logit" else rewards

    def discriminator_loss(self, scores: Tensor, kinds: Tensor, weights: Tensor) -> LossOutput:
        """The discriminator's weighted loss; metrics "real/...", "rejected/..." and "fake/..." with "num_real" etc.

        Args:
            scores: [N]. kinds: [N] index into `functional.discriminator.KINDS`; bradley_terry: 2i real, 2i + 1 not.
            weights: [N] share of each sequence in the global batch, 0 for padding; a pair's is the sum of its two.
        """
        labels = (kinds == 0).to(scores.dtype)
        if self.discriminator_objective == "bce":
            loss = (weights * bce_loss(scores, labels, label_smoothing=self.label_smoothing)).sum()
        else:
            loss = (weights.view(-1, 2).sum(1) * bradley_terry_loss(scores[0::2], scores[1::2])).sum()
        return LossOutput(loss, discriminator_metrics(scores, kinds, weights > 0))

    def steps_due(self, accuracy: float) -> int:
        """Discriminator updates after a round in which it was right on `accuracy` of held-out sequences."""
        return steps_in_band(accuracy, self.discriminator_steps, low=self.band_low, high=self.band_high)
