"""Coefficients of the objectives, clips and gates by hand; the same coefficients on policies that can be enumerated."""

from __future__ import annotations

import math

import pytest
import torch

from moe.measure.exact import exact_bias
from moe.measure.gradients import (
    PolicyGraph,
    noise_ceiling,
    noise_trace,
    noisy_routes,
    relative_change,
    signal_to_noise,
    squared_bias,
)
from moe.measure.objectives import (
    COEFFICIENTS,
    clip_statistics,
    coefficients,
    gate_spread_bound,
    gate_statistics,
    gspo_clipped,
    matched_width,
    token_weights,
)
from moe.measure.stats import Answers

ANSWERS = Answers(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]))
Z = torch.tensor([1.5, 1.0, 0.5, 1.0], dtype=torch.float64).log()  # ratios
A = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("no ratio", [1, 1, 1, 1]),
        ("token", [1.5, 1, 0.5, 1]),
        ("token clip", [0, 1, 0, 1]),
        ("CISPO", [1.5, 1, 0.5, 1]),
        ("GSPO", [math.sqrt(1.5)] * 2 + [math.sqrt(0.5)] * 2),
        ("prefix", [1.5, 1.5, 0.5, 0.5]),
        ("product", [1.5, 1.5, 0.5, 0.5]),
        ("SAPO", [1.5 / math.cosh(0.25) ** 2, 1, 0.5 / math.cosh(1.05 * 0.25) ** 2, 1]),
    ],
)
def test_coefficients_by_hand(name, expected):
    assert coefficients(name, Z, A, ANSWERS).tolist() == pytest.approx(expected)


def test_clips_have_a_direction():
    z = torch.tensor([1.25, 0.5, 1.25, 6.0], dtype=torch.float64).log()
    assert coefficients("token clip", z, A, ANSWERS).tolist() == pytest.approx([0, 0.5, 1.25, 6])
    assert coefficients("DAPO clip", z, A, ANSWERS).tolist() == pytest.approx([1.25, 0.5, 1.25, 6])
    assert coefficients("CISPO", z, A, ANSWERS)[3] == 5


def test_all_objectives_agree_where_nothing_moved():
    for name in COEFFICIENTS:
        assert coefficients(name, torch.zeros(4).double(), A, ANSWERS).tolist() == [1] * 4


def test_one_token_answers_have_one_ratio():
    answers = Answers(torch.arange(4), torch.arange(4))
    for name in ("GSPO", "prefix", "product"):
        assert coefficients(name, Z, A, answers).tolist() == pytest.approx(Z.exp().tolist())


def test_the_common_reduction():
    answers = Answers(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0]))
    assert token_weights(answers).tolist() == pytest.approx([1 / 6] * 3 + [1 / 2])


def test_matched_clips_drop_the_same_share():
    generator = torch.Generator().manual_seed(0)
    answers = Answers(torch.arange(400).repeat_interleave(10), torch.arange(400))
    z = 0.1 * torch.randn(4000, generator=generator, dtype=torch.float64)
    advantages = answers.spread(torch.randn(400, generator=generator, dtype=torch.float64))
    s = coefficients("GSPO", z, advantages, answers)
    for share in (0.01, 0.15):
        wide, narrow = matched_width(z.exp(), advantages, share), matched_width(s, advantages, share)
        for name, ratio, width in (("token", z.exp(), wide), ("GSPO", s, narrow)):
            got = clip_statistics(name, ratio, ratio, advantages, answers, width, width)
            assert got[f"{name}/share"].value() == pytest.approx(share, abs=10 / 4000)
            assert got[f"{name}/toggled"].value() == 0
        assert narrow / wide == pytest.approx(1 / math.sqrt(10), rel=0.25)  # independent tokens
    dropped = gspo_clipped(narrow, narrow)(z, advantages, answers) == 0
    assert dropped.double().mean().item() == pytest.approx(0.15, abs=10 / 4000)
    assert matched_width(torch.ones(5), torch.zeros(5), 0.5) == 0


def test_toggles_by_hand():
    """Weights alone would keep the first token and drop the third; routing turns both round."""
    z_w = torch.tensor([1.1, 1.0, 0.5, 1.0], dtype=torch.float64)
    ratio = torch.tensor([1.5, 1.0, 0.9, 1.0], dtype=torch.float64)
    got = clip_statistics("clip", ratio, z_w, A * torch.tensor([3, 1, 1, 1]), ANSWERS, 0.2, 0.2)
    values = {name: s.value() for name, s in got.items()}
    assert values == pytest.approx({"clip/share": 0.25, "clip/outside": 0.25, "clip/mass": 0.5, "clip/toggled": 0.5})


