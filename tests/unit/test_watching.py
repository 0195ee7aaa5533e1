"""The routers' statistics of a training step, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mcore_rl.step.watching import router_alarms, summary


def tokens(**changes) -> dict[str, torch.Tensor]:
    """Two answers of two tokens through one MoE layer of 4 experts, top-2; two of the four tokens change an expert."""
    old = torch.tensor([[[0, 1]], [[0, 1]], [[2, 3]], [[2, 3]]])
    new = torch.tensor([[[1, 0]], [[0, 2]], [[2, 3]], [[1, 3]]])
    z_w, z_r = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 1.0, 1.0])
    zeros = torch.zeros(4)
    return {
        "lengths": torch.tensor([2, 2]),
        "old": zeros.double(),
        "on_old": z_w.double(),
        "new": (z_w + z_r).double(),
        "old_ids": old,
        "new_ids": new,
        "old_gates": torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]], [[0.5, 0.5]], [[0.7, 0.3]]]),
        "margins": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        "entropy": torch.tensor([[0.0], [1.0], [1.0], [0.0]]),
        "gamma": torch.tensor([1.0, 0.9, 0.6, 0.5]),
    } | changes


def test_by_hand():
    found = summary(tokens(), num_experts=4)
    assert found["moe/flip_any"] == found["moe/flip_set"] == found["moe/layer_00/flip_set"] == 0.5
    assert found["moe/flip_expert"] == 0.25 and found["moe/flip_layers_per_token"] == 0.5
    assert found["moe/flip_gate_mass"] == pytest.approx((0.2 + 0.7) / 4)  # expert 1 and expert 2 left
    assert found["moe/chi"] == pytest.approx(4.0)  # within the first answer var(0, 4) = 4 against var(1, -1) = 1
    var_w, var_r = 0.5, (16 + 1 + 1) / 4 - 1.5**2
    assert found["moe/share_routing"] == pytest.approx(var_r / (var_w + var_r))
    load = torch.tensor([2, 2, 2, 2]) / 8  # of the new routes: every expert twice
    assert found["moe/load_cv"] == pytest.approx((load.std(correction=0) / 0.25).item())
    assert found["moe/gamma_mean"] == 0.75 and found["moe/gamma_below_0.7"] == 0.5
    assert found["moe/router_entropy"] == 0.5 and found["moe/margin_median"] == 2.0
    assert not any(name.startswith("mismatch/") for name in found)


def test_the_engines_routes_are_compared_with_those_before_the_step():
    engine = tokens()["old_ids"].clone()
    engine[3, 0, 0] = 0
    found = summary(tokens(engine_ids=engine), num_experts=4)
    assert found["mismatch/flip_any"] == 0.25 and found["mismatch/flip_expert"] == 0.125
    assert "mismatch/flip_gate_mass" not in found


def test_what_does_not_exist_is_left_out():
    """Weights that did not move: no variance to divide by."""
    found = summary(tokens(on_old=torch.zeros(4).double(), new=torch.zeros(4).double()), num_experts=4)
    assert "moe/chi" not in found and "moe/share_routing" not in found and found["moe/flip_any"] == 0.5


def test_alarms_are_logged_and_told_once(capsys):
    first, second = SimpleNamespace(rank=0), SimpleNamespace(rank=1)
    found = summary(tokens(), num_experts=4)  # chi is 4
    assert router_alarms("mine", first, found, 7) == {"moe/alarm_level": 2.0}
    told = capsys.readouterr().out
    assert "mine: routers unstable: step 7: moe/gamma_below_0.7 = 0.5" in told
    assert "mine: routers watch: step 7: moe/chi = 4" in told and "Try algorithm.name=gspo" in told
    assert router_alarms("mine", second, found | {"mismatch/k3": 0.5}, 7) == {"moe/alarm_level": 2.0}
    assert not capsys.readouterr().out  # other ranks are silent
    assert router_alarms("mine", first, {"mismatch/k3": 0.5}, 7) == {}  # not a step that was looked at
    quiet = {name: value for name, value in found.items() if name == "moe/router_entropy"} | {"moe/flip_any": 0.1}
    assert router_alarms("mine", first, quiet, 7) == {"moe/alarm_level": 0.0}
