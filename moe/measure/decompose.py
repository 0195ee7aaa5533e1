"""How much of a log-ratio is weights and how much is routing: the counterfactual decomposition by replayed routes.

Four forward passes over the same tokens: weights in {old, new} x routes in {old, new}. Replaying routes fixes which
experts are used; how they are weighed is computed anew from the current router logits, so that a drift of the gates
counts as weights and only a change of the set counts as routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.measure.stats import Answers, Statistic, excess_kurtosis, ratio_of, stack, variance_of


@dataclass(frozen=True)
class Decomposition:
    """z = log p(new) - log p(old) = z_w + z_r for every scored token; all fields [N].

    z_r is routing-induced, not an error: the new model does route otherwise. It is an error only between a trainer and
    an engine that hold the same weights (`moe.measure.mismatch`).

    Attributes:
        old: log p(W_old, routes_old).
        new: log p(W_new, routes_new).
        new_on_old: log p(W_new, routes_old).
        old_on_new: log p(W_old, routes_new).
    """

    old: Tensor
    new: Tensor
    new_on_old: Tensor
    old_on_new: Tensor

    @property
    def z(self) -> Tensor:
        return self.new - self.old

    @property
    def z_w(self) -> Tensor:
        """Weights change first, on the old routes."""
        return self.new_on_old - self.old

    @property
    def z_r(self) -> Tensor:
        """Then the routes, at the new weights."""
        return self.new - self.new_on_old

    @property
    def interaction(self) -> Tensor:
        """What the routes do at the new weights less what they do at the old ones."""
        return self.z_r - (self.old_on_new - self.old)

    @property
    def shapley(self) -> tuple[Tensor, Tensor]:
        """(weights, routing): the mean of both orders; they sum to z."""
        half = self.interaction / 2
        return self.z_w + half, self.z_r - half


def parts(z_w: Tensor, z_r: Tensor, answers: Answers) -> dict[str, Statistic]:
    """Var z = Var z_w + Var z_r + 2 Cov, the routing share Var z_r / (Var z_w + Var z_r), excess kurtosis of each."""
    prompts = answers.token_prompts
    terms = stack(torch.ones(len(z_w)), z_w, z_r, z_w.double().square(), z_r.double().square(), z_w.double() * z_r)

    def moments(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one, w, r, ww, rr, wr = (s[..., i] / s[..., 0] for i in range(6))
        return ww - w.square(), rr - r.square(), wr - w * r

    def share(s: Tensor) -> Tensor:
        var_w, var_r, _ = moments(s)
        return var_r / (var_w + var_r)

    return {
        "var_z": variance_of(z_w + z_r, prompts),
        "var_w": Statistic(terms, prompts, lambda s: moments(s)[0]),
        "var_r": Statistic(terms, prompts, lambda s: moments(s)[1]),
        "covariance": Statistic(terms, prompts, lambda s: moments(s)[2]),
        "share_routing": Statistic(terms, prompts, share),
        "kurtosis_z": excess_kurtosis(z_w + z_r, prompts),
        "kurtosis_w": excess_kurtosis(z_w, prompts),
    }


def crossover(z_w: Tensor, z_r: Tensor, answers: Answers) -> dict[str, Statistic]:
    """chi and k*: is the token ratio or the sequence ratio nearer to the ratio that the weights alone would give?

    For every answer, exactly (zbar is the mean of z over the answer, var_in a variance within it):

        mean_t (z_t  - z_w,t)^2 = var_in(z_r) + zbar_r^2       the token ratio's error
        mean_t (zbar - z_w,t)^2 = var_in(z_w) + zbar_r^2       the sequence ratio's error

    so the sequence ratio is nearer if and only if chi = sum var_in(z_r) / sum var_in(z_w) > 1. The best
    zbar + k (z_t - zbar) has k* = sum cov_in(z, z_w) / sum var_in(z): 1 is the token ratio, 0 the sequence ratio.
    """
    z_w, z_r = z_w.double(), z_r.double()
    within = answers.covariance_within
    z = z_w + z_r
    return {
        "chi": ratio_of(within(z_r, z_r), within(z_w, z_w), answers.prompt_ids),
        "k_star": ratio_of(within(z, z_w), within(z, z), answers.prompt_ids),
    }


def own_flip_share(z_r: Tensor, flipped: Tensor, answers: Answers) -> Statistic:
    """Share of sum z_r^2 on tokens whose own routes changed; the rest came through attention to changed tokens."""
    square = z_r.double().square()
    return ratio_of(square * flipped, square, answers.token_prompts)


def jump(z_r: Tensor, flipped: Tensor, answers: Answers) -> Statistic:
    """Root mean square of z_r over the tokens whose own routes changed, in nats."""
    square = z_r.double().square() * flipped
    by_token = ratio_of(square, flipped, answers.token_prompts)
    return Statistic(by_token.terms, by_token.prompts, lambda s: by_token.finish(s).sqrt())


def decomposition_statistics(parts_of: Decomposition, flipped: Tensor, answers: Answers) -> dict[str, Statistic]:
    """Everything above by name, for weights first (plain names), routes first and Shapley (suffixed).

    Args:
        flipped: [N] bool, the token's routes changed in some layer.
    """
    z_w, z_r = parts_of.z_w, parts_of.z_r
    shapley_w, shapley_r = parts_of.shapley
    first_r = parts_of.old_on_new - parts_of.old
    return {
        **parts(z_w, z_r, answers),
        **crossover(z_w, z_r, answers),
        "share_routing_first": parts(parts_of.z - first_r, first_r, answers)["share_routing"],
        "share_routing_shapley": parts(shapley_w, shapley_r, answers)["share_routing"],
        "var_interaction": variance_of(parts_of.interaction, answers.token_prompts),
        "own_flip_share": own_flip_share(z_r, flipped, answers),
        "jump": jump(z_r, flipped, answers),
    }
