"""GAPO: discriminator losses, rewards made of scores, and the policy gradient under an optimal one."""

import math

import pytest
import torch
from loss_batches import F64, gradient, make_batch, make_group, make_output

from mcore_rl.algorithms import load
from mcore_rl.functional.discriminator import (
    REWARD_TRANSFORMS,
    Normaliser,
    auc,
    bce_loss,
    bradley_terry_loss,
    calibration_error,
    discriminator_reward,
    length_only_auc,
    steps_in_band,
)


def t(*values):
    return torch.tensor(values, dtype=F64)


class TestDiscriminatorLosses:
    def test_bce_gradient_is_sigma_minus_label(self):
        scores, labels = t(1.2, -0.3, 0.0).requires_grad_(), t(1, 0, 1)
        loss = bce_loss(scores, labels)
        d = torch.sigmoid(scores)
        torch.testing.assert_close(loss, -(labels * d.log() + (1 - labels) * (1 - d).log()), rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(loss.sum(), scores)
        torch.testing.assert_close(grad, (d - labels).detach(), rtol=1e-12, atol=1e-16)

    def test_smoothing_is_one_sided(self):
        scores = t(math.log(9), -3.0).requires_grad_()
        (grad,) = torch.autograd.grad(bce_loss(scores, t(1, 0), label_smoothing=0.1).sum(), scores)
        assert grad[0].item() == pytest.approx(0, abs=1e-15)  # content at D = 0.9
        assert grad[1].item() == pytest.approx(torch.sigmoid(t(-3.0)).item())

    def test_bradley_terry(self):
        scores = t(0.0, 0.0).requires_grad_()
        (grad,) = torch.autograd.grad(bradley_terry_loss(scores[:1], scores[1:]).sum(), scores)
        assert grad.tolist() == [-0.5, 0.5]
        assert bradley_terry_loss(t(3.0), t(1.0)) == bradley_terry_loss(t(103.0), t(101.0))
        assert bradley_terry_loss(t(3.0), t(1.0)).item() == pytest.approx(math.log(1 + math.exp(-2)))

    def test_huge_scores_stay_finite(self):
        assert bce_loss(t(1e6, -1e6), t(0, 1)).isfinite().all() and bradley_terry_loss(t(-1e6), t(1e6)).isfinite()

    def test_optimal_scores_are_log_odds(self):
        """Minimising the expected loss over a categorical: l* = log p / q, with q the mixture of all negatives."""
        p, rejected, fakes = (torch.softmax(torch.randn(5, generator=G, dtype=F64), 0) for _ in range(3))
        q = 0.3 * rejected + 0.7 * fakes
        scores = (p / q).log().requires_grad_()
        everything = torch.cat([p * bce_loss(scores, torch.ones(5)), q * bce_loss(scores, torch.zeros(5))]).sum()
        (grad,) = torch.autograd.grad(everything, scores)
        assert grad.abs().max() < 1e-15
        assert (q - fakes).abs().max() > 0.01  # rejected answers are in the denominator too


G = torch.Generator().manual_seed(0)


class TestThroughTheAlgorithm:
    KINDS = torch.tensor([0, 2, 0, 1])
    SCORES = t(2.0, -1.0, -0.5, 0.5)
    WEIGHTS = t(0.25, 0.25, 0.25, 0.25)

    def test_bce_by_hand(self):
        got = load("gapo").discriminator_loss(self.SCORES, self.KINDS, self.WEIGHTS)
        log1p = [math.log1p(math.exp(x)) for x in (-2.0, -1.0, 0.5, 0.5)]
        assert got.loss.item() == pytest.approx(sum(log1p) / 4, rel=1e-12)
        assert {k: v.item() for k, v in got.metrics.items()} == {
            "real/accuracy": 1, "real/score": 1.5, "num_real": 2,
            "rejected/accuracy": 0, "rejected/score": 0.5, "num_rejected": 1,
            "fake/accuracy": 1, "fake/score": -1, "num_fake": 1,
        }  # fmt: skip

    def test_bradley_terry_by_hand(self):
        algorithm = load("gapo", discriminator_objective="bradley_terry")
        got = algorithm.discriminator_loss(self.SCORES, self.KINDS, self.WEIGHTS)
        assert got.loss.item() == pytest.approx((math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2, rel=1e-12)

    def test_padding_counts_nowhere(self):
        weights = t(0.5, 0.5, 0, 0)
        got = load("gapo").discriminator_loss(self.SCORES, self.KINDS, weights)
        assert got.metrics["num_real"] == 1 and got.metrics["num_rejected"] == 0
        assert got.loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2)

    def test_cutting_changes_nothing(self):
        for objective in ("bce", "bradley_terry"):
            algorithm = load("gapo", discriminator_objective=objective, label_smoothing=0.1)
            args = (self.SCORES, self.KINDS, self.WEIGHTS)
            parts = [algorithm.discriminator_loss(*(x[i : i + 2] for x in args)) for i in (0, 2)]
            whole = algorithm.discriminator_loss(*args)
            assert sum(p.loss for p in parts).item() == pytest.approx(whole.loss.item(), rel=1e-14)
            assert {k: sum(p.metrics[k] for p in parts) for k in whole.metrics} == whole.metrics

    @pytest.mark.parametrize("accuracy", [0.5, 0.549, 0.55, 0.7, 0.899, 0.9, 1.0])
    def test_update_band(self, accuracy):
        expected = 6 if accuracy < 0.55 else 3 if accuracy < 0.9 else 0
        assert steps_in_band(accuracy, 3, low=0.55, high=0.9) == expected
        assert load("gapo", discriminator_steps=3).steps_due(accuracy) == expected
        assert load("gapo", discriminator_steps=0).steps_due(accuracy) == 0


class TestRewards:
    def test_transforms_by_hand(self):
        scores = t(-2.0, 0.0, 3.0)
        d = torch.sigmoid(scores)
        expected = {"logit": scores, "sigmoid": d, "softplus": -(1 - d).log(), "logsigmoid": d.log()}
        assert set(expected) == set(REWARD_TRANSFORMS)
        for name, values in expected.items():
            torch.testing.assert_close(discriminator_reward(scores, name), values, rtol=1e-12, atol=1e-15)

    def test_only_log_odds_are_normalised_and_clipped(self):
        scores = t(0.0, 2.0, 100.0)
        seen = Normaliser.of(t(-1.0, 3.0))  # mean 1, std 2
        assert load("gapo").discriminator_rewards(scores, seen).tolist() == [-0.5, 0.5, 10.0]
        assert load("gapo", reward_clip=0.4).discriminator_rewards(scores, seen).tolist() == [-0.4, 0.4, 0.4]
        got = load("gapo", reward_transform="softplus").discriminator_rewards(scores, seen)
        assert got.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(2)), 100.0])

    def test_normaliser(self):
        values = torch.randn(40, generator=G, dtype=F64) * 3 + 7
        merged = Normaliser.of(values[:9]).merge(Normaliser()).merge(Normaliser.of(values[9:]))
        assert merged.count == 40 and merged.mean == pytest.approx(values.mean().item(), rel=1e-12)
        assert merged.std == pytest.approx(values.std(correction=0).item(), rel=1e-12)
        assert Normaliser().std == 1 and Normaliser.of(t(4.0, 4.0)).std == 1
        assert Normaliser().merge(Normaliser()) == Normaliser() == Normaliser.of(t())

    def test_a_constant_discriminator_teaches_nothing(self):
        rewards = load("gapo").discriminator_rewards(t(2.7, 2.7, 2.7, 2.7), Normaliser.of(t(2.7, 2.7)))
        algorithm = load("gapo", baseline="group", kl_coef=0.0)
        advantages = algorithm.advantages(make_group(*rewards.tolist()))
        batch = make_batch(advantages=advantages.tolist())
        assert gradient(algorithm, batch, make_output(batch)).abs().max() == 0


