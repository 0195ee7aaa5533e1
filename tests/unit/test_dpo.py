"""DPO and its variants on packed pairs."""

import math
from dataclasses import replace

import pytest
import torch
from loss_batches import F64, gradient, make_batch, make_output

from mcore_rl.algorithms import load
from mcore_rl.data.sequences import Sample
from mcore_rl.functional.preference import PREFERENCE_LOSSES, preference_loss
from mcore_rl.types import PolicyOutput
from tools.bench.batches import pack_mini_batch

BETA = 0.1


def loss_and_slope(kind, margin, beta=BETA, e=0.0):
    delta = torch.tensor(margin, dtype=F64, requires_grad=True)
    loss = preference_loss(delta, kind, beta=beta, label_smoothing=e)
    return loss.item(), torch.autograd.grad(loss, delta)[0].item()


def sigma(x):
    return 1 / (1 + math.exp(-x))


class TestPreferenceLoss:
    def test_at_the_start(self):
        assert loss_and_slope("sigmoid", 0.0) == pytest.approx((math.log(2), -BETA / 2), rel=1e-14)
        assert loss_and_slope("ipo", 0.0) == pytest.approx((1 / (4 * BETA**2), -1 / BETA), rel=1e-14)
        assert loss_and_slope("hinge", 0.0) == pytest.approx((1.0, -BETA))

    @pytest.mark.parametrize("margin", [-7.0, -0.3, 0.0, 2.0, 30.0])
    def test_sigmoid_by_hand(self, margin):
        h = BETA * margin
        assert loss_and_slope("sigmoid", margin) == pytest.approx((-math.log(sigma(h)), -BETA * sigma(-h)), rel=1e-12)

    def test_label_smoothing_is_stationary_where_the_labels_are_right_that_often(self):
        margin = math.log(0.9 / 0.1) / BETA
        assert loss_and_slope("cdpo", margin, e=0.1)[1] == pytest.approx(0, abs=1e-15)
        assert loss_and_slope("cdpo", margin - 1, e=0.1)[1] < 0 < loss_and_slope("cdpo", margin + 1, e=0.1)[1]
        assert loss_and_slope("cdpo", 0.0, e=0.5)[1] == 0

    def test_robust_is_unbiased_under_flipped_labels(self):
        for margin in (-4.0, 1.3, 20.0):
            right, flipped = (loss_and_slope("robust", m, e=0.1)[0] for m in (margin, -margin))
            assert 0.9 * right + 0.1 * flipped == pytest.approx(loss_and_slope("sigmoid", margin)[0], rel=1e-12)

    def test_ipo_wants_a_finite_margin(self):
        assert loss_and_slope("ipo", 1 / (2 * BETA)) == (0.0, 0.0)
        assert loss_and_slope("ipo", 7.0)[1] == pytest.approx(2 * (7.0 - 5.0))

    def test_hinge_is_flat_beyond_one(self):
        assert loss_and_slope("hinge", 12.0) == (0.0, 0.0) and loss_and_slope("hinge", 4.0)[1] == -BETA

    def test_no_smoothing_is_the_sigmoid(self):
        for kind in ("cdpo", "robust"):
            assert loss_and_slope(kind, 1.7) == loss_and_slope("sigmoid", 1.7)

    def test_unknown(self):
        with pytest.raises(ValueError, match="sigmoid, cdpo"):
            preference_loss(torch.zeros(1), "dpo", beta=0.1)


def pair_batch():
    return make_batch(aggregation="sequence_sum")


def sums(x, batch):
    """Of the sampled tokens of each sequence."""
    return [x[(batch.segment_ids == i) & batch.loss_mask].sum() for i in range(4)]


@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
@pytest.mark.parametrize("normalised", [False, True])
def test_loss_and_gradient_by_an_independent_formula(kind, normalised):
    e = 0.1 if kind in ("cdpo", "robust") else 0.0
    algorithm = load(
        "dpo", preference_loss=kind, beta=0.7, label_smoothing=e, length_normalised=normalised, nll_coef=0.3
    )
    batch, out = (b := pair_batch()), make_output(b, scale=0.5)
    n = [4, 2, 3, 5]
    lp, ref = sums(out.logprobs, batch), sums(batch.ref_logprobs, batch)
    ratio = [(a - b) / (k if normalised else 1) for a, b, k in zip(lp, ref, n)]
    total = 0
    for win, lose in ((0, 1), (2, 3)):
        h = 0.7 * (ratio[win] - ratio[lose])
        good, bad = -torch.log(1 / (1 + torch.exp(-h))), -torch.log(1 / (1 + torch.exp(h)))
        total = (
            total
            + {
                "sigmoid": good,
                "cdpo": 0.9 * good + 0.1 * bad,
                "robust": (0.9 * good - 0.1 * bad) / 0.8,
                "hinge": torch.clamp(1 - h, min=0),
                "ipo": (ratio[win] - ratio[lose] - 1 / 1.4) ** 2,
            }[kind]
        )
        total = total - 0.3 * lp[win] / n[win]
    expected = total / 2
    assert algorithm.loss(batch, out).loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(expected, out.logprobs)
    torch.testing.assert_close(gradient(algorithm, batch, out), grad, rtol=1e-11, atol=1e-16)


