"""KL estimators and the KL term of the loss, by exact enumeration of a categorical distribution."""

import pytest
import torch
from loss_batches import F64, gradient, make_batch, make_output

from mcore_rl.algorithms import load
from mcore_rl.functional.policy import kl_estimate, kl_loss

REF = torch.log_softmax(torch.tensor([0.0, 0.5, -0.4], dtype=F64), -1)
OLD = torch.log_softmax(torch.tensor([-0.7, 0.4, 0.2], dtype=F64), -1)


def policy():
    parameters = torch.tensor([0.3, -0.2, 0.9], dtype=F64, requires_grad=True)
    return parameters, torch.log_softmax(parameters, -1)


def grad(value, parameters):
    return torch.autograd.grad(value, parameters, retain_graph=True)[0]


def both_kls(parameters, log_p):
    """Gradients of KL(pi || ref) and KL(ref || pi)."""
    return (
        grad((log_p.exp() * (log_p - REF)).sum(), parameters),
        grad((REF.exp() * (REF - log_p)).sum(), parameters),
    )


def test_estimators_have_the_stated_means():
    _, log_p = policy()
    kl = (log_p.exp() * (log_p - REF)).sum().item()
    mean = {k: (log_p.exp() * kl_estimate(log_p - REF, k)).sum().item() for k in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(kl, rel=1e-12) and mean["k3"] == pytest.approx(kl, rel=1e-12)
    assert abs(mean["k2"] - kl) > 0.01 * kl
    assert (kl_estimate(log_p - REF, "k3") >= 0).all()


def test_gradients_of_the_bare_estimators():
    """As losses on tokens of pi: none for k1, reverse for k2, forward for k3."""
    parameters, log_p = policy()
    reverse, forward = both_kls(parameters, log_p)
    assert (reverse - forward).abs().max() > 0.01
    for estimator, expected in (("k1", torch.zeros(3, dtype=F64)), ("k2", reverse), ("k3", forward)):
        got = grad((log_p.exp().detach() * kl_estimate(log_p - REF, estimator)).sum(), parameters)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_loss_term_has_the_gradient_of_the_reverse_kl(estimator, off_policy):
    """Whatever the estimator, and when the tokens come from an older policy too."""
    parameters, log_p = policy()
    old = OLD if off_policy else log_p.detach()
    reverse, _ = both_kls(parameters, log_p)
    expected_loss = (old.exp() * kl_loss(log_p - REF, log_p - old, estimator)).sum()
    torch.testing.assert_close(grad(expected_loss, parameters), reverse, rtol=1e-10, atol=1e-14)


def test_k1_in_the_reward_has_the_gradient_of_the_reverse_kl():
    parameters, log_p = policy()
    reverse, _ = both_kls(parameters, log_p)
    score_function = (log_p.exp().detach() * (log_p - REF).detach() * log_p).sum()
    torch.testing.assert_close(grad(score_function, parameters), reverse, rtol=1e-10, atol=1e-14)


def test_k2_would_be_biased_if_its_weight_were_differentiated():
    parameters, log_p = policy()
    reverse, _ = both_kls(parameters, log_p)
    weight = (log_p - log_p.detach()).exp()
    got = grad((log_p.exp().detach() * weight * kl_estimate(log_p - REF, "k2")).sum(), parameters)
    assert (got - reverse).abs().max() > 1e-2


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_coefficient_of_each_token(estimator):
    """d loss / d log pi_t by hand: with D the log-ratio to the reference and r the one to the old policy,
    k1: r (D + 1), k2: r D, k3: r (exp(-D) - 1 + D + 1 - exp(-D)) = r D."""
    batch, out = (b := make_batch()), make_output(b)
    plain = gradient(load("grpo"), batch, out)
    with_kl = gradient(load("grpo", kl_coef=0.5, kl_estimator=estimator), batch, out)
    r = (out.logprobs - batch.old_logprobs).exp().detach()
    d = (out.logprobs - batch.ref_logprobs).detach()
    expected = 0.5 * batch.weights * r * (d + 1 if estimator == "k1" else d)
    torch.testing.assert_close(with_kl - plain, expected, rtol=1e-9, atol=1e-15)
