"""PPO beyond the token clip: dual clip, rewards with KL, whitening, critic loss, adaptive KL."""

import math
from dataclasses import replace

import pytest
import torch
from loss_batches import F64, cut, gradient, make_batch, make_output, poisoned

from mcore_rl.algorithms import load
from mcore_rl.functional.policy import clipped_surrogate
from mcore_rl.functional.reward import adaptive_kl_coef
from mcore_rl.functional.value import clipped_value_loss, explained_variance


def test_dual_clip_bounds_the_ratio_of_negative_advantages():
    """The same as bounding r by c before the clip, in value and gradient (c > 1 + clip_high)."""
    g = torch.Generator().manual_seed(0)
    log_r = (1.5 * torch.randn(400, generator=g, dtype=F64)).requires_grad_()
    a = torch.randn(400, generator=g, dtype=F64)
    r = log_r.exp()
    ours = clipped_surrogate(r, a, 0.2, 0.2, dual_clip=3.0)
    bounded = -torch.minimum(r.clamp(max=3.0) * a, r.clamp(0.8, 1.2) * a)
    assert torch.equal(ours, bounded)
    grads = [torch.autograd.grad(x.sum(), log_r, retain_graph=True)[0] for x in (ours, bounded)]
    assert torch.equal(*grads)
    assert not torch.equal(ours, clipped_surrogate(r, a, 0.2, 0.2))


def test_dual_clip_by_hand():
    algorithm = load("ppo", dual_clip=2.0)
    batch = make_batch(lengths=(2,), advantages=(-1.5,))
    out = make_output(batch, scale=0.0)
    with torch.no_grad():
        out.logprobs.add_(math.log(5.0))
    result = algorithm.loss(batch, out)
    assert result.loss.item() == pytest.approx(3.0) and result.metrics["policy/dual_clip_frac"].item() == 1
    assert gradient(algorithm, batch, out).abs().max() == 0
    assert load("ppo", dual_clip=0.0).loss(batch, out).loss.item() == pytest.approx(7.5)


def test_without_clip_the_coefficient_is_advantage_times_ratio():
    algorithm = load("ppo", clip_low=1.0, clip_high=1e9, dual_clip=0.0)
    batch, out = (b := make_batch()), make_output(b, scale=1.0)
    r = (out.logprobs - batch.old_logprobs).exp().detach()
    torch.testing.assert_close(
        gradient(algorithm, batch, out), -batch.weights * batch.advantages * r, rtol=1e-12, atol=0
    )


class TestTokenAdvantages:
    def test_by_hand(self):
        """Two tokens, then one: rewards -0.5 log(pi_old / ref), and the score 2 or -1 at the end."""
        batch = replace(
            make_batch(lengths=(3, 2), advantages=(2.0, -1.0)),
            old_logprobs=torch.tensor([9.0, -1.0, -2.0, 9.0, -3.0], dtype=F64),
            ref_logprobs=torch.tensor([7.0, -1.4, -1.8, 7.0, -3.0], dtype=F64),
            values=torch.tensor([5.0, 0.3, 0.7, 5.0, -0.2], dtype=F64),
        )
        algorithm = load("ppo", kl_coef=0.5, lam=0.5, whiten=False)
        got, sums = algorithm.token_advantages(batch)
        r = [-0.5 * 0.4, -0.5 * -0.2 + 2.0, -1.0]
        second = r[1] - 0.7
        first = r[0] + 0.7 - 0.3 + 0.5 * second
        third = r[2] + 0.2
        assert got.advantages.tolist() == pytest.approx([0, first, second, 0, third])
        assert got.returns.tolist() == pytest.approx([0, first + 0.3, second + 0.7, 0, -1.0])
        assert sums["policy/kl_rollout"].item() == pytest.approx(0.4 - 0.2)
        assert sums["num_tokens"].item() == 3
        assert sums["critic/advantage_square"].item() == pytest.approx(first**2 + second**2 + third**2)
        assert algorithm.normalise_advantages(got, sums) is got

    def test_masked_positions_and_micro_batches_change_nothing(self):
        algorithm = load("ppo", kl_coef=0.1)
        batch, out = (b := make_batch()), make_output(b)
        whole, totals = algorithm.token_advantages(batch)
        expected = algorithm.normalise_advantages(whole, totals)
        bad, bad_totals = algorithm.token_advantages(poisoned(batch, math.nan))
        assert torch.equal(algorithm.normalise_advantages(bad, bad_totals).advantages, expected.advantages)
        assert torch.equal(bad.returns, expected.returns)
        parts = [algorithm.token_advantages(part) for part, _ in cut(batch, out)]
        summed = {name: sum(sums[name] for _, sums in parts) for name in totals}
        got = torch.cat([algorithm.normalise_advantages(part, summed).advantages for part, _ in parts])
        torch.testing.assert_close(got, expected.advantages, rtol=1e-12, atol=1e-14)

    def test_whitening_comes_after_the_returns(self):
        batch = make_batch()
        raw, totals = load("ppo").token_advantages(batch)
        white = load("ppo").normalise_advantages(raw, totals)
        kept = white.advantages[batch.loss_mask]
        assert kept.mean().item() == pytest.approx(0, abs=1e-12) and kept.std(correction=0).item() == pytest.approx(1)
        assert torch.equal(white.returns, raw.returns)
        values = torch.where(batch.loss_mask, batch.values, 0.0)
        torch.testing.assert_close(white.returns, raw.advantages + values, rtol=1e-13, atol=0)

    def test_kl_is_in_the_reward_or_in_the_loss_never_in_both(self):
        batch, out = (b := make_batch()), make_output(b)
        plain, inside, outside = (
            load("ppo"),
            load("ppo", kl_coef=0.5),
            load("ppo", kl_coef=0.5, kl_in_reward=False),
        )
        assert "reference" not in plain.needs and "critic" in plain.needs
        assert "reference" in inside.needs and "reference" in outside.needs
        assert inside.loss(batch, out).loss == plain.loss(batch, out).loss != outside.loss(batch, out).loss
        advantages = [x.token_advantages(batch)[0].advantages for x in (plain, inside, outside)]
        assert torch.equal(advantages[0], advantages[2]) and not torch.equal(advantages[0], advantages[1])


