"""Statistics of per-token log-ratios, each with its confidence interval over prompts.

Tokens of one answer share their context and answers of one prompt share the prompt, so tokens are no independent
sample: every interval here resamples whole prompts. That is cheap because every statistic is a function of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% bootstrap interval over prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """Which answer, and which prompt, every scored token belongs to.

    Attributes:
        answer_ids: [N] int64, non-decreasing, every answer of 0 .. A-1 at least once.
        prompt_ids: [A] int64, the prompt each answer answers.
    """

    answer_ids: Tensor  # [N]
    prompt_ids: Tensor  # [A]

    @property
    def lengths(self) -> Tensor:
        """[A] tokens of each answer."""
        return torch.bincount(self.answer_ids, minlength=len(self.prompt_ids))

    @property
    def token_prompts(self) -> Tensor:
        """[N] prompt of each token."""
        return self.prompt_ids[self.answer_ids]

    @property
    def positions(self) -> Tensor:
        """[N] place of each token within its answer, from 0."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(len(self.answer_ids)) - starts[self.answer_ids]

    def sum(self, x: Tensor) -> Tensor:
        """[N] -> [A] sum over each answer."""
        return torch.zeros(len(self.prompt_ids), dtype=x.dtype).index_add(0, self.answer_ids, x)

    def mean(self, x: Tensor) -> Tensor:
        """[N] -> [A] mean over each answer."""
        return self.sum(x) / self.lengths

    def spread(self, y: Tensor) -> Tensor:
        """[A] -> [N] each answer's value at each of its tokens."""
        return y[self.answer_ids]

    def covariance_within(self, x: Tensor, y: Tensor) -> Tensor:
        """[A] mean over an answer's tokens of (x - its mean)(y - its mean)."""
        return self.mean((x - self.spread(self.mean(x))) * (y - self.spread(self.mean(y))))

    def select(self, keep: Tensor) -> tuple[Tensor, Answers]:
        """The tokens of the answers where `keep` [A] is true: (their indices [n], their `Answers`)."""
        tokens = self.spread(keep).nonzero()[:, 0]
        renumbered = keep.long().cumsum(0) - 1
        return tokens, Answers(renumbered[self.answer_ids[tokens]], self.prompt_ids[keep])


@dataclass(frozen=True)
class Statistic:
    """A function of sums over samples.

    Attributes:
        terms: [n, F], what each sample adds; float64.
        prompts: [n] int64, the prompt each sample belongs to.
        finish: [..., F] sums -> [...] value.
    """

    terms: Tensor
    prompts: Tensor
    finish: Callable[[Tensor], Tensor]

    def value(self) -> float:
        return float(self.finish(self.terms.sum(0)))

    def estimate(self, draws: int = 1000, seed: int = 0) -> Estimate:
        """Percentile bootstrap: prompts are drawn with replacement, the same prompts for the same seed and `prompts`.

        The prompts counted are 0 .. max(prompts); one without samples adds nothing to the sums. Resamples on which the
        statistic does not exist (0/0) are left out; none left gives NaN bounds.
        """
        counts = resample(int(self.prompts.max()) + 1, draws, seed)
        sums = torch.zeros(counts.shape[1], self.terms.shape[1], dtype=torch.float64)
        resampled = self.finish(counts @ sums.index_add(0, self.prompts, self.terms))
        resampled = resampled[resampled.isfinite()]
        if len(resampled) == 0:
            return Estimate(self.value(), float("nan"), float("nan"))
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Estimate(self.value(), low, high)


