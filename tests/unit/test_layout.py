"""Layouts: positions equal Megatron's own, and every layout that cannot work is refused with its fix."""

import itertools
from types import SimpleNamespace

import pytest

import mcore_rl.parallel  # noqa: F401  installs the CPU backend before megatron is imported
from mcore_rl.config import ParallelConfig
from mcore_rl.parallel.layout import ParallelLayout, RankCoords


def layouts() -> list[ParallelLayout]:
    found = []
    for tp, cp, dp, pp in itertools.product((1, 2, 4), (1, 2), (1, 2, 3), (1, 2)):
        for ep, etp in itertools.product((1, 2, 3, 4), (1, 2)):
            if (tp * cp * dp) % (ep * etp) == 0:
                found.append(ParallelLayout(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp))
    return found


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_coords_are_those_of_megatron(layout):
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=order)
    axes = {"tp": dense, "cp": dense, "dp": dense, "pp": dense, "ep": expert, "etp": expert, "edp": expert}

    def megatron_rank(axis: str, rank: int) -> int:
        token = {"etp": "tp", "edp": "dp"}.get(axis, axis)
        (group,) = [g for g in axes[axis].get_ranks(token) if rank in g]
        return group.index(rank)

    for rank in range(layout.world_size):
        assert layout.coords(rank) == RankCoords(**{axis: megatron_rank(axis, rank) for axis in axes})


def test_coords_by_hand():
    """tp=2, dp=2, pp=2, experts over ep=2: rank 5 is tp 1 of dp 0 of stage 1, and holds the second half of experts."""
    layout = ParallelLayout(tp=2, pp=2, ep=2, dp=2)
    assert layout.coords(5) == RankCoords(tp=1, cp=0, dp=0, pp=1, ep=1, etp=0, edp=0)
    assert layout.coords(6) == RankCoords(tp=0, cp=0, dp=1, pp=1, ep=0, etp=0, edp=1)
    with pytest.raises(ValueError, match=r"rank 8 is outside 0\.\.7"):
        layout.coords(8)


def test_dp_is_what_remains():
    layout = ParallelLayout.from_config(ParallelConfig(tp=2, pp=2, ep=4), world_size=16)
    assert (layout.dp, layout.world_size, layout.edp) == (4, 16, 2)


@pytest.mark.parametrize(
    ("axes", "segment", "batch"),
    [
        (dict(tp=4), 1, 4),  # sequence parallelism cuts the batch into 4
        (dict(cp=2), 4, 4),
        (dict(cp=2, tp=2), 4, 4),
        (dict(cp=2, tp=4), 4, 8),  # half of the batch into 4
        (dict(cp=3, tp=3), 6, 18),
    ],
)
def test_lengths_that_a_layout_can_cut(axes, segment, batch):
    layout = ParallelLayout(**axes)
    assert (layout.segment_multiple, layout.batch_multiple) == (segment, batch)


def test_world_that_does_not_fit():
    with pytest.raises(ValueError, match=r"6 ranks cannot hold .*=4; start a multiple of 4"):
        ParallelLayout.from_config(ParallelConfig(tp=2, pp=2), world_size=6)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (dict(ep=3, dp=2), r"ep\*etp=3\*1 must divide .*=2; choose ep\*etp from 1, 2 "),
        (dict(ep=2, etp=2, tp=2), r"ep\*etp=2\*2 must divide"),
        (dict(vpp=2), r"vpp=2 needs pipeline stages; set parallel.pp>1"),
        (dict(tp=0), r"tp=0 must be a whole number of at least 1"),
        (dict(dp=1.5), r"dp=1.5 must be a whole number"),
    ],
)
def test_impossible_layouts(axes, message):
    with pytest.raises(ValueError, match=message):
        ParallelLayout(**axes)


MOE = SimpleNamespace(
    model_type="qwen3_moe",
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=4,
    intermediate_size=12,
    num_experts=6,
    moe_intermediate_size=10,
)


def test_model_that_fits():
    ParallelLayout(tp=2, pp=2, vpp=2, ep=3, etp=2, dp=3).validate_model(MOE)
    ParallelLayout(tp=4, pp=3).validate_model(MOE)  # ranks share key/value heads; 4 layers as 2, 1, 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (dict(tp=3), "parallel.tp=3 must divide the model's num_attention_heads=8"),
        (dict(tp=3), "parallel.tp=3 must divide the model's num_key_value_heads=2"),
        (dict(tp=8), "parallel.tp=8 must divide the model's intermediate_size=12"),
        (dict(pp=2, vpp=4), "parallel.pp*vpp=8 is more than the model's num_hidden_layers=4; lower pp or vpp"),
        (dict(ep=4, dp=4), "parallel.ep=4 must divide the model's num_experts=6; ep can be 1, 2, 3, 6"),
        (dict(etp=4, tp=2, dp=2), "parallel.etp=4 must divide the model's moe_intermediate_size=10"),
    ],
)
def test_model_that_does_not_fit(axes, message):
    with pytest.raises(ValueError) as error:
        ParallelLayout(**axes).validate_model(MOE)
    assert message in str(error.value)


def test_names_of_other_families():
    deepseek = SimpleNamespace(**{**vars(MOE), "model_type": "deepseek_v3", "num_experts": None, "n_routed_experts": 6})
    with pytest.raises(ValueError, match="ep=4 must divide the model's n_routed_experts=6"):
        ParallelLayout(ep=4, dp=4).validate_model(deepseek)
    shared = SimpleNamespace(**vars(MOE), shared_expert_intermediate_size=7)
    with pytest.raises(ValueError, match="tp=2 must divide the model's shared_expert_intermediate_size=7"):
        ParallelLayout(tp=2).validate_model(shared)
    olmoe = SimpleNamespace(**{**vars(MOE), "model_type": "olmoe"})
    with pytest.raises(ValueError, match="tp=4 must divide the model's num_key_value_heads=2; tp can be 1, 2"):
        ParallelLayout(tp=4).validate_model(olmoe)


def test_dense_model_has_no_experts_to_shard():
    dense = SimpleNamespace(**{**vars(MOE), "model_type": "qwen3", "num_experts": None})
    ParallelLayout(tp=2, dp=2).validate_model(dense)
    with pytest.raises(ValueError, match="qwen3 is a dense model; set parallel.ep=1"):
        ParallelLayout(ep=2, dp=2).validate_model(dense)


def test_table_has_a_line_a_rank():
    lines = ParallelLayout(tp=2, ep=2, dp=2).table().splitlines()
    assert lines[0].split() == ["rank", "pp", "dp", "cp", "tp", "edp", "ep", "etp"]
    assert lines[1].split() == ["of", "1", "2", "1", "2", "2", "2", "1"]
    assert lines[-1].split() == ["3", "0", "1", "0", "1", "1", "1", "0"]
    assert len(lines) == 3 + 4