class TestCritic:
    def test_by_hand(self):
        v, old, ret = (torch.tensor([x], dtype=F64) for x in (1.0, 0.0, 2.0))
        loss, clipped = clipped_value_loss(v, old, ret, 0.2)  # max((1 - 2)^2, (0.2 - 2)^2) / 2
        assert loss.item() == pytest.approx(0.5 * 1.8**2) and clipped.item()
        assert clipped_value_loss(v, old, ret, 0.0)[0].item() == 0.5

    @pytest.mark.parametrize("same", [False, True])
    def test_no_clip_or_no_step_is_the_squared_error(self, same):
        batch = make_batch()
        algorithm = load("ppo", value_clip=0.2 if same else 1e9)
        values = (batch.values + (0.0 if same else 0.5)).requires_grad_()
        grad = torch.autograd.grad(algorithm.value_loss(batch, values).loss, values)[0]
        torch.testing.assert_close(grad, batch.weights * (values.detach() - batch.returns), rtol=1e-12, atol=0)

    def test_clipped_values_get_no_gradient(self):
        batch = make_batch()
        g = torch.Generator().manual_seed(3)
        values = (batch.values + 0.4 * torch.randn(18, generator=g, dtype=F64)).requires_grad_()
        result = load("ppo", value_clip=0.2).value_loss(batch, values)
        grad = torch.autograd.grad(result.loss, values)[0]
        v = values.detach()
        near = torch.minimum(torch.maximum(v, batch.values - 0.2), batch.values + 0.2)
        kept = (v - batch.returns).abs() >= (near - batch.returns).abs()
        torch.testing.assert_close(grad, batch.weights * kept * (v - batch.returns), rtol=1e-12, atol=0)
        clipped = (~kept & batch.loss_mask).sum().item()
        assert result.metrics["critic/clip_frac"].item() == clipped > 0

    def test_masked_positions_change_nothing(self):
        batch, algorithm = make_batch(), load("ppo")
        good = algorithm.value_loss(batch, batch.returns + 1)
        bad = algorithm.value_loss(
            poisoned(batch, math.nan), torch.where(batch.loss_mask, batch.returns + 1, torch.nan)
        )
        assert good.loss == bad.loss and good.metrics == bad.metrics

    def test_explained_variance(self):
        returns = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=F64)

        def of(values):
            e = returns - values
            return explained_variance(e.mean(), e.square().mean(), returns.mean(), returns.square().mean()).item()

        assert of(returns) == 1 and of(torch.full((4,), 3.0, dtype=F64)) == pytest.approx(0, abs=1e-12)
        assert of(returns + 1) == pytest.approx(1) and of(-returns) == pytest.approx(-3)


class TestAdaptiveKL:
    @pytest.mark.parametrize(("kl", "expected"), [(0.1, 1.0), (0.11, 1.01), (9.0, 1.02), (0.0, 0.98), (0.09, 0.99)])
    def test_by_hand(self, kl, expected):
        coef = adaptive_kl_coef(0.5, kl, target=0.1, num_samples=100, horizon=1000)
        assert coef == pytest.approx(0.5 * expected, rel=1e-12)

    def test_more_samples_than_the_horizon_never_turn_the_sign(self):
        assert adaptive_kl_coef(0.5, 0.0, target=0.1, num_samples=10**6, horizon=10) == pytest.approx(0.4)

    def test_algorithm(self):
        fixed = load("ppo", kl_coef=0.5)
        assert fixed.adapt_kl(9.0, 100) is fixed
        adaptive = load("ppo", kl_coef=0.5, kl_target=0.1, kl_horizon=1000).adapt_kl(9.0, 100)
        assert adaptive.kl_coef == pytest.approx(0.51) and adaptive.kl_target == 0.1

    def test_a_resumed_run_takes_the_adapted_coefficient_and_the_configured_fixed_one(self):
        assert load("ppo", kl_coef=0.5, kl_target=0.1).with_kl_coef(0.3).kl_coef == 0.3
        for name in ("ppo", "grpo"):
            assert load(name, kl_coef=0.5).with_kl_coef(0.3).kl_coef == 0.5