def resample(num_prompts: int, draws: int, seed: int) -> Tensor:
    """[draws, num_prompts] how often each prompt is drawn, float64; a row sums to num_prompts."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_prompts, (draws, num_prompts), generator=generator)
    ones = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros(draws, num_prompts, dtype=torch.float64).scatter_add(1, drawn, ones)


def estimates(statistics: Mapping[str, Statistic], draws: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    return {name: statistic.estimate(draws, seed) for name, statistic in statistics.items()}


def joint(statistics: Sequence[Statistic], finish: Callable[[Tensor], Tensor]) -> Statistic:
    """A function of several statistics of the same samples: `finish` takes their values [..., len(statistics)]."""
    sizes = [s.terms.shape[1] for s in statistics]

    def together(sums: Tensor) -> Tensor:
        values = [s.finish(part) for s, part in zip(statistics, sums.split(sizes, dim=-1))]
        return finish(torch.stack(values, -1))

    return Statistic(torch.cat([s.terms for s in statistics], 1), statistics[0].prompts, together)


def stack(*columns: Tensor) -> Tensor:
    """[n] columns -> [n, F] float64 terms."""
    return torch.stack([column.to(torch.float64) for column in columns], -1)


def mean_of(x: Tensor, prompts: Tensor) -> Statistic:
    """Mean over samples."""
    return Statistic(stack(torch.ones(len(x)), x), prompts, lambda s: s[..., 1] / s[..., 0])


def ratio_of(x: Tensor, y: Tensor, prompts: Tensor) -> Statistic:
    """sum x / sum y."""
    return Statistic(stack(x, y), prompts, lambda s: s[..., 0] / s[..., 1])


def variance_of(x: Tensor, prompts: Tensor) -> Statistic:
    """Population variance over samples."""

    def finish(s: Tensor) -> Tensor:
        return s[..., 2] / s[..., 0] - (s[..., 1] / s[..., 0]).square()

    return Statistic(stack(torch.ones(len(x)), x, x.double().square()), prompts, finish)


def excess_kurtosis(x: Tensor, prompts: Tensor) -> Statistic:
    """Fourth central moment over the squared variance, less 3 (0 for a normal sample)."""

    def finish(s: Tensor) -> Tensor:
        m1, m2, m3, m4 = (s[..., i] / s[..., 0] for i in range(1, 5))
        central = m4 - 4 * m1 * m3 + 6 * m1.square() * m2 - 3 * m1.pow(4)
        return central / (m2 - m1.square()).square() - 3

    x = x.double() - x.double().mean()  # the moments of a resample are then small beside the central ones
    return Statistic(stack(torch.ones(len(x)), *(x.pow(p) for p in (1, 2, 3, 4))), prompts, finish)


# ---------------------------------------------------------------- averaging over an answer


def inflation(z: Tensor, answers: Answers, n: int) -> Statistic:
    """I_n = n Var(mean of n neighbouring tokens) / Var(token): 1 if tokens are independent, n if they are all shared.

    Answers are cut into blocks of n tokens from their start; a shorter rest is left out, also from Var(token).

    Raises:
        ValueError: no answer has n tokens.
    """
    block = answers.positions // n
    whole = block < answers.spread(answers.lengths // n)
    if not whole.any():
        raise ValueError(f"no answer has {n} tokens, the longest has {int(answers.lengths.max())}; average over fewer")
    z, prompts = z[whole].double().view(-1, n), answers.token_prompts[whole].view(-1, n)[:, 0]
    mean, square = z.mean(1), z.square().mean(1)

    def finish(s: Tensor) -> Tensor:
        centre = (s[..., 1] / s[..., 0]).square()
        return n * (s[..., 2] / s[..., 0] - centre) / (s[..., 3] / s[..., 0] - centre)

    return Statistic(stack(torch.ones(len(mean)), mean, mean.square(), square), prompts, finish)


def inflation_of_correlation(rho: Tensor) -> Tensor:
    """I_n of a stationary sequence with correlations rho_1 .. rho_{n-1} [n - 1]: 1 + 2 sum_k (1 - k/n) rho_k."""
    n = len(rho) + 1
    k = torch.arange(1, n, dtype=rho.dtype)
    return 1 + 2 * ((1 - k / n) * rho).sum()


def autocorrelation(z: Tensor, answers: Answers, lag: int) -> Statistic:
    """Correlation of tokens `lag` apart within an answer, about the mean of all tokens."""
    z = z.double() - z.double().mean()
    together = answers.answer_ids[lag:] == answers.answer_ids[: len(z) - lag]
    product = torch.zeros_like(z)
    product[: len(together)] = torch.where(together, z[lag:] * z[: len(z) - lag], 0.0)
    pairs = torch.zeros_like(z)
    pairs[: len(together)] = together.double()

    def finish(s: Tensor) -> Tensor:
        return (s[..., 0] / s[..., 1]) / (s[..., 2] / s[..., 3])

    return Statistic(stack(product, pairs, z.square(), torch.ones(len(z))), answers.token_prompts, finish)


def between_share(z: Tensor, answers: Answers) -> Statistic:
    """Share of Var(z) that all tokens of an answer have in common, free of the noise of finite answers.

    One-way analysis of variance: averaging over ever longer answers brings the variance down to this share and no
    further. Small negative values are sampling noise around 0.
    """
    n = answers.lengths.double()
    mean, within = answers.mean(z.double()), answers.covariance_within(z.double(), z.double()) * n

    def finish(s: Tensor) -> Tensor:
        count, tokens, squares, total, between, inside = (s[..., i] for i in range(6))
        size = (tokens - squares / tokens) / (count - 1)
        noise = inside / (tokens - count)
        shared = ((between - total.square() / tokens) / (count - 1) - noise) / size
        return shared / (shared + noise)

    terms = stack(torch.ones(len(n)), n, n.square(), n * mean, n * mean.square(), within)
    return Statistic(terms, answers.prompt_ids, finish)


# ---------------------------------------------------------------- effective sample size


def log_weights(z: Tensor, answers: Answers) -> dict[str, tuple[Tensor, Tensor]]:
    """Log importance weights of every family and the prompt of each: token [N], prefix [N], geo [A], product [A]."""
    z = z.double()
    totals = answers.sum(z)
    before = totals.cumsum(0) - totals
    prefix = z.cumsum(0) - answers.spread(before)
    return {
        "token": (z, answers.token_prompts),
        "prefix": (prefix, answers.token_prompts),
        "geo": (answers.mean(z), answers.prompt_ids),
        "product": (totals, answers.prompt_ids),
    }


def ess(log_weight: Tensor, prompts: Tensor) -> Statistic:
    """Effective sample size (sum w)^2 / (n sum w^2) in (0, 1]; weights shrunk towards 1 have a high one by that alone.

    Independent log-normal weights: exp(-Var log w).
    """
    w = (log_weight.double() - log_weight.max()).exp()

    def finish(s: Tensor) -> Tensor:
        return s[..., 1].square() / (s[..., 0] * s[..., 2])

    return Statistic(stack(torch.ones(len(w)), w, w.square()), prompts, finish)
