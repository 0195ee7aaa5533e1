"""Weights against the mismatch of trainer and rollout engine."""

import math
from dataclasses import replace

import pytest
import torch
from loss_batches import F64, gradient, make_batch, make_output

from mcore_rl.algorithms import available, load
from mcore_rl.functional.correction import CORRECTIONS, correction_weights

# two sequences of three positions, the first of each not sampled
MASK = torch.tensor([False, True, True, False, True, True])
SEGMENTS = torch.tensor([0, 0, 0, 1, 1, 1])
RHO = torch.tensor([1.0, 2.0, 8.0, 1.0, 0.25, 1.0], dtype=F64)  # products 16 and 1/4, geometric means 4 and 1/2


@pytest.mark.parametrize(
    ("kind", "low", "high", "first", "second"),
    [
        ("none", 0, 1, [1, 1], [1, 1]),
        ("tis_token", 0, 3, [2, 3], [0.25, 1]),
        ("tis_token", 0.5, 3, [2, 3], [0.25, 1]),  # truncation has no lower bound
        ("icepop_token", 0.5, 5, [2, 0], [0, 1]),
        ("icepop_token", 0.2, 9, [2, 8], [0.25, 1]),
        ("tis_seq_geo", 0, 3, [3, 3], [0.5, 0.5]),
        ("mask_seq_geo", 0.4, 3, [0, 0], [1, 1]),
        ("mask_seq_geo", 0.6, 4.5, [1, 1], [0, 0]),
        ("tis_seq_product", 0, 9, [9, 9], [0.25, 0.25]),
        ("mask_seq_product", 0.2, 9, [0, 0], [1, 1]),
        ("tis_seq_product", 0, math.inf, [16, 16], [0.25, 0.25]),
    ],
)
def test_by_hand(kind, low, high, first, second):
    weight = correction_weights(RHO.log().requires_grad_(), MASK, SEGMENTS, kind=kind, low=low, high=high)
    assert not weight.requires_grad
    assert weight[MASK].tolist() == pytest.approx([*first, *second], rel=1e-12)


def test_extreme_log_ratios_stay_finite():
    log_rho = torch.tensor([0.0, 2000.0, 0.0, 0.0, -2000.0, 0.0], dtype=F64)
    for kind, (low, high) in CORRECTIONS.items():
        assert correction_weights(log_rho, MASK, SEGMENTS, kind=kind, low=low, high=high).isfinite().all()


def test_unknown_kind():
    with pytest.raises(ValueError, match="tis_token"):
        correction_weights(RHO, MASK, SEGMENTS, kind="tis", low=0, high=1)


@pytest.mark.parametrize("name", [n for n in available() if load(n).needs_rollouts])
@pytest.mark.parametrize("kind", [k for k in CORRECTIONS if k != "none"])
def test_weighs_the_policy_gradient_term_only_and_is_not_differentiated(name, kind):
    batch, out = (b := make_batch()), make_output(b)
    terms = dict(kl_coef=0.1, entropy_coef=0.05)
    if name in ("ppo", "gapo"):
        terms["kl_in_reward"] = False
    if name == "gspo":  # a weight a token needs a gradient a token
        terms["token_variant"] = kind.endswith("_token")
    low, high = 0.8, 1.1
    plain = gradient(load(name, **terms | dict(kl_coef=0.0)), batch, out)
    with_kl = gradient(load(name, **terms), batch, out)
    algorithm = load(name, correction=kind, correction_low=low, correction_high=high, **terms)
    d = torch.where(batch.loss_mask, batch.old_logprobs - batch.rollout_logprobs, 0.0)
    weight = correction_weights(d, batch.loss_mask, batch.segment_ids, kind=kind, low=low, high=high)
    assert weight[batch.loss_mask].min() < weight[batch.loss_mask].max()
    torch.testing.assert_close(
        gradient(algorithm, batch, out), weight * plain + (with_kl - plain), rtol=1e-9, atol=1e-15
    )
    metrics = algorithm.loss(batch, out).metrics
    assert metrics["policy/correction_mean"].item() == pytest.approx(weight[batch.loss_mask].sum().item())
    assert metrics["policy/correction_masked_frac"].item() == (weight[batch.loss_mask] == 0).sum().item()
    (entropy_grad,) = torch.autograd.grad(algorithm.loss(batch, out).loss, out.entropy)
    torch.testing.assert_close(entropy_grad, -0.05 * batch.weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", list(CORRECTIONS))
def test_without_mismatch_nothing_changes(kind):
    batch = replace(b := make_batch(), rollout_logprobs=b.old_logprobs)
    out = make_output(batch)
    got = load("grpo", correction=kind).loss(batch, out).loss.item()
    assert got == pytest.approx(load("grpo").loss(batch, out).loss.item(), rel=1e-14)


def test_token_weights_do_not_go_with_one_ratio_a_sequence():
    with pytest.raises(ValueError, match="token_variant=true"):
        load("gspo", correction="icepop_token")


def test_default_bounds_are_those_of_the_kind():
    assert load("grpo", correction="icepop_token").correction_bounds == (0.5, 5.0)
    assert load("grpo", correction="icepop_token", correction_high=2.0).correction_bounds == (0.5, 2.0)
    assert load("grpo", correction="tis_token").correction_bounds == (0.0, 2.0)