def test_gate_by_hand():
    got = {name: s.value() for name, s in gate_statistics(torch.zeros(4).double(), A, ANSWERS).items()}
    assert got == {"SAPO/gate": 1, "SAPO/gate_ratio": 1, "SAPO/mass": 0}


@pytest.mark.parametrize("seed", range(50))
def test_bound_on_the_spread_of_the_gate(seed):
    generator = torch.Generator().manual_seed(seed)
    answers = Answers(torch.arange(40).repeat_interleave(25), torch.arange(40))
    z = torch.randn(1000, generator=generator).double() + answers.spread(torch.randn(40, generator=generator).double())
    gap, bound = gate_spread_bound(z, 1.05, answers)
    assert (gap <= bound).all() and (gap > 0).all()


# ---------------------------------------------------------------- enumerated policies

RELATIVE_BIAS = {  # alpha: spread of the log-ratio, then each objective's relative bias
    0.01: (0.006, [0.0148, 0.0105, 0.0105, 0.0105, 0.0123, 0.0076]),
    0.1: (0.055, [0.168, 0.116, 0.184, 0.115, 0.138, 0.085]),
    0.3: (0.167, [0.629, 0.423, 2.53, 0.415, 0.504, 0.306]),
    0.6: (0.340, [0.791, 0.849, 2.69, 0.836, 0.652, 0.486]),
    1.0: (0.585, [0.862, 0.935, 2.69, 0.908, 0.723, 0.517]),
}
NAMES = ("no ratio", "token", "token clip", "SAPO", "GSPO", "prefix")


def test_exact_bias_and_the_unbiased_product():
    rows = exact_bias()
    for alpha, (spread, expected) in RELATIVE_BIAS.items():
        of = {row.objective: row for row in rows if row.alpha == alpha}
        assert of["token"].spread == pytest.approx(spread, abs=6e-4)
        assert [of[name].bias for name in NAMES] == pytest.approx(expected, rel=8e-3)
        assert of["product"].bias < 1e-12 and of["product"].cosine == pytest.approx(1)
        assert of["token"].error(10**15) == pytest.approx(of["token"].bias ** 2, rel=1e-6)


# ---------------------------------------------------------------- gradients


def test_gradients_by_group_are_those_of_the_sum():
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, unused = torch.ones(3, dtype=torch.float64, requires_grad=True), torch.ones(2, requires_grad=True)
    graph = PolicyGraph([(x[:2] @ w).tanh(), (x[2:] @ w).tanh()], [w, unused])
    c = torch.arange(5).double()
    expected = torch.autograd.grad(((x @ w).tanh() * c).sum(), w)[0]
    rows = graph.gradients(c)
    assert rows.shape == (2, 5) and rows[:, 3:].abs().max() == 0
    torch.testing.assert_close(graph.gradient(c)[:3], expected)


def test_noise_and_bias_of_known_gradients():
    generator = torch.Generator().manual_seed(0)
    true, other = torch.zeros(50).double(), torch.zeros(50).double()
    true[0], other[0] = 3, 2
    draw = [m + torch.randn(4000, 50, generator=generator, dtype=torch.float64) for m in (true, other)]
    assert noise_trace(draw[0]) == pytest.approx(50, rel=0.02)
    assert signal_to_noise(draw[0]) == pytest.approx(9 / (50 / 4000), rel=0.06)
    assert squared_bias(*draw) == pytest.approx(1, abs=0.15)
    assert squared_bias(draw[0], draw[0]) == pytest.approx(0, abs=0.05)
    assert noise_ceiling(draw[0]) == pytest.approx(9 / (9 + 50 / 2000), abs=0.01)
    assert relative_change(true, other) == pytest.approx(2 / 3)


def test_squared_bias_is_not_inflated_by_noise():
    generator = torch.Generator().manual_seed(1)
    got = [squared_bias(*torch.randn(2, 8, 30, generator=generator, dtype=torch.float64)) for _ in range(400)]
    assert sum(got) / 400 == pytest.approx(0, abs=0.35)  # the naive square would be 30 / 8 + 30 / 8


def test_router_noise_changes_near_ties_first():
    logits = torch.tensor([1.0, 0.99, -5.0]).expand(2000, 1, 3)
    ids = noisy_routes(logits, 1, 0.1, torch.Generator().manual_seed(0))
    assert 0.4 < (ids == 1).double().mean() < 0.5 and not (ids == 2).any()
    assert (noisy_routes(logits, 1, 0.0, torch.Generator()) == 0).all()
