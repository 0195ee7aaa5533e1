"""All models of a run on this rank."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.model.forward import Policy, Scorer
from mcore_rl.model.optimizer import Training
from mcore_rl.roles.given_logprobs import GivenLogprobs


@dataclass(frozen=True)
class Models:
    """The models of a run by their role; None where the run has no such model.

    Attributes:
        trained: "policy" and those of "critic" and "discriminator" that the run needs, with their optimizers: what a
            checkpoint holds.
        reference: the frozen policy, or its log-probs where all that it will be asked is known before training.
        discriminator, reward_model: whose score is the reward; what the rule says is then an audit.
    """

    trained: dict[str, Training]
    policy: Policy
    reference: Policy | GivenLogprobs | None = None
    critic: Scorer | None = None
    discriminator: Scorer | None = None
    reward_model: Scorer | None = None
