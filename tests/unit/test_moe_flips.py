"""Changes of routes, margins and loads, by hand; the margin theorem on random routers."""

from __future__ import annotations

import math

import pytest
import torch

from moe.measure.flips import (
    balance_loss,
    flip_statistics,
    load_health,
    loads,
    margin_report,
    overlap,
    rank_imbalance,
    router_drift,
    router_shift,
)
from moe.record.trace import margins

OLD = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], dtype=torch.uint8)  # 2 tokens, 2 layers, top-2
NEW = torch.tensor([[[1, 0], [2, 0]], [[0, 1], [1, 0]]], dtype=torch.uint8)
PROMPTS = torch.tensor([0, 1])


def test_every_definition_of_a_flip_by_hand():
    assert overlap(OLD, NEW).tolist() == [[2, 1], [2, 0]]
    gates = torch.tensor([[[0.5, 0.5], [0.6, 0.2]], [[0.5, 0.5], [0.7, 0.1]]])
    got = {name: s.value() for name, s in flip_statistics(OLD, NEW, PROMPTS, gates).items()}
    assert got == pytest.approx(
        {
            "expert": 3 / 8,
            "set": 2 / 4,
            "token_any": 1,
            "layers_per_token": 1,
            "jaccard": (1 + 1 / 3 + 1 + 0) / 4,
            "token_any_independent": 1 - (1 - 0) * (1 - 1),
            "set/layer_0": 0,
            "set/layer_1": 1,
            "gate_mass": (0.2 + 0.8) / (1 + 0.8 + 1 + 0.8),
        }
    )


def test_order_within_a_set_is_no_flip():
    got = flip_statistics(OLD, OLD.flip(-1), PROMPTS)
    assert got["set"].value() == 0 and got["jaccard"].value() == 1


def test_a_dense_model_has_no_flips():
    none = torch.zeros(5, 0, 0, dtype=torch.uint8)
    assert flip_statistics(none, none, torch.arange(5)) == {}


@pytest.mark.parametrize("step", [1e-3, 1e-1, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_margin_theorem(step, top_k):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(20000, 3, 8, generator=generator)
    new = old + step * torch.randn(20000, 3, 8, generator=generator)
    got = margin_report(old, new, *(x.topk(top_k).indices for x in (old, new)))
    assert got.violations == 0
    assert got.flip_by_decile[0] == max(got.flip_by_decile)
    assert got.flip_rate == pytest.approx(sum(got.flip_by_decile) / 10, rel=1e-3)
    if step < 0.01:  # only the nearest pair can change places, and that in proportion to the step
        assert got.predicted == pytest.approx(got.flip_rate, rel=0.05)
        assert got.linear == pytest.approx(got.flip_rate, rel=0.3)


def test_a_broken_recording_violates_the_theorem():
    """Logits that hardly moved and another set: what a shifted layer map or a wrong token order looks like."""
    old, near, far = (torch.tensor([[[3.0, x, 0.0]]]) for x in (2.0, 2.4, 3.4))
    zero, one = torch.tensor([[[0]]]), torch.tensor([[[1]]])
    assert margin_report(old, near, zero, zero).violations == 0
    assert margin_report(old, near, zero, one).violations == 1
    assert margin_report(old, far, zero, one).violations == 0  # moved by more than half the margin: may change
    with pytest.raises(ValueError, match="no route can change"):
        margin_report(old, far, *[torch.tensor([[[0, 1, 2]]])] * 2)


def test_margins_by_hand():
    logits = torch.tensor([[[3.0, 0.0, 2.0]]])
    assert [margins(logits, k).item() for k in (1, 2, 3)] == [1, 2, math.inf]


def test_loads_by_hand():
    load = loads(OLD, 4)
    assert load.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    got = {name: x[0].item() for name, x in load_health(load).items()}
    expected = {"cv": 1, "max_over_mean": 2, "min_over_mean": 0, "dead": 0.5, "entropy": math.log(2) / math.log(4)}
    assert got == pytest.approx(expected)


def test_imbalance_of_expert_parallel_ranks_by_hand():
    load = torch.tensor([[0.4, 0.1, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert rank_imbalance(load, 2).tolist() == pytest.approx([1, 1])  # 0.5 and 0.5
    assert rank_imbalance(load, 4).tolist() == pytest.approx([1.6, 1])


def test_router_shift_by_hand():
    old = torch.tensor([[[-1.0, -2.0], [-3.0, -1.0]], [[-1.0, -2.0], [-3.0, -1.0]]])
    new = old.clone()
    new[0, 0, 0], new[0, 1, 1] = -1.4, -0.6  # mean of 0.4, 0, 0, 0.4
    assert router_shift(old, new).tolist() == pytest.approx([math.exp(-0.2), 1.0])


def test_router_drift_by_hand():
    old = torch.tensor([[[0.0, 0.0]]])
    new = torch.tensor([[[0.0, math.log(3)]]])  # probabilities 1/4, 3/4
    got = {name: x.item() for name, x in router_drift(old, new, torch.tensor([[[0]]])).items()}
    assert got["kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert got["entropy"] == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), rel=1e-6)
    assert got["gamma"] == pytest.approx(0.5, rel=1e-6)  # expert 0 went from 1/2 to 1/4
    assert got["z_loss"] == pytest.approx(math.log(4) ** 2, rel=1e-6)
    even = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert balance_loss(even, torch.zeros(3, 1, 4)).item() == pytest.approx(1)
