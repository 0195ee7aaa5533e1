"""Group statistics and the token clip."""

import math

import pytest
import torch
from loss_batches import F64, gradient, make_batch, make_group, make_output

from mcore_rl.algorithms import load
from mcore_rl.functional.advantage import group_advantages

R = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)


@pytest.mark.parametrize("k", range(1, 8))
def test_binary_rewards(k):
    a = group_advantages(torch.tensor([1.0] * k + [0.0] * (8 - k), dtype=F64), eps=0)
    assert a[0].item() == pytest.approx(math.sqrt((8 - k) / k), rel=1e-12)
    assert a[-1].item() == pytest.approx(-math.sqrt(k / (8 - k)), rel=1e-12)
    assert a.sum().item() == pytest.approx(0, abs=1e-12)


def test_affine_invariance():
    torch.testing.assert_close(group_advantages(3 * R + 7, eps=0), group_advantages(R, eps=0), rtol=1e-12, atol=0)


def test_bessel_factor():
    ratio = group_advantages(R, eps=0, ddof=0) / group_advantages(R, eps=0, ddof=1)
    torch.testing.assert_close(ratio, torch.full((8,), math.sqrt(8 / 7), dtype=F64), rtol=1e-12, atol=0)


def test_leave_one_out():
    others = torch.stack([torch.cat([R[:i], R[i + 1 :]]).mean() for i in range(8)])
    got = group_advantages(R, baseline="leave_one_out", std_mode="none")
    torch.testing.assert_close(got, R - others, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got, 8 / 7 * (R - R.mean()), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, -1.3, 2.7])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(eps, value, baseline):
    for size in (1, 3, 8):
        a = group_advantages(torch.full((size,), value, dtype=F64), eps=eps, baseline=baseline, ddof=1)
        assert a.tolist() == [0.0] * size


def test_dr_grpo_only_centres():
    algorithm = load("grpo", std_mode="none", aggregation="constant")
    assert algorithm.advantages(make_group(1.0, 0.0, 0.0, 0.0)).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_batch_standard_deviation():
    """Each group has its own mean; the divisor is the deviation of all rewards of the batch about their mean."""
    groups = [make_group(1.0, 0.0), make_group(4.0, 2.0), make_group(3.0, 3.0)]
    std = math.sqrt(sum((x - 13 / 6) ** 2 for x in (1, 0, 4, 2, 3, 3)) / 6)
    got = load("grpo", std_mode="batch", advantage_eps=0.0).batch_advantages(groups)
    assert [a.tolist() for a in got] == [
        pytest.approx([0.5 / std, -0.5 / std]),
        pytest.approx([1 / std, -1 / std]),
        [0.0, 0.0],
    ]


def test_group_modes_do_not_look_at_other_groups():
    groups = [make_group(1.0, 0.0), make_group(4.0, 2.0)]
    algorithm = load("grpo")
    for group, a in zip(groups, algorithm.batch_advantages(groups), strict=True):
        assert torch.equal(a, algorithm.advantages(group))


@pytest.mark.parametrize("name", ["grpo", "ppo", "dapo", "gapo"])
def test_coefficient_is_kept_times_advantage_times_ratio(name):
    algorithm = load(name)
    batch, out = (b := make_batch()), make_output(b)
    ratio = (out.logprobs - batch.old_logprobs).exp().detach()
    a = batch.advantages
    kept = torch.where(a > 0, ratio <= 1 + algorithm.clip_high, ratio >= 1 - algorithm.clip_low)
    assert 0 < (kept & batch.loss_mask).sum() < batch.loss_mask.sum()
    torch.testing.assert_close(gradient(algorithm, batch, out), -batch.weights * kept * a * ratio, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("advantage", "edge", "inside", "outside"), [(1.0, 1.28, -1e-9, 1e-9), (-1.0, 0.8, 1e-9, -1e-9)]
)
def test_gradient_a_step_beside_the_clip_boundary(advantage, edge, inside, outside):
    for step, kept in ((inside, True), (outside, False)):
        batch = make_batch(lengths=(2,), advantages=(advantage,))
        out = make_output(batch, scale=0.0)
        with torch.no_grad():
            out.logprobs.add_(math.log(edge + step))
        got = gradient(load("grpo", clip_high=0.28), batch, out)[1].item()
        assert got == pytest.approx(-advantage * (edge + step) if kept else 0.0, rel=1e-9)


def test_equal_lengths_make_token_mean_and_sequence_mean_the_same():
    algorithm = load("grpo")
    losses = []
    for aggregation in ("token_mean", "sequence_mean"):
        batch = make_batch(aggregation=aggregation, lengths=(4, 4, 4, 4))
        losses.append(algorithm.loss(batch, make_output(batch)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-14)
