"""Identities of the losses in fp64. Parametrised over the folder of algorithms where they hold for all."""

import math
from dataclasses import replace

import pytest
import torch

from mcore_rl.algorithms import available, load
from mcore_rl.algorithms.base import Algorithm
from mcore_rl.functional.advantage import group_advantages
from mcore_rl.functional.policy import clipped_surrogate, is_clipped, kl_estimate
from mcore_rl.functional.reduce import sequence_weights
from mcore_rl.types import PackedBatch, PolicyOutput, Prompt, RolloutGroup, Trajectory

F64 = torch.float64
LENGTHS = (5, 3, 4)  # positions of each segment; the first position of each is prompt


def make_batch(seed=0, aggregation="sequence_mean"):
    g = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    mask = torch.cat([torch.arange(n) >= 1 for n in LENGTHS])
    segments = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    weights = sequence_weights(torch.tensor(LENGTHS) - 1, aggregation, max_length=8)[segments] * mask
    old = -torch.rand(total, generator=g, dtype=F64) - 0.1
    return PackedBatch(
        token_ids=torch.zeros(total, dtype=torch.long),
        targets=torch.zeros(total, dtype=torch.long),
        positions=torch.cat([torch.arange(n) for n in LENGTHS]),
        segment_ids=segments,
        loss_mask=mask,
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        weights=weights,
        advantages=torch.tensor([1.5, -0.5, -1.0], dtype=F64)[segments],
        old_logprobs=old,
        rollout_logprobs=old.clone(),
        ref_logprobs=-torch.rand(total, generator=g, dtype=F64) - 0.1,
    )


def make_output(batch, scale=0.3, seed=1):
    g = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(batch.old_logprobs.numel(), generator=g, dtype=F64)
    logprobs = (batch.old_logprobs + noise).requires_grad_()
    return PolicyOutput(logprobs, torch.rand(logprobs.numel(), generator=g, dtype=F64).requires_grad_())


def gradient(algorithm, batch, out):
    return torch.autograd.grad(algorithm.loss(batch, out).loss, out.logprobs)[0]


POLICY_GRADIENT = [name for name in available() if load(name).needs_rollouts]


@pytest.mark.parametrize("name", available())
def test_masked_positions_change_nothing(name):
    algorithm = load(name, kl_coef=0.1, entropy_coef=0.01)
    batch = make_batch(aggregation=algorithm.aggregation)
    out = make_output(batch)
    loss, grad = algorithm.loss(batch, out), gradient(algorithm, batch, out)
    for poison in (math.nan, math.inf, 1e6):
        bad = {
            f: torch.where(batch.loss_mask, getattr(batch, f), poison)
            for f in ("weights", "advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs")
        }
        poisoned = replace(batch, **bad)
        poisoned_out = PolicyOutput(
            torch.where(batch.loss_mask, out.logprobs.detach(), poison).requires_grad_(),
            torch.where(batch.loss_mask, out.entropy.detach(), poison),
        )
        got = algorithm.loss(poisoned, poisoned_out)
        assert got.loss.item() == loss.loss.item()
        assert torch.equal(gradient(algorithm, poisoned, poisoned_out), grad)
        assert {k: v.item() for k, v in got.metrics.items()} == {k: v.item() for k, v in loss.metrics.items()}


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_cutting_the_batch_changes_nothing(name, aggregation):
    algorithm = load(name, aggregation=aggregation, kl_coef=0.1, entropy_coef=0.01)
    batch, out = (b := make_batch(aggregation=aggregation)), make_output(b)
    whole = algorithm.loss(batch, out)
    parts = []
    for i, n in enumerate(LENGTHS):
        rows = batch.segment_ids == i
        cut = {
            f: getattr(batch, f)[rows]
            for f in batch.__dataclass_fields__
            if f not in ("cu_seqlens",) and getattr(batch, f) is not None
        }
        cut["segment_ids"] = cut["segment_ids"] - i
        part = replace(batch, **cut, cu_seqlens=torch.tensor([0, n]).int())
        parts.append(algorithm.loss(part, PolicyOutput(out.logprobs[rows], out.entropy[rows])))
    assert sum(p.loss for p in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for name_, value in whole.metrics.items():
        assert sum(p.metrics[name_] for p in parts).item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_on_policy_gradient_is_the_policy_gradient(name):
    algorithm = load(name)
    batch = make_batch(aggregation=algorithm.aggregation)
    out = make_output(batch, scale=0.0)
    torch.testing.assert_close(gradient(algorithm, batch, out), -batch.weights * batch.advantages, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_no_advantage_no_gradient(name):
    batch = replace(b := make_batch(), advantages=torch.zeros_like(b.advantages))
    assert gradient(load(name), batch, make_output(batch)).abs().max().item() == 0


def test_grpo_coefficient_is_kept_times_advantage_times_ratio():
    algorithm = load("grpo")
    batch, out = (b := make_batch()), make_output(b, scale=0.3)
    ratio = (out.logprobs - batch.old_logprobs).exp().detach()
    a = batch.advantages
    kept = torch.where(a > 0, ratio <= 1.2, ratio >= 0.8)
    assert 0 < (kept & batch.loss_mask).sum() < batch.loss_mask.sum()
    torch.testing.assert_close(gradient(algorithm, batch, out), -batch.weights * kept * a * ratio, rtol=1e-12, atol=0)


def test_sft_is_negative_log_likelihood():
    batch = make_batch(aggregation="token_mean")
    out = make_output(batch)
    nll = -out.logprobs[batch.loss_mask].mean()
    assert load("sft").loss(batch, out).loss.item() == pytest.approx(nll.item(), rel=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 1.0, -1.2, True),
        (0.5, 1.0, -0.5, False),
        (1.5, -1.0, 1.5, False),
        (0.5, -1.0, 0.8, True),
        (1.1, 2.0, -2.2, False),
    ],
)
def test_clip_by_hand(ratio, advantage, loss, clipped):
    r, a = torch.tensor([ratio], dtype=F64), torch.tensor([advantage], dtype=F64)
    assert clipped_surrogate(r, a, 0.2, 0.2).item() == pytest.approx(loss)
    assert is_clipped(r, a, 0.2, 0.2).item() is clipped


