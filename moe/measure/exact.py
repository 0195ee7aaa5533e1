"""The bias of every objective without sampling: all answers of a policy so small that they can be enumerated.

The policy is a table of bigram logits W0; the answers are its own, weighed by their probability, and the gradient is
asked at W0 + alpha dW, where rewards and the true gradient of the expected reward are known exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe.measure.objectives import COEFFICIENTS, coefficients
from moe.measure.stats import Answers

ALPHAS = (0.01, 0.1, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class ExactRow:
    """One objective at one size of the change; medians over seeds.

    Attributes:
        spread: root mean square of the token log-ratio (mean over seeds).
        bias: |E g - g| / |g|.
        variance: trace of the covariance of one answer's gradient / |g|^2.
        cosine: between E g and g.
    """

    alpha: float
    spread: float
    objective: str
    bias: float
    variance: float
    cosine: float

    def error(self, num_answers: int) -> float:
        """Relative mean square error of the gradient from `num_answers` answers: bias^2 + variance / n."""
        return self.bias**2 + self.variance / num_answers


class EnumeratedPolicy:
    """All `num_tokens`^`length` answers of one random policy and one random change of it."""

    def __init__(self, seed: int, alpha: float, num_tokens: int, length: int):
        rng = np.random.default_rng(seed)
        answers = torch.tensor(list(itertools.product(range(num_tokens), repeat=length)))
        previous = torch.cat([torch.full((len(answers), 1), num_tokens), answers[:, :-1]], 1)
        old = torch.from_numpy(rng.normal(0, 0.7, (num_tokens + 1, num_tokens)))
        new = old + alpha * torch.from_numpy(rng.normal(0, 1, (num_tokens + 1, num_tokens)))
        rewards = torch.from_numpy(rng.normal(size=len(answers)))
        logprobs_old, logprobs_new = (w.log_softmax(-1)[previous, answers] for w in (old, new))
        self.length = length
        self.z = logprobs_new - logprobs_old  # [N, T]
        self.mu, p = logprobs_old.sum(1).exp(), logprobs_new.sum(1).exp()
        self.advantages = rewards - (p * rewards).sum()
        # d log p(token | previous) / d W is one-hot minus softmax in the row of `previous`
        by_token = torch.nn.functional.one_hot(answers, num_tokens).double() - new.softmax(-1)[previous]
        self.scores = torch.zeros(*answers.shape, num_tokens + 1, num_tokens, dtype=torch.float64)
        self.scores.scatter_(2, previous[..., None, None].expand(-1, -1, 1, num_tokens), by_token[:, :, None])
        self.scores = self.scores.flatten(2)  # [N, T, P]
        self.true = torch.einsum("n,n,ntp->p", p, self.advantages, self.scores)

    @property
    def spread(self) -> float:
        return float((self.mu[:, None] * self.z.square()).sum().div(self.length).sqrt())

    def measure(self, objective: str) -> tuple[float, float, float]:
        """(relative bias, relative variance of one answer, cosine)."""
        num_answers = len(self.mu)
        each = torch.arange(num_answers)
        answers = Answers(each.repeat_interleave(self.length), each)
        advantages = answers.spread(self.advantages)
        c = coefficients(objective, self.z.flatten(), advantages, answers) * advantages
        gradients = torch.einsum("nt,ntp->np", c.view(num_answers, self.length), self.scores)
        mean = self.mu @ gradients
        variance = float(self.mu @ (gradients - mean).square().sum(1))
        return (
            float((mean - self.true).norm() / self.true.norm()),
            variance / float(self.true @ self.true),
            float(mean @ self.true / (mean.norm() * self.true.norm())),
        )


def exact_bias(
    num_tokens: int = 3, length: int = 6, alphas: Sequence[float] = ALPHAS, num_seeds: int = 6
) -> list[ExactRow]:
    """Every objective at every alpha."""
    rows = []
    for alpha in alphas:
        policies = [EnumeratedPolicy(seed, alpha, num_tokens, length) for seed in range(num_seeds)]
        spread = float(np.mean([policy.spread for policy in policies]))
        for objective in COEFFICIENTS:
            measured: Tensor = torch.tensor([policy.measure(objective) for policy in policies], dtype=torch.float64)
            rows.append(ExactRow(alpha, spread, objective, *(float(np.median(m)) for m in measured.T.numpy())))
    return rows
