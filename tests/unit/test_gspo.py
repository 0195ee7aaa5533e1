"""GSPO and GSPO-token."""

from dataclasses import replace

import pytest
import torch
from loss_batches import F64, gradient, make_batch, make_output

from mcore_rl.algorithms import load

WIDE = dict(clip_low=1.0, clip_high=1e9)


def sequences(batch, out):
    """(log-ratio, advantages, rows) of each sequence's sampled tokens."""
    z = out.logprobs - batch.old_logprobs
    for i in range(batch.cu_seqlens.numel() - 1):
        rows = (batch.segment_ids == i) & batch.loss_mask
        yield z[rows], batch.advantages[rows], rows


@pytest.mark.parametrize("scale", [1e-4, 0.3])
def test_loss_and_gradient_by_an_independent_formula(scale):
    batch, out = (b := make_batch()), make_output(b, scale=scale)
    terms = []
    for z, a, _ in sequences(batch, out):
        s = torch.exp(z.mean())
        terms.append(torch.minimum(s * a[0], s.clamp(1 - 3e-4, 1 + 4e-4) * a[0]))
    loss = -torch.stack(terms).mean()
    assert load("gspo").loss(batch, out).loss.item() == pytest.approx(loss.item(), rel=1e-13)
    (expected,) = torch.autograd.grad(loss, out.logprobs)
    torch.testing.assert_close(gradient(load("gspo"), batch, out), expected, rtol=1e-12, atol=1e-18)


def test_every_token_of_a_sequence_has_the_same_coefficient():
    """kept * s A / n, and clipping drops whole answers."""
    batch, out = (b := make_batch()), make_output(b, scale=0.3)
    got = gradient(load("gspo"), batch, out)
    dropped = []
    for z, a, rows in sequences(batch, out):
        s = z.mean().exp().item()
        kept = s <= 1 + 4e-4 if a[0] > 0 else s >= 1 - 3e-4
        dropped.append(not kept)
        expected = -a[0].item() * s / len(z) / 4 if kept else 0.0
        assert got[rows].tolist() == pytest.approx([expected] * len(z), rel=1e-12)
    assert any(dropped) and not all(dropped)


@pytest.mark.parametrize("scale", [1e-4, 0.3])
def test_constant_advantages_make_both_variants_equal(scale):
    batch, out = (b := make_batch()), make_output(b, scale=scale)
    results = [load("gspo", token_variant=variant) for variant in (False, True)]
    assert results[0].loss(batch, out).loss.item() == pytest.approx(results[1].loss(batch, out).loss.item(), rel=1e-14)
    grads = [gradient(algorithm, batch, out) for algorithm in results]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-18)


def test_varying_advantages_tell_them_apart():
    """GSPO-token: s A_t / n; through the true s every token gets s mean(A) / n."""
    batch, out = (b := make_batch()), make_output(b, scale=0.3)
    batch = replace(batch, advantages=torch.randn(18, generator=torch.Generator().manual_seed(5), dtype=F64))
    token, whole = (gradient(load("gspo", token_variant=v, **WIDE), batch, out) for v in (True, False))
    for z, a, rows in sequences(batch, out):
        s = z.mean().exp().detach()
        torch.testing.assert_close(token[rows], -s * a / len(z) / 4, rtol=1e-12, atol=0)
        torch.testing.assert_close(whole[rows], -(s * a.mean() / len(z) / 4).expand(len(z)), rtol=1e-12, atol=0)
    assert (token - whole).abs().max() > 0.05


def test_one_token_answers_make_it_grpo():
    batch = make_batch(lengths=(2, 2, 2, 2))
    out = make_output(batch, scale=0.3)
    clips = dict(clip_low=0.2, clip_high=0.28)
    gspo, grpo = load("gspo", **clips), load("grpo", **clips)
    assert gspo.loss(batch, out).loss.item() == pytest.approx(grpo.loss(batch, out).loss.item(), rel=1e-14)
    torch.testing.assert_close(gradient(gspo, batch, out), gradient(grpo, batch, out), rtol=1e-12, atol=0)


def test_equal_log_ratios_make_it_grpo():
    batch = make_batch()
    out = make_output(batch, scale=0.0)
    with torch.no_grad():
        out.logprobs.add_(torch.tensor([0.1, -0.05, 0.02, -0.2], dtype=F64)[batch.segment_ids])
    gspo, grpo = load("gspo", **WIDE), load("grpo", **WIDE)
    torch.testing.assert_close(gradient(gspo, batch, out), gradient(grpo, batch, out), rtol=1e-12, atol=0)


def test_order_of_the_tokens_does_not_matter():
    batch, out = (b := make_batch(lengths=(9,), advantages=(1.5,))), make_output(b, scale=1e-4)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(8)])
    z = (out.logprobs - batch.old_logprobs).detach()
    shuffled = replace(out, logprobs=batch.old_logprobs + z[order])
    losses = [load("gspo", **WIDE).loss(batch, o) for o in (out, shuffled)]
    assert losses[0].loss.item() == pytest.approx(losses[1].loss.item(), rel=1e-14)
    log_s = (losses[0].metrics["policy/sequence_ratio_mean"] / 8).log()
    assert log_s.item() == pytest.approx(z[1:].mean().item(), rel=1e-9)
    assert log_s.abs() <= z[1:].abs().max()


def test_token_mean_would_weigh_answers_by_length():
    """With aggregation token_mean an answer's share of the gradient grows with its length."""
    batch = make_batch(aggregation="token_mean", lengths=(3, 9), advantages=(1.0, 1.0))
    grad = gradient(load("gspo", aggregation="token_mean"), batch, make_output(batch, scale=0.0))
    share = [-grad[batch.segment_ids == i].sum().item() for i in (0, 1)]
    assert share == pytest.approx([0.2, 0.8])
    batch = make_batch(lengths=(3, 9), advantages=(1.0, 1.0))
    grad = gradient(load("gspo"), batch, make_output(batch, scale=0.0))
    assert [-grad[batch.segment_ids == i].sum().item() for i in (0, 1)] == pytest.approx([0.5, 0.5])
