"""What every objective makes of the same log-ratios: coefficients, clips and gates, matched so that they compare.

The gradient of an objective is sum_t w_t c_t A_t grad log p_t. The reduction w is the same for all of them here (mean
over an answer's tokens, then over answers), so that only the ratio is compared; `coefficients` gives c.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe.measure.stats import Answers, Statistic, mean_of, ratio_of

TOKEN_CLIP = (0.2, 0.2)  # PPO, GRPO
DAPO_CLIP = (0.2, 0.28)
GSPO_CLIP = (3e-4, 4e-4)  # of the paper, for answers of thousands of tokens
CISPO_MAX = 5.0
SAPO_TAU = (1.0, 1.05)  # A > 0, and the rest
Coefficient = Callable[[Tensor, Tensor, Answers], Tensor]


def kept(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where min(r A, clip(r) A) has a gradient: bool, shape of `ratio`."""
    return torch.where(advantages > 0, ratio <= 1 + high, ratio >= 1 - low)


def gate(ratio: Tensor, advantages: Tensor) -> Tensor:
    """SAPO's sech^2(tau (r - 1) / 2)."""
    tau = torch.where(advantages > 0, *(torch.tensor(t, dtype=ratio.dtype) for t in SAPO_TAU))
    p = torch.sigmoid(tau * (ratio - 1))
    return 4 * p * (1 - p)


def _token(z: Tensor, advantages: Tensor, answers: Answers) -> Tensor:
    return z.exp()


def token_clipped(low: float, high: float) -> Coefficient:
    """The token ratio, dropped outwards of [1 - low, 1 + high]."""
    return lambda z, advantages, answers: z.exp() * kept(z.exp(), advantages, low, high)


def _sapo(z: Tensor, advantages: Tensor, answers: Answers) -> Tensor:
    ratio = z.clamp(-20, 20).exp()
    return ratio * gate(ratio, advantages)


def _sequence(z: Tensor, advantages: Tensor, answers: Answers) -> Tensor:
    return answers.spread(answers.mean(z)).exp()


def _prefix(z: Tensor, advantages: Tensor, answers: Answers) -> Tensor:
    totals = answers.sum(z)
    return (z.cumsum(0) - answers.spread(totals.cumsum(0) - totals)).exp()


def _product(z: Tensor, advantages: Tensor, answers: Answers) -> Tensor:
    return answers.spread(answers.sum(z)).exp()


COEFFICIENTS: dict[str, Coefficient] = {
    "no ratio": lambda z, advantages, answers: torch.ones_like(z),
    "token": _token,
    "token clip": token_clipped(*TOKEN_CLIP),
    "DAPO clip": token_clipped(*DAPO_CLIP),
    "CISPO": lambda z, advantages, answers: z.exp().clamp(max=CISPO_MAX),
    "SAPO": _sapo,
    "GSPO": _sequence,
    "prefix": _prefix,
    "product": _product,
}


def coefficients(name: str, z: Tensor, advantages: Tensor, answers: Answers) -> Tensor:
    """c_t [N] of the objective `name`, from log-ratios and advantages of every token [N].

    "GSPO" is without its clip, whose width depends on the length of answers: `gspo_clipped` has it.
    """
    return COEFFICIENTS[name](z, advantages, answers)


def gspo_clipped(low: float, high: float) -> Coefficient:
    """GSPO that drops answers whose ratio lies outwards of [1 - low, 1 + high]."""

    def coefficient(z: Tensor, advantages: Tensor, answers: Answers) -> Tensor:
        s = _sequence(z, advantages, answers)
        return s * kept(s, advantages, low, high)

    return coefficient


def token_weights(answers: Answers) -> Tensor:
    """[N] the common reduction: 1 / (answers x tokens of the answer)."""
    return answers.spread(1 / answers.lengths.double()) / len(answers.prompt_ids)


# ---------------------------------------------------------------- clips


def outward(ratio: Tensor, advantages: Tensor) -> Tensor:
    """How far a ratio has moved in the direction in which it is clipped; a clip of width e drops what is above e."""
    return torch.where(advantages > 0, ratio - 1, 1 - ratio)


def matched_width(ratio: Tensor, advantages: Tensor, share: float) -> float:
    """The clip width that drops `share` of the tokens; clips of the same share can be compared, of the same width not.

    Tokens with no advantage are dropped by nothing and count as kept.
    """
    moved = torch.where(advantages != 0, outward(ratio, advantages), -torch.inf)
    ordered = moved.sort(descending=True).values
    return float(ordered[min(int(round(share * len(ordered))), len(ordered) - 1)].clamp_min(0))


def clip_statistics(
    name: str, ratio: Tensor, ratio_w: Tensor, advantages: Tensor, answers: Answers, low: float, high: float
) -> dict[str, Statistic]:
    """What a clip does to the tokens of a batch.

    Args:
        ratio, ratio_w: [N] the ratio, and what it would be had only the weights changed.

    Returns:
        NAME/share: tokens dropped. NAME/outside: tokens outside the band in either direction. NAME/mass: share of
        sum |A| dropped. NAME/toggled: tokens kept or dropped otherwise than the weights alone would have it.
    """
    active = advantages != 0
    dropped = ~kept(ratio, advantages, low, high) & active
    dropped_w = ~kept(ratio_w, advantages, low, high) & active
    outside = (ratio > 1 + high) | (ratio < 1 - low)
    size, prompts = advantages.abs(), answers.token_prompts
    return {
        f"{name}/share": mean_of(dropped.double(), prompts),
        f"{name}/outside": mean_of(outside.double(), prompts),
        f"{name}/mass": ratio_of(dropped * size, size, prompts),
        f"{name}/toggled": mean_of((dropped != dropped_w).double(), prompts),
    }


def gate_statistics(z: Tensor, advantages: Tensor, answers: Answers) -> dict[str, Statistic]:
    """SAPO's gate: its mean, the mean of gate x ratio, and the share of |A| that it holds back."""
    ratio, prompts = z.exp(), answers.token_prompts
    open_, size = gate(ratio, advantages), advantages.abs()
    return {
        "SAPO/gate": mean_of(open_, prompts),
        "SAPO/gate_ratio": mean_of(open_ * ratio, prompts),
        "SAPO/mass": ratio_of((1 - open_) * size, size, prompts),
    }


def gate_spread_bound(z: Tensor, tau: float, answers: Answers) -> tuple[Tensor, Tensor]:
    """|mean_t g(z_t) - g(zbar)| [A] of each answer for the gate in the log-ratio g(z) = sech^2(tau z / 2), and its
    bound (tau^2 / 4) var_in(z) [A]: how far SAPO's mean gate is from a gate on the sequence ratio. A theorem for this
    gate; SAPO's own, in r - 1, may exceed it where drift is large."""

    def g(x: Tensor) -> Tensor:
        return torch.cosh(tau * x / 2).pow(-2)

    gap = (answers.mean(g(z)) - g(answers.mean(z))).abs()
    return gap, tau**2 / 4 * answers.covariance_within(z, z)