class TestOptimalDiscriminator:
    """On a categorical policy, with the discriminator that is optimal against it, by enumeration."""

    P = torch.softmax(torch.tensor([0.4, -1.0, 0.9, 0.1, -0.3, 0.6], dtype=F64), 0)

    def policy_gradient(self, parameters, transform):
        q = torch.softmax(parameters, 0)
        reward = discriminator_reward((self.P / q).log().detach(), transform)
        return torch.autograd.grad((q * reward).sum(), parameters)[0]

    def start(self):
        return (0.3 * torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=F64)).requires_grad_()

    def test_log_odds_descend_the_kl(self):
        parameters = self.start()
        q = torch.softmax(parameters, 0)
        (kl,) = torch.autograd.grad((q * (q / self.P).log()).sum(), parameters)
        torch.testing.assert_close(self.policy_gradient(parameters, "logit"), -kl, rtol=1e-10, atol=1e-15)

    def test_softplus_descends_the_jensen_shannon_divergence(self):
        parameters = self.start()
        q = torch.softmax(parameters, 0)
        middle = (q + self.P) / 2
        js = 0.5 * (q * (q / middle).log()).sum() + 0.5 * (self.P * (self.P / middle).log()).sum()
        (grad,) = torch.autograd.grad(js, parameters)
        torch.testing.assert_close(self.policy_gradient(parameters, "softplus"), -2 * grad, rtol=1e-10, atol=1e-15)

    def test_near_equality_all_rewards_point_the_same_way(self):
        """sigma(l) is a quarter, softplus and log sigma half of the direction of l."""
        parameters = (self.P.log() + 1e-4 * self.start()).detach().requires_grad_()
        reference = self.policy_gradient(parameters, "logit")
        for transform, scale in (("sigmoid", 0.25), ("softplus", 0.5), ("logsigmoid", 0.5)):
            got = self.policy_gradient(parameters, transform)
            assert torch.cosine_similarity(got, reference, dim=0).item() == pytest.approx(1, abs=1e-6)
            assert (got.norm() / reference.norm()).item() == pytest.approx(scale, rel=1e-3)

    @pytest.mark.parametrize(("transform", "distance"), [("logit", 1e-14), ("softplus", 1e-14), ("sigmoid", 1e-9)])
    def test_the_policy_becomes_the_data(self, transform, distance):
        """4000 exact policy-gradient steps, the discriminator optimal at each."""
        parameters = torch.zeros(6, dtype=F64)
        for _ in range(4000):
            q = torch.softmax(parameters, 0)
            reward = discriminator_reward((self.P / q).log(), transform)
            parameters = parameters + 0.5 * q * (reward - (q * reward).sum())
        assert 0.5 * (torch.softmax(parameters, 0) - self.P).abs().sum() < distance


