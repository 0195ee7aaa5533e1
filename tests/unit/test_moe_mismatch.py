"""Trainer against engine: the split, and every distance by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moe.measure.mismatch import by_probability, masked_shares, mismatch_statistics, split
from moe.measure.stats import Answers


def test_the_split_sums_to_the_whole():
    trainer, replayed, engine = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numeric, routing = split(trainer, replayed, engine)
    torch.testing.assert_close(numeric + routing, trainer - engine, rtol=0, atol=1e-15)
    numeric, routing = split(trainer, trainer, engine)  # the same routes anyway: nothing is routing
    assert routing.abs().max() == 0


def test_distances_by_hand():
    answers = Answers(torch.tensor([0, 0, 1]), torch.tensor([0, 1]))
    engine = torch.tensor([0.5, 0.25, 0.1], dtype=torch.float64).log()
    trainer = torch.tensor([0.5, 0.5, 0.1], dtype=torch.float64).log()
    got = {name: s.value() for name, s in mismatch_statistics(trainer, engine, answers).items()}
    log2 = math.log(2)
    assert got["k1"] == pytest.approx(-log2 / 3)
    assert got["k3"] == pytest.approx((2 - 1 - log2) / 3)
    assert got["k3_reverse"] == pytest.approx(2 * (0.5 - 1 + log2) / 3)
    assert got["abs_mean"] == pytest.approx(log2 / 3) and got["prob_abs_mean"] == pytest.approx(0.25 / 3)
    assert (got["beyond_1.5"], got["beyond_5"]) == (pytest.approx(1 / 3), 0)
    assert got["answers_beyond_e"] == 0
    expected = torch.corrcoef(torch.stack([trainer.exp(), engine.exp()]))[0, 1].item()
    assert got["pearson"] == pytest.approx(expected)


def test_both_estimates_of_the_divergence_are_unbiased():
    """Every outcome once, weighed by the engine's probability: the estimates become the divergences."""
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    counts = (q * 1000).round().long()
    index = torch.repeat_interleave(torch.arange(3), counts)
    answers = Answers(torch.arange(1000), torch.arange(1000))
    got = mismatch_statistics(p.log()[index], q.log()[index], answers)
    assert got["k3"].value() == pytest.approx((q * (q / p).log()).sum().item())
    assert got["k1"].value() == pytest.approx((q * (q / p).log()).sum().item())
    assert got["k3_reverse"].value() == pytest.approx((p * (p / q).log()).sum().item())


def test_what_corrections_would_drop_by_hand():
    answers = Answers(torch.tensor([0, 0, 1]), torch.tensor([0, 1]))
    engine = torch.zeros(3).double() - 3
    trainer = engine + torch.tensor([math.log(0.4), -math.log(0.4), 0.0015])  # the first answer's mean ratio is 1
    got = {name: s.value() for name, s in masked_shares(trainer, engine, answers).items()}
    assert got == {"masked/icepop": pytest.approx(1 / 3), "masked/mis_geo": 0}  # 1 / 0.4 = 2.5 is within 5
    got = masked_shares(trainer + 0.003, engine, answers)["masked/mis_geo"].value()
    assert got == 1


def test_differences_by_probability_by_hand():
    answers = Answers(torch.tensor([0, 0, 1]), torch.tensor([0, 1]))
    engine = torch.tensor([0.005, 0.05, 0.08], dtype=torch.float64).log()
    got = by_probability(engine + torch.tensor([0.5, 0.1, -0.3]), engine, answers)
    values = {name: s.value() for name, s in got.items()}
    assert values == pytest.approx(
        {
            "bin/0-0.01/abs_mean": 0.5,
            "bin/0-0.01/share": 1 / 3,
            "bin/0.01-0.1/abs_mean": 0.2,
            "bin/0.01-0.1/share": 2 / 3,
        }
    )
