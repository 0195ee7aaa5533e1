"""What the Megatron adapter refuses, and its margins by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import mcore_rl.parallel  # noqa: F401  Megatron on this machine
from mcore_rl.config import ModelConfig
from mcore_rl.model.build import read_hf_config, transformer_config
from mcore_rl.parallel.layout import ParallelLayout
from moe.record.megatron import Routers, margins, moe_layers

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
GROUPS = dict(tp=ALONE, cp=ALONE, pp=ALONE)


@pytest.fixture
def config(tiny_moe_dir):
    return transformer_config(read_hf_config(tiny_moe_dir), ModelConfig(path=str(tiny_moe_dir)), ParallelLayout())


def test_moe_layers_are_counted_from_the_first_layer(config):
    config.moe_layer_freq = [0, 1, 0, 1]
    assert moe_layers(config) == (1, 3)
    config.moe_layer_freq = 2
    assert moe_layers(config) == (0, 2)
    config.num_moe_experts = None
    with pytest.raises(ValueError, match="no MoE layers"):
        moe_layers(config)


@pytest.mark.parametrize(
    "setting",
    [
        dict(moe_router_fusion=True),
        dict(cuda_graph_impl="local"),
        dict(moe_router_load_balancing_type="sinkhorn"),
        dict(moe_expert_capacity_factor=1.0),
        dict(recompute_granularity="selective", recompute_modules=["moe"]),
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_that_bypass_the_hook_are_refused(config, setting):
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match="neither recorded nor replayed.*" + list(setting)[-1]):
        Routers([], config, **GROUPS)


def test_routes_of_another_model_and_corrupted_ones_are_refused(config):
    routers = Routers([], config, **GROUPS)
    good = torch.tensor([1, 2], dtype=torch.uint8).expand(5, 4, 2).clone()
    assert routers.replay(good).total == 5
    with pytest.raises(ValueError, match=r"\(3, 2\), the model \(4, 2\)"):
        routers.replay(good[:, :3])
    good[3, 2] = torch.tensor([6, 9])
    with pytest.raises(ValueError, match="token 3 in MoE layer 2 names expert 9; experts are 0..7"):
        routers.replay(good)
    good[3, 2] = 0
    with pytest.raises(ValueError, match="token 3 in MoE layer 2 is all zero"):
        routers.replay(good)


def test_margins_by_hand():
    scores = torch.tensor([[0.1, 0.7, 0.2, 0.4], [3.0, 3.0, 3.0, 1.0]])
    assert margins(scores, 2).tolist() == pytest.approx([0.2, 0.0])
    assert margins(scores, 4).tolist() == [torch.inf, torch.inf]
