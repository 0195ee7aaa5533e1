"""SAPO's gate, and CISPO's weight."""

import math

import pytest
import torch
from loss_batches import F64, gradient, make_batch, make_output

from mcore_rl.algorithms import load


def gate_mass(ratio: float, tau: float) -> float:
    """Coefficient of one token of advantage 1 at `ratio`."""
    batch = make_batch(lengths=(2,), advantages=(1.0,))
    out = make_output(batch, scale=0.0)
    with torch.no_grad():
        out.logprobs.add_(math.log(ratio))
    return -gradient(load("sapo", tau_positive=tau), batch, out)[1].item()


def test_loss_and_coefficient_by_independent_formulas():
    """f(r) = (4 / tau) / (1 + exp(-tau (r - 1))); coefficient A r sech^2(tau (r - 1) / 2)."""
    batch, out = (b := make_batch()), make_output(b, scale=0.5)
    r = (out.logprobs - batch.old_logprobs).exp().detach()
    tau = torch.where(batch.advantages > 0, 1.0, 1.05).double()
    w, a = batch.weights, batch.advantages
    loss = -(w * a * 4 / tau / (1 + torch.exp(-tau * (r - 1)))).sum()
    assert load("sapo").loss(batch, out).loss.item() == pytest.approx(loss.item(), rel=1e-13)
    coefficient = a * r / torch.cosh(tau * (r - 1) / 2).square()
    torch.testing.assert_close(gradient(load("sapo"), batch, out), -w * coefficient, rtol=1e-12, atol=0)


def test_value_on_policy_is_two_over_tau():
    batch = make_batch(advantages=(1.0, 1.0, 1.0, 1.0))
    for tau in (0.5, 1.0, 3.0):
        loss = load("sapo", tau_positive=tau).loss(batch, make_output(batch, scale=0.0)).loss.item()
        assert loss == pytest.approx(-2 / tau, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "mass"), [(0.8, 0.79), (1.0, 1.0), (1.2, 1.19), (2.06, 1.575), (3.47, 1.0), (5.0, 0.35)]
)
def test_shape_of_the_gate(ratio, mass):
    assert gate_mass(ratio, 1.0) == pytest.approx(mass, abs=6e-3)


def test_half_gate():
    for tau in (1.0, 2.5):
        ratio = 1 + 2 / tau * math.acosh(math.sqrt(2))
        assert gate_mass(ratio, tau) == pytest.approx(ratio / 2, rel=1e-12)


def test_small_tau_is_the_unclipped_ratio_at_quadratic_rate():
    batch, out = (b := make_batch()), make_output(b, scale=0.02)
    free = gradient(load("grpo", clip_low=1.0, clip_high=1e9), batch, out)
    error = [
        ((gradient(load("sapo", tau_positive=t, tau_negative=t), batch, out) - free).norm() / free.norm()).item()
        for t in (1e-2, 1e-1, 1.0)
    ]
    assert error[1] / error[0] == pytest.approx(100, rel=0.01) and error[2] / error[1] == pytest.approx(100, rel=0.01)
    assert error[2] < 1e-3


def test_large_tau_leaves_only_tokens_at_ratio_one():
    batch, out = (b := make_batch()), make_output(b, scale=0.3)
    with torch.no_grad():
        out.logprobs[3] = batch.old_logprobs[3]
    grad = gradient(load("sapo", tau_positive=1e5, tau_negative=1e5), batch, out)
    assert grad[3].item() == pytest.approx(-(batch.weights * batch.advantages)[3].item(), rel=1e-12)
    grad[3] = 0
    assert grad.abs().max() < 1e-12


def test_huge_ratios_stay_finite():
    batch = make_batch()
    out = make_output(batch, scale=0.0)
    with torch.no_grad():
        out.logprobs.add_(torch.linspace(-2000, 2000, 18, dtype=F64))
    assert load("sapo").loss(batch, out).loss.isfinite() and gradient(load("sapo"), batch, out).isfinite().all()


def test_mean_gate_is_near_the_gate_of_the_mean():
    """For the gate in the log-ratio, |mean g(z_t) - g(mean z)| <= tau^2 / 4 Var(z), as sup |g''| = tau^2 / 2."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, (mu, sd, u) = int(torch.randint(2, 200, (1,), generator=generator)), torch.rand(3, generator=generator)
        tau = 0.5 + 2.5 * u.item()
        z = (mu - 0.5) + 0.8 * sd * torch.randn(n, generator=generator, dtype=F64)

        def g(x, tau=tau):
            return torch.cosh(tau * x / 2) ** -2

        assert (g(z).mean() - g(z.mean())).abs() <= tau**2 / 4 * z.var(correction=0) + 1e-12


def test_cispo_keeps_every_token_with_a_bounded_weight():
    """A clip(r, min, max), also where a clip of the surrogate would have no gradient."""
    batch, out = (b := make_batch(aggregation="token_mean")), make_output(b, scale=1.5)
    r = (out.logprobs - batch.old_logprobs).exp().detach()
    bounded = r.clamp(0.5, 2.0)
    assert (bounded != r)[batch.loss_mask].any()
    got = gradient(load("cispo", ratio_min=0.5, ratio_max=2.0), batch, out)
    torch.testing.assert_close(got, -batch.weights * batch.advantages * bounded, rtol=1e-12, atol=0)
    assert (got[batch.loss_mask] != 0).all()
