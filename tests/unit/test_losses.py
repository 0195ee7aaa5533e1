"""Identities of the losses in fp64. Parametrised over the folder of algorithms where they hold for all."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loss_batches import F64, cut, gradient, make_batch, make_group, make_output, poisoned

from mcore_rl.algorithms import available, load
from mcore_rl.algorithms.base import Algorithm
from mcore_rl.functional.policy import clipped_surrogate, is_clipped
from mcore_rl.functional.reduce import metric_means, sequence_weights
from mcore_rl.types import PolicyOutput

POLICY_GRADIENT = [name for name in available() if load(name).needs_rollouts]
PAIRS = [name for name in available() if "pairs" in load(name).needs]
ALL_TERMS = [
    (name, {} if name in PAIRS else dict(kl_coef=0.1, entropy_coef=0.01) | fields)
    for name in available()
    for fields in ([{}, dict(correction="tis_seq_geo", correction_high=1.1)] if name in POLICY_GRADIENT else [{}])
]


@pytest.mark.parametrize(("name", "fields"), ALL_TERMS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e6])
def test_masked_positions_change_nothing(name, fields, poison):
    algorithm = load(name, **fields)
    batch = make_batch(aggregation=algorithm.aggregation)
    out = make_output(batch)
    loss, grad = algorithm.loss(batch, out), gradient(algorithm, batch, out)
    bad_out = PolicyOutput(
        torch.where(batch.loss_mask, out.logprobs.detach(), poison).requires_grad_(),
        torch.where(batch.loss_mask, out.entropy.detach(), poison),
    )
    got = algorithm.loss(poisoned(batch, poison), bad_out)
    assert got.loss.item() == loss.loss.item()
    assert torch.equal(gradient(algorithm, poisoned(batch, poison), bad_out), grad)
    assert {k: v.item() for k, v in got.metrics.items()} == {k: v.item() for k, v in loss.metrics.items()}


@pytest.mark.parametrize(("name", "fields"), ALL_TERMS)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_cutting_the_batch_changes_nothing(name, fields, aggregation):
    if name in PAIRS and aggregation != "sequence_sum":
        with pytest.raises(ValueError, match="sequence_sum"):
            load(name, aggregation=aggregation)
        return
    algorithm = load(name, aggregation=aggregation, **fields)
    batch, out = (b := make_batch(aggregation=aggregation)), make_output(b)
    whole = algorithm.loss(batch, out)
    parts = [algorithm.loss(*part) for part in cut(batch, out, 2 if name in PAIRS else 1)]
    assert len(parts) > 1
    assert sum(p.loss for p in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for key, value in whole.metrics.items():
        assert sum(p.metrics[key] for p in parts).item() == pytest.approx(value.item(), rel=1e-12, abs=1e-15)
    (together,) = torch.autograd.grad(sum(p.loss for p in parts), out.logprobs)
    torch.testing.assert_close(together, gradient(algorithm, batch, out), rtol=1e-12, atol=1e-18)


def test_weights_of_a_micro_batch_would_change_the_loss():
    """The negative control of the test above: denominators must be those of the whole mini-batch."""
    algorithm = load("dapo")
    batch, out = (b := make_batch(aggregation="token_mean")), make_output(b)
    local = []
    for part, part_out in cut(batch, out, 2):
        weights = part.loss_mask / part.loss_mask.sum().double()
        local.append(algorithm.loss(replace(part, weights=weights), part_out).loss.item())
    assert abs(sum(local) / len(local) - algorithm.loss(batch, out).loss.item()) > 1e-3


ON_POLICY = [(name, {}) for name in POLICY_GRADIENT] + [
    ("gspo", dict(token_variant=True)),
    ("sapo", dict(tau_positive=0.3, tau_negative=4.0)),
    ("gapo", dict(baseline="group", kl_coef=0.0)),
]


@pytest.mark.parametrize(("name", "fields"), ON_POLICY)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_on_policy_gradient_is_the_policy_gradient(name, fields, aggregation):
    algorithm = load(name, **fields)
    batch = make_batch(aggregation=aggregation)
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


def test_kl_and_entropy_terms_by_hand():
    batch, out = (b := make_batch()), make_output(b)
    plain = load("grpo").loss(batch, out).loss
    both = load("grpo", kl_coef=0.5, entropy_coef=0.25).loss(batch, out).loss
    m, w = batch.loss_mask, batch.weights
    ratio = (out.logprobs - batch.old_logprobs).exp()
    d = out.logprobs - batch.ref_logprobs
    expected = 0.5 * (w * ratio * (torch.exp(-d) - 1 + d))[m].sum() - 0.25 * (w * out.entropy)[m].sum()
    assert (both - plain).item() == pytest.approx(expected.item(), rel=1e-10)


class TestWeights:
    N = torch.tensor([2, 6, 0])

    @pytest.mark.parametrize(
        ("aggregation", "expected"),
        [
            ("token_mean", [1 / 8, 1 / 8, 0]),
            ("sequence_mean", [1 / 4, 1 / 12, 0]),
            ("sequence_sum", [1 / 2, 1 / 2, 0]),
            ("constant", [1 / 20, 1 / 20, 0]),
            ("group_token_mean", [1 / 6, 1 / 10, 0]),
        ],
    )
    def test_by_hand(self, aggregation, expected):
        weights = sequence_weights(self.N, aggregation, max_length=10, group_lengths=torch.tensor([3.0, 5.0, 1.0]))
        assert weights.tolist() == pytest.approx(expected, rel=1e-14)

    def test_equal_lengths_make_both_means_equal(self):
        n = torch.tensor([4, 4])
        assert torch.equal(sequence_weights(n, "token_mean"), sequence_weights(n, "sequence_mean"))

    def test_mistakes(self):
        with pytest.raises(ValueError, match="token_mean"):
            sequence_weights(self.N, "mean")
        with pytest.raises(ValueError, match="max_length"):
            sequence_weights(self.N, "constant")


def test_metric_means():
    totals = {"policy/entropy": 6.0, "num_tokens": 3.0, "pairs/accuracy": 1.0, "num_pairs": 4.0, "fake/score": 0.0}
    assert metric_means(totals | {"num_fake": 0.0}) == {"policy/entropy": 2.0, "pairs/accuracy": 0.25}


class TestRegistry:
    def test_every_file_loads(self):
        assert set(available()) == {"cispo", "dapo", "dpo", "gapo", "grpo", "gspo", "ppo", "sapo", "sft"}
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
            ("grpo", {"clip_low": -0.1}, ">= 0"),
            ("grpo", {"std_mode": "token"}, "group, batch, none"),
            ("grpo", {"baseline": "loo"}, "mean, leave_one_out"),
            ("grpo", {"ddof": 2}, "<= 1"),
            ("grpo", {"correction": "tis"}, "tis_token"),
            ("grpo", {"correction": "icepop_token", "correction_low": 6.0}, "correction_low < correction_high"),
            ("sft", {"correction": "tis_token"}, "no rollout to correct"),
            ("ppo", {"dual_clip": 1.1}, "1 \\+ clip_high"),
            ("ppo", {"lam": 1.5}, "<= 1"),
            ("ppo", {"kl_target": 0.1}, "kl_coef"),
            ("dapo", {"overlong_cache": 10}, "0 < overlong_cache <= overlong_max_length"),
            ("dapo", {"overlong_max_length": 10}, "both 0"),
            ("dpo", {"preference_loss": "dpo"}, "sigmoid, cdpo"),
            ("dpo", {"label_smoothing": 0.1}, "cdpo or robust"),
            ("dpo", {"label_smoothing": 0.5, "preference_loss": "robust"}, "< 0.5"),
            ("dpo", {"beta": 0.0}, "> 0"),
            ("dpo", {"kl_coef": 0.1}, "beta"),
            ("gapo", {"baseline": "mean"}, "critic, group"),
            ("gapo", {"discriminator_objective": "wgan"}, "bradley_terry"),
            ("gapo", {"reward_transform": "log"}, "softplus"),
            ("gapo", {"band_low": 0.95}, "band_high"),
            ("sapo", {"tau_negative": 0.0}, "> 0"),
        ],
    )
    def test_mistakes(self, name, fields, message):
        with pytest.raises(ValueError, match=message):
            load(name, **fields)


def test_unscored_group_is_an_error():
    with pytest.raises(ValueError, match="unscored"):
        assert make_group(1.0, None).rewards is None


def test_the_documented_example():
    page = (Path(__file__).parents[2] / "docs" / "algorithms_math.md").read_text()
    names: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["result"].loss.item() == pytest.approx(-1.1) and names["logprobs"].grad.tolist() == [0, -0.5, 0]
    assert names["result"].metrics["policy/clip_frac"] == 1