class TestWithoutDiscriminatorItIsPPO:
    def test_bit_for_bit(self):
        """Given scores, advantages and loss are PPO's: the discriminator acts through the rewards alone."""
        batch, out = (b := make_batch()), make_output(b)
        gapo, ppo = load("gapo"), load("ppo", kl_coef=0.01)
        (a, sums), (b_, totals) = (x.token_advantages(batch) for x in (gapo, ppo))
        a, b_ = gapo.normalise_advantages(a, sums), ppo.normalise_advantages(b_, totals)
        assert torch.equal(a.advantages, b_.advantages) and torch.equal(a.returns, b_.returns)
        assert gapo.loss(a, out).loss == ppo.loss(b_, out).loss
        assert torch.equal(gradient(gapo, a, out), gradient(ppo, b_, out))

    def test_needs(self):
        assert load("gapo").needs == {"reference", "critic", "discriminator"}
        assert load("gapo", baseline="group", kl_coef=0.0).needs == {"discriminator"}

    def test_group_baseline_leaves_the_batch_alone_and_has_its_kl_in_the_loss(self):
        batch, out = (b := make_batch()), make_output(b)
        algorithm = load("gapo", baseline="group")
        assert algorithm.token_advantages(batch) == (batch, {}) and algorithm.normalise_advantages(batch, {}) is batch
        assert "policy/kl_ref" in algorithm.loss(batch, out).metrics
        assert "policy/kl_ref" not in load("gapo").loss(batch, out).metrics
        assert algorithm.advantages(make_group(1.0, 0.0)).tolist() == pytest.approx([1, -1], rel=1e-5)


class TestAudit:
    def test_auc_by_hand(self):
        assert auc(t(0.9, 0.4, 0.4, 0.1), t(1, 1, 0, 0)).item() == pytest.approx((2 + 1.5) / 4)
        assert auc(t(1, 1, 1), t(1, 0, 0)).item() == 0.5

    def test_auc_counts_pairs(self):
        scores, labels = torch.randint(0, 9, (60,), generator=G), torch.randint(0, 2, (60,), generator=G)
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
        assert auc(scores, labels).item() == pytest.approx(sum(pairs).item() / len(pairs), rel=1e-12)

    def test_length_alone(self):
        assert length_only_auc(torch.tensor([5, 6, 9, 9]), torch.tensor([1, 1, 0, 0])).item() == 1.0
        assert length_only_auc(torch.tensor([5, 9, 5, 9]), torch.tensor([1, 1, 0, 0])).item() == 0.5

    def test_calibration(self):
        confident = torch.full((10,), math.log(0.85 / 0.15), dtype=F64)
        labels = torch.tensor([1] * 6 + [0] * 4)
        assert calibration_error(confident, labels).item() == pytest.approx(0.25, rel=1e-12)
        two_bins = t(*[math.log(0.85 / 0.15)] * 4, *[math.log(0.25 / 0.75)] * 4)
        labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])
        assert calibration_error(two_bins, labels).item() == pytest.approx(0.5 * 0.10 + 0.5 * 0.25, rel=1e-12)
        assert calibration_error(t(800.0), torch.tensor([1])).item() == 0