def test_kl_estimators_by_enumeration():
    """On a categorical: E[k1] = E[k3] = KL; gradients as losses as stated in the docstring."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=F64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.0, 0.5, -0.4], dtype=F64), -1)
    log_p = torch.log_softmax(logits, -1)
    p, d = log_p.exp(), log_p - ref
    kl = (p * d).sum()
    reverse, forward = (
        torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (kl, (ref.exp() * (ref - log_p)).sum())
    )
    fixed = p.detach()
    for estimator, expected in (("k1", torch.zeros(3, dtype=F64)), ("k2", reverse), ("k3", forward)):
        grad = torch.autograd.grad((fixed * kl_estimate(d, estimator)).sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)
    assert (fixed * kl_estimate(d, "k3")).sum().item() == pytest.approx(kl.item(), rel=1e-12)
    weighted = (fixed * (log_p - log_p.detach()).exp() * kl_estimate(d, "k3")).sum()
    torch.testing.assert_close(torch.autograd.grad(weighted, logits)[0], reverse, rtol=1e-10, atol=1e-14)


def test_kl_and_entropy_terms_by_hand():
    batch, out = (b := make_batch()), make_output(b)
    plain = load("grpo").loss(batch, out).loss
    both = load("grpo", kl_coef=0.5, entropy_coef=0.25).loss(batch, out).loss
    m, w = batch.loss_mask, batch.weights
    ratio = (out.logprobs - batch.old_logprobs).exp()
    d = out.logprobs - batch.ref_logprobs
    expected = 0.5 * (w * ratio * (torch.exp(-d) - 1 + d))[m].sum() - 0.25 * (w * out.entropy)[m].sum()
    assert (both - plain).item() == pytest.approx(expected.item(), rel=1e-10)


class TestGroupAdvantages:
    R = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)

    def test_binary_rewards(self):
        a = group_advantages(self.R, eps=0)  # k=3 of G=8
        assert a[0].item() == pytest.approx(math.sqrt(5 / 3)) and a[1].item() == pytest.approx(-math.sqrt(3 / 5))
        assert a.sum().item() == pytest.approx(0, abs=1e-12)

    def test_affine_invariance(self):
        torch.testing.assert_close(group_advantages(3 * self.R + 7, eps=0), group_advantages(self.R, eps=0))

    def test_bessel_factor(self):
        torch.testing.assert_close(
            group_advantages(self.R, eps=0, ddof=0), group_advantages(self.R, eps=0, ddof=1) * math.sqrt(8 / 7)
        )

    def test_equal_rewards_give_zero(self):
        assert group_advantages(torch.full((4,), 0.7, dtype=F64)).abs().max() < 1e-9

    def test_without_std(self):
        torch.testing.assert_close(group_advantages(self.R, normalise_std=False), self.R - 3 / 8)

    def test_one_member(self):
        assert group_advantages(torch.tensor([2.0], dtype=F64), ddof=1).item() == 0


class TestWeights:
    N = torch.tensor([2, 6, 0])

    @pytest.mark.parametrize(
        ("aggregation", "expected"),
        [
            ("token_mean", [1 / 8, 1 / 8, 0]),
            ("sequence_mean", [1 / 4, 1 / 12, 0]),
            ("sequence_sum", [1 / 2, 1 / 2, 0]),
            ("constant", [1 / 20, 1 / 20, 0]),
        ],
    )
    def test_by_hand(self, aggregation, expected):
        assert sequence_weights(self.N, aggregation, max_length=10).tolist() == pytest.approx(expected, rel=1e-14)

    def test_equal_lengths_make_both_means_equal(self):
        n = torch.tensor([4, 4])
        assert torch.equal(sequence_weights(n, "token_mean"), sequence_weights(n, "sequence_mean"))

    def test_mistakes(self):
        with pytest.raises(ValueError, match="token_mean"):
            sequence_weights(self.N, "mean")
        with pytest.raises(ValueError, match="max_length"):
            sequence_weights(self.N, "constant")


class TestRegistry:
    def test_every_file_loads(self):
        assert {"grpo", "sft"} <= set(available())
        assert all(isinstance(load(name), Algorithm) for name in available())

    @pytest.mark.parametrize(
        ("name", "fields", "message"),
        [
            ("grppo", {}, "did you mean 'grpo'"),
            ("grpo", {"clip_hi": 1}, "did you mean 'clip_high'"),
            ("grpo", {"clip_low": "x"}, "expected float"),
            ("grpo", {"kl_coef": -1.0}, ">= 0"),
            ("grpo", {"kl_estimator": "k4"}, "k1, k2, k3"),
            ("grpo", {"aggregation": "mean"}, "token_mean"),
            ("grpo", {"clip_low": True}, "expected float"),
        ],
    )
    def test_mistakes(self, name, fields, message):
        with pytest.raises(ValueError, match=message):
            load(name, **fields)


def test_unscored_group_is_an_error():
    trajectory = Trajectory((1,), (2,), (-0.1,), "stop", 0)
    with pytest.raises(ValueError, match="unscored"):
        assert RolloutGroup(Prompt("p/0", (1,), "x"), (trajectory,)).rewards is None
