"""Bias of each ratio by exact enumeration: all answers of a small bigram policy are summed, nothing is sampled.

A policy theta = W0 + alpha dW is trained on answers of mu = W0. The expected gradient of every loss, weighed with the
probability of each answer under mu, is compared with the true gradient of the expected reward. Medians over six seeds.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from loss_batches import F64

from mcore_rl.algorithms import load
from mcore_rl.types import PolicyOutput, WeightedBatch

V, T = 3, 6
ALPHAS = (0.01, 0.1, 0.3, 0.6, 1.0)
FREE = dict(clip_low=1.0, clip_high=1e9)
METHODS = {
    "no ratio": load("cispo", ratio_min=1.0, ratio_max=1.0),
    "token": load("grpo", **FREE),
    "SAPO": load("sapo"),
    "geo": load("gspo", **FREE),
    "geo token": load("gspo", token_variant=True, **FREE),
    "clip": load("grpo"),
}
RELATIVE_BIAS = {  # alpha: spread of the log-ratio, then each method's
    0.01: (0.006, {"no ratio": 0.0148, "token": 0.0105, "SAPO": 0.0105, "geo": 0.0123, "clip": 0.0105}),
    0.1: (0.055, {"no ratio": 0.168, "token": 0.116, "SAPO": 0.115, "geo": 0.138, "clip": 0.184}),
    0.3: (0.167, {"no ratio": 0.629, "token": 0.423, "SAPO": 0.415, "geo": 0.504, "clip": 2.53}),
    0.6: (0.340, {"no ratio": 0.791, "token": 0.849, "SAPO": 0.836, "geo": 0.652, "clip": 2.69}),
    1.0: (0.585, {"no ratio": 0.862, "token": 0.935, "SAPO": 0.908, "geo": 0.723, "clip": 2.69}),
}
ANSWERS = torch.tensor(list(itertools.product(range(V), repeat=T)))
PREVIOUS = torch.cat([torch.full((len(ANSWERS), 1), V), ANSWERS[:, :-1]], 1)


def token_logprobs(weights):
    return torch.log_softmax(weights, -1)[PREVIOUS, ANSWERS]  # [N, T]


class Case:
    """One seed and one alpha: the batch of all answers, and the true gradient."""

    def __init__(self, seed: int, alpha: float):
        rng = np.random.default_rng(seed)
        start = torch.from_numpy(rng.normal(0, 0.7, (V + 1, V)))
        step = torch.from_numpy(rng.normal(0, 1, (V + 1, V)))
        rewards = torch.from_numpy(rng.normal(size=len(ANSWERS)))
        self.weights = (start + alpha * step).requires_grad_()
        self.now, self.mu = token_logprobs(self.weights), token_logprobs(start)
        p = self.now.sum(1).exp()
        self.true = torch.autograd.grad((p * rewards).sum(), self.weights, retain_graph=True)[0]
        self.advantages = rewards - (p * rewards).sum().detach()
        z = (self.now - self.mu).detach()
        self.spread = (self.mu.sum(1).exp()[:, None] * z.square()).sum().div(T).sqrt().item()

    def bias(self, algorithm, old=None) -> float:
        """|E g - g| / |g|; `old` is what the trainer calls pi_old, mu if left out."""
        n = len(ANSWERS)

        def spread(x):
            return x[:, None].expand(n, T).reshape(-1)

        batch = WeightedBatch(
            token_ids=ANSWERS.reshape(-1),
            targets=ANSWERS.reshape(-1),
            positions=torch.arange(T).repeat(n),
            segment_ids=spread(torch.arange(n)),
            loss_mask=torch.ones(n * T, dtype=torch.bool),
            cu_seqlens=torch.arange(n + 1) * T,
            labels=torch.zeros(n, dtype=torch.long),
            weights=spread(self.mu.sum(1).exp()),
            advantages=spread(self.advantages),
            old_logprobs=(self.mu if old is None else old).reshape(-1),
            rollout_logprobs=self.mu.reshape(-1),
        )
        out = PolicyOutput(self.now.reshape(-1), torch.zeros(n * T, dtype=F64))
        grad = -torch.autograd.grad(algorithm.loss(batch, out).loss, self.weights, retain_graph=True)[0]
        return ((grad - self.true).norm() / self.true.norm()).item()


@pytest.fixture(scope="module")
def cases():
    return {alpha: [Case(seed, alpha) for seed in range(6)] for alpha in ALPHAS}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_ratio_but_the_product_is_biased(cases, alpha):
    spread, expected = RELATIVE_BIAS[alpha]
    assert np.mean([c.spread for c in cases[alpha]]) == pytest.approx(spread, abs=6e-4)
    got = {name: float(np.median([c.bias(a) for c in cases[alpha]])) for name, a in METHODS.items()}
    assert got.pop("geo token") == pytest.approx(got["geo"], rel=1e-9)
    assert got == pytest.approx(expected, rel=6e-3)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_product_is_unbiased(cases, alpha):
    """mu is the engine, pi_old = pi the trainer: the product of all rho is the likelihood ratio of the answer."""
    algorithm = load("grpo", correction="tis_seq_product", correction_high=math.inf)
    assert max(c.bias(algorithm, old=c.now.detach()) for c in cases[alpha]) < 1e-12
    truncated = load("grpo", correction="tis_seq_product", correction_high=1.001)
    assert min(c.bias(truncated, old=c.now.detach()) for c in cases[alpha]) > 1e-6


@pytest.mark.parametrize("kind", ["tis_token", "icepop_token", "tis_seq_geo", "mask_seq_geo", "mask_seq_product"])
def test_no_other_correction_is_unbiased(cases, kind):
    algorithm = load("grpo", correction=kind, correction_low=0.0, correction_high=1e9)
    assert min(c.bias(algorithm, old=c.now.detach()) for c in cases[0.1]) > 0.01