def test_first_step_is_the_plain_contrast():
    """Where the policy is the reference: loss log 2, a tie, and -beta / 2 times chosen minus rejected."""
    batch = replace(b := pair_batch(), old_logprobs=b.ref_logprobs)
    out = make_output(batch, scale=0.0)
    result = load("dpo").loss(batch, out)
    assert result.loss.item() == pytest.approx(math.log(2), rel=1e-14)
    got = {k: v.item() for k, v in result.metrics.items()}
    assert got["num_pairs"] == 2 and got["pairs/accuracy"] == 1.0 and got["pairs/margin"] == 0
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)[batch.segment_ids]
    expected = -BETA / 2 * sign * batch.loss_mask / 2
    torch.testing.assert_close(gradient(load("dpo"), batch, out), expected, rtol=1e-12, atol=0)


def test_coefficient_of_each_token():
    """-beta sigma(-h) on tokens of the chosen answer, its negative on those of the rejected one."""
    batch, out = (b := pair_batch()), make_output(b, scale=0.5)
    d = [x.item() for x in sums(out.logprobs - batch.ref_logprobs, batch)]
    grad = gradient(load("dpo"), batch, out)
    for win, lose in ((0, 1), (2, 3)):
        c = BETA * sigma(-BETA * (d[win] - d[lose])) / 2
        for i, expected in ((win, -c), (lose, c)):
            tokens = grad[(batch.segment_ids == i) & batch.loss_mask]
            assert tokens.tolist() == pytest.approx([expected] * len(tokens), rel=1e-12)


def test_metrics_and_swapped_pairs():
    batch = make_batch(aggregation="sequence_sum", lengths=(4, 4, 4, 4))
    out = make_output(batch, scale=0.5)
    order = torch.arange(16).view(4, 4)[[1, 0, 3, 2]].reshape(-1)
    swapped = replace(batch, ref_logprobs=batch.ref_logprobs[order])
    there = {k: v.item() for k, v in load("dpo").loss(batch, out).metrics.items()}
    back_out = PolicyOutput(out.logprobs[order], out.entropy[order])
    back = {k: v.item() for k, v in load("dpo").loss(swapped, back_out).metrics.items()}
    d = [x.item() for x in sums(out.logprobs - batch.ref_logprobs, batch)]
    assert there["pairs/chosen_reward"] == pytest.approx(BETA * (d[0] + d[2]), rel=1e-12)
    assert there["pairs/rejected_reward"] == pytest.approx(BETA * (d[1] + d[3]), rel=1e-12)
    assert there["pairs/accuracy"] == (d[0] > d[1]) + (d[2] > d[3])
    assert there["pairs/margin"] == pytest.approx(there["pairs/chosen_reward"] - there["pairs/rejected_reward"])
    assert back["pairs/margin"] == pytest.approx(-there["pairs/margin"], rel=1e-12)
    assert back["pairs/accuracy"] == 2 - there["pairs/accuracy"]


def test_padding_has_no_part_in_it():
    """As packed for training: shares 1 / pairs in fp32, one and two segments of padding, or nothing else at all."""
    algorithm = load("dpo")
    samples = [Sample(tuple(range(n + 2)), n, 0.0, (0.0,) * n) for n in (3, 1)]
    results = []
    for multiple in (1, 7):  # four and two positions, then one more of padding
        (batch,) = pack_mini_batch(
            samples, algorithm, rank=0, num_ranks=1, budget=99, max_response=9, multiple=multiple
        )
        batch = replace(batch, ref_logprobs=torch.full_like(batch.old_logprobs, -1.0))
        logprobs = torch.where(batch.segment_ids == 0, -0.5, -2.0).requires_grad_()
        result = algorithm.loss(batch, PolicyOutput(logprobs, torch.ones_like(logprobs)))
        results.append({k: v.item() for k, v in result.metrics.items()} | {"loss": result.loss.item()})
    assert results[0] == results[1] and results[0]["num_pairs"] == 1
    assert results[0]["loss"] == pytest.approx(-math.log(sigma(BETA * (1.5 + 1.0))), rel=1e-6)
    for rest in (1, 7):
        idle = [Sample((1, 2, 3), 0, 0.0, ())]
        (batch,) = pack_mini_batch(idle, algorithm, rank=0, num_ranks=1, budget=99, max_response=9, multiple=rest)
        batch = replace(batch, ref_logprobs=torch.zeros_like(batch.old_logprobs))
        logprobs = torch.zeros_like(batch.old_logprobs).requires_grad_()
        result = algorithm.loss(batch, PolicyOutput(logprobs, torch.zeros_like(logprobs)))
        assert result.loss.item() == 0 and result.metrics["num_pairs"] == 0
        assert torch.autograd.grad(result.loss, logprobs)[0].abs().max() == 0
