"""Statistics of log-ratios against numbers worked out by hand and laws that hold exactly."""

from __future__ import annotations

import math

import pytest
import torch

from moe.measure.decompose import Decomposition, crossover, decomposition_statistics, jump, own_flip_share, parts
from moe.measure.stats import (
    Answers,
    autocorrelation,
    between_share,
    ess,
    excess_kurtosis,
    inflation,
    inflation_of_correlation,
    log_weights,
    mean_of,
    resample,
    variance_of,
)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def answers_of(*lengths: int, prompts: list[int] | None = None) -> Answers:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Answers(ids, torch.tensor(prompts or list(range(len(lengths)))))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sums_over_answers():
    answers = answers_of(3, 1, 2, prompts=[0, 0, 1])
    x, y = f64(1, 2, 6, 5, 0, 4), f64(1, 1, 4, 9, 2, 2)
    assert answers.mean(x).tolist() == [3, 5, 2]
    assert answers.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert answers.token_prompts.tolist() == [0, 0, 0, 0, 1, 1]
    # answer 0: x - 3 = (-2, -1, 3), y - 2 = (-1, -1, 2): (2 + 1 + 6) / 3
    assert answers.covariance_within(x, y).tolist() == [3, 0, 0]
    tokens, rest = answers.select(torch.tensor([True, False, True]))
    assert tokens.tolist() == [0, 1, 2, 4, 5] and rest.answer_ids.tolist() == [0, 0, 0, 1, 1]
    assert rest.prompt_ids.tolist() == [0, 1]


def test_moments_by_hand():
    one = torch.zeros(4, dtype=torch.long)
    x = f64(0, 0, 0, 4)  # mean 1, variance 3, fourth moment (1 + 1 + 1 + 81) / 4 = 21
    assert variance_of(x, one).value() == 3
    assert excess_kurtosis(x, one).value() == pytest.approx(21 / 9 - 3)


def test_the_bootstrap_draws_prompts_not_tokens():
    """100 identical tokens a prompt: the error of the mean is that of 50 prompts, not of 5000 tokens."""
    values = noise(50)
    prompts = torch.arange(50).repeat_interleave(100)
    got = mean_of(values.repeat_interleave(100), prompts).estimate(draws=4000)
    expected = 1.96 * values.std(correction=0).item() / math.sqrt(50)
    assert (got.high - got.low) / 2 == pytest.approx(expected, rel=0.06)
    assert got.value == pytest.approx(values.mean().item())
    counts = resample(7, 30, seed=1)
    assert counts.shape == (30, 7) and counts.sum(1).tolist() == [7.0] * 30
    assert torch.equal(counts, resample(7, 30, seed=1)) and not torch.equal(counts, resample(7, 30, seed=2))


def test_a_statistic_that_does_not_exist_has_no_interval():
    answers = answers_of(2, 2)
    nothing = crossover(torch.zeros(4), torch.zeros(4), answers)["chi"].estimate(50)
    assert all(math.isnan(x) for x in (nothing.value, nothing.low, nothing.high))


# ---------------------------------------------------------------- decomposition


def four_forwards(n: int, seed: int) -> Decomposition:
    return Decomposition(*noise(4, n, seed=seed))


def test_the_parts_sum_to_the_whole_in_either_order():
    got = four_forwards(1000, 0)
    torch.testing.assert_close(got.z_w + got.z_r, got.z, rtol=0, atol=1e-14)
    torch.testing.assert_close(sum(got.shapley), got.z, rtol=0, atol=1e-14)
    # routing first, then weights; Shapley is the mean of both orders
    z_r_first = got.old_on_new - got.old
    z_w_second = got.new - got.old_on_new
    torch.testing.assert_close(got.shapley[0], (got.z_w + z_w_second) / 2, rtol=0, atol=1e-14)
    torch.testing.assert_close(got.shapley[1], (got.z_r + z_r_first) / 2, rtol=0, atol=1e-14)
    torch.testing.assert_close(got.interaction, got.z_r - z_r_first, rtol=0, atol=0)


def test_variances_of_the_parts_add_up_with_the_covariance():
    got, answers = four_forwards(600, 1), answers_of(*[6] * 100)
    s = {name: x.value() for name, x in parts(got.z_w, got.z_r, answers).items()}
    assert s["var_z"] == pytest.approx(s["var_w"] + s["var_r"] + 2 * s["covariance"], rel=1e-12)
    assert s["var_w"] == pytest.approx(got.z_w.var(correction=0).item(), rel=1e-12)
    assert s["share_routing"] == pytest.approx(s["var_r"] / (s["var_w"] + s["var_r"]), rel=1e-12)


@pytest.mark.parametrize("seed", range(200))
def test_chi_decides_which_ratio_is_nearer_to_the_weights_alone(seed):
    """Per answer: the two error identities, the criterion, and k* no worse than any other shrinkage."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 60, (), generator=generator))
    scale = 10 ** -torch.randint(0, 3, (3,), generator=generator).double()
    z_w = scale[0] * torch.randn(n, generator=generator).double() + 0.1 * torch.randn((), generator=generator).double()
    z_r = scale[1] * torch.randn(n, generator=generator).double() + (0.5 - scale[2]) * z_w + 0.05
    z, answers = z_w + z_r, answers_of(n)
    token_error = (z - z_w).square().mean().item()
    sequence_error = (z.mean() - z_w).square().mean().item()
    shared = z_r.mean().item() ** 2
    within_r, within_w = (answers.covariance_within(x, x).item() for x in (z_r, z_w))
    assert token_error == pytest.approx(within_r + shared, rel=1e-10)
    assert sequence_error == pytest.approx(within_w + shared, rel=1e-10)
    got = {name: x.value() for name, x in crossover(z_w, z_r, answers).items()}
    assert (got["chi"] > 1) == (sequence_error < token_error)

    def error(k: float) -> float:
        return (z.mean() + k * (z - z.mean()) - z_w).square().mean().item()

    k = got["k_star"]
    assert all(error(k) <= error(other) + 1e-15 for other in (0, 1, k - 1e-3, k + 1e-3))


def test_flipped_tokens_carry_what_they_carry():
    answers = answers_of(4)
    z_r, flipped = f64(3, 0, 1, 0), torch.tensor([True, False, False, True])
    assert own_flip_share(z_r, flipped, answers).value() == pytest.approx(0.9)
    assert jump(z_r, flipped, answers).value() == pytest.approx(math.sqrt(4.5))


def test_no_change_of_routes_is_all_weights():
    old, new = noise(40), noise(40, seed=1)
    same = Decomposition(old=old, new=new, new_on_old=new, old_on_new=old)
    got = decomposition_statistics(same, torch.zeros(40, dtype=torch.bool), answers_of(*[4] * 10))
    got = {name: statistic.value() for name, statistic in got.items()}
    assert got["share_routing"] == got["share_routing_shapley"] == got["chi"] == got["var_interaction"] == 0
    assert got["k_star"] == pytest.approx(1)


# ---------------------------------------------------------------- averaging


def test_inflation_of_shared_and_of_independent_tokens():
    answers = answers_of(*[16] * 400)
    shared = answers.spread(noise(400))
    independent = noise(6400)
    for n in (2, 4, 16):
        assert inflation(shared, answers, n).value() == pytest.approx(n, rel=1e-9)
        assert inflation(independent, answers, n).value() == pytest.approx(1, abs=0.15)
    assert inflation(independent, answers, 1).value() == pytest.approx(1, rel=1e-12)
    assert between_share(shared, answers).value() == pytest.approx(1, rel=1e-9)
    assert between_share(independent, answers).value() == pytest.approx(0, abs=0.02)
    half = between_share(shared + independent, answers)
    assert half.value() == pytest.approx(0.5, abs=0.06) and half.estimate().low < 0.5 < half.estimate().high
    with pytest.raises(ValueError, match="no answer has 17 tokens"):
        inflation(independent, answers, 17)


def test_inflation_by_hand_and_the_rest_that_is_left_out():
    """Blocks of 2: (0, 2) (4, 6) and (1, 1); the 9 of the first answer is the rest."""
    answers = answers_of(5, 2)
    z = f64(0, 2, 4, 6, 9, 1, 1)
    means, tokens = f64(1, 5, 1), f64(0, 2, 4, 6, 1, 1)
    expected = 2 * means.var(correction=0) / tokens.var(correction=0)
    assert inflation(z, answers, 2).value() == pytest.approx(expected.item())


def test_inflation_follows_from_the_correlations():
    """AR(1) with correlation r^k: the variance of a mean is 1' R 1 / n^2."""
    n, r = 12, 0.7
    k = torch.arange(n, dtype=torch.float64)
    matrix = r ** (k[:, None] - k[None, :]).abs()
    assert inflation_of_correlation(r ** k[1:]).item() == pytest.approx((matrix.sum() / n).item(), rel=1e-12)
    answers, z = answers_of(*[n] * 4000), noise(4000, n)
    for t in range(1, n):
        z[:, t] = r * z[:, t - 1] + math.sqrt(1 - r * r) * z[:, t]
    rho = [autocorrelation(z.flatten(), answers, lag).value() for lag in (1, 2, 5)]
    assert rho == pytest.approx([r, r**2, r**5], abs=0.02)
    assert inflation(z.flatten(), answers, n).value() == pytest.approx((matrix.sum() / n).item(), rel=0.06)


# ---------------------------------------------------------------- effective sample size


def test_weights_of_every_family_by_hand():
    got = log_weights(f64(1, 2, 3, 5), answers_of(3, 1))
    assert {name: x.tolist() for name, (x, _) in got.items()} == {
        "token": [1, 2, 3, 5],
        "prefix": [1, 3, 6, 5],
        "geo": [2, 5],
        "product": [6, 5],
    }


def test_effective_sample_size_of_log_normal_weights():
    """exp(-sigma^2) for a token, exp(-sigma^2 / n) for the geometric mean, exp(-n sigma^2) for the product."""
    n, sigma = 10, 0.2
    answers = answers_of(*[n] * 20000)
    weights = log_weights(sigma * noise(20000 * n), answers)
    got = {name: ess(*pair).value() for name, pair in weights.items()}
    assert got["token"] == pytest.approx(math.exp(-(sigma**2)), rel=0.01)
    assert got["geo"] == pytest.approx(math.exp(-(sigma**2) / n), rel=0.001)
    assert got["product"] == pytest.approx(math.exp(-n * sigma**2), rel=0.02)


def test_effective_sample_size_by_hand():
    prompts = torch.arange(2)
    assert ess(f64(0, math.log(3)), prompts).value() == pytest.approx(16 / (2 * 10))
    assert ess(f64(800, 800), prompts).value() == pytest.approx(1)  # exp(800) alone would be infinite
