"""A sync that goes wrong is refused, and the error has the tensor's name: real mistakes, made in what is sent, on the
way and in the engine.
"""

import pytest
import torch
from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, make_prompts, max_error

from mcore_rl.config import WeightSyncConfig
from mcore_rl.rollout.engine import RolloutError
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.rollout.transfer.worker_extension import compare_with_checkpoint
from mcore_rl.types import SamplingParams

SHM = WeightSyncConfig(backend="shm")
LAYER = "model.layers.2."
EXPERTS = [f"{LAYER}mlp.experts.{i}.gate_proj.weight" for i in (2, 5)]
SQUARE = f"{LAYER}self_attn.k_proj.weight"  # [64, 64]
NORM, HEAD = f"{LAYER}self_attn.q_norm.weight", "lm_head.weight"


class Corrupting(CheckpointExporter):
    """Writes what it has, then makes one mistake with what it has written: name -> view of the engine's layout."""

    mistake = None

    def write_into(self, targets):
        before = {t.hf_name: t.view.clone() for t in targets}
        checksums = super().write_into(targets)
        if self.mistake:
            self.mistake({t.hf_name: t.view for t in targets}, before)
        return checksums


def swap_experts(views, before):
    first, second = (views[name] for name in EXPERTS)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def leave_a_layer_out(views, before):
    for name, view in views.items():
        if name.startswith(LAYER):
            view.zero_()


def transpose(views, before):
    views[SQUARE].copy_(views[SQUARE].T.clone())


def leave_one_stale(views, before):
    views[EXPERTS[1]].copy_(before[EXPERTS[1]])


def round_to_bf16(views, before):
    views[SQUARE].copy_(views[SQUARE].bfloat16())


def lose_one_bit(views, before):
    views[HEAD].view(torch.int32)[90, 63] ^= 1


MISTAKES = [
    (swap_experts, EXPERTS),
    (leave_a_layer_out, [LAYER, "tensors in all"]),
    (transpose, [SQUARE]),
    (leave_one_stale, [EXPERTS[1]]),
    (round_to_bf16, [SQUARE]),
    (lose_one_bit, [HEAD]),
]


@pytest.fixture
def sync(rollout_engine, rollout_dirs):
    """(transfer, exporter) with the weights of `rollout_dirs` sent in turn; the engine is put back afterwards."""
    exporter = Corrupting(rollout_dirs[0])
    transfer = connect(rollout_engine, exporter, SHM, ONE_RANK)
    assert transfer.detour == ""
    transfer.send(0)
    exporter.tensors = CheckpointExporter(rollout_dirs[1]).tensors
    yield transfer, exporter
    exporter.tensors, exporter.mistake = CheckpointExporter(rollout_dirs[0]).tensors, None
    transfer.send(0)
    transfer.close()


def sample(engine):
    return engine.generate(make_prompts([3, 20]), SamplingParams(n=2, max_tokens=16), seed=0)


@pytest.mark.parametrize(("mistake", "named"), MISTAKES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_mistake_on_the_way_reaches_no_engine(sync, rollout_engine, mistake, named):
    transfer, exporter = sync
    before = sample(rollout_engine)
    exporter.mistake = mistake
    with pytest.raises(RolloutError) as caught:
        transfer.send(1)
    assert all(name in str(caught.value) for name in named) and "arrived with other bits" in str(caught.value)
    if len(named) == 1:
        assert str(caught.value).count("arrived with other bits") == 1, "no other tensor is blamed"
    assert sample(rollout_engine) == before and rollout_engine.policy_version == 0
    exporter.mistake = None
    transfer.send(2)
    assert rollout_engine.policy_version == 2 and sample(rollout_engine) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(sync, value):
    transfer, exporter = sync
    exporter.tensors = exporter.tensors | {SQUARE: exporter.tensors[SQUARE].clone()}
    exporter.tensors[SQUARE][3, 5] = value
    with pytest.raises(RolloutError, match=f"{SQUARE} has values that are not finite"):
        transfer.send(1)


def layer(engine, path):
    """A module of the in-process engine's model."""
    worker = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.model.get_submodule(path)


def test_a_mistake_in_the_engine_is_read_back(sync, rollout_engine):
    transfer, exporter = sync
    transfer.send(1)
    assert transfer.problems() == []
    experts = layer(rollout_engine, "model.layers.2.mlp.experts.routed_experts")
    kept = experts.w13_weight.data.clone()
    experts.w13_weight.data[[2, 5]] = kept[[5, 2]]
    found = transfer.problems()
    of_experts = {f"{LAYER}mlp.experts.{i}.{x}_proj.weight" for i in (2, 5) for x in ("gate", "up", "down")}
    assert {line.split()[0] for line in found} == of_experts and all("packed wrongly" in line for line in found)
    experts.w13_weight.data.copy_(kept)

    norm = layer(rollout_engine, "model.layers.2.self_attn.q_norm").weight
    norm.data[7] += 1e-7  # no log-prob would show it
    assert transfer.problems() == [f"{NORM} has other bits in the engine than were sent"]
    norm.data[7] = exporter.tensors[NORM][7]

    fused = layer(rollout_engine, "model.layers.2.self_attn.qkv_proj")
    matrix = torch.cat([exporter.tensors[f"{LAYER}self_attn.{x}_proj.weight"] for x in "qkv"])
    matrix[130:140] = 0  # rows of k
    fused.weight = torch.nn.Parameter(matrix, requires_grad=False)
    fused.quant_method.process_weights_after_loading(fused)
    assert transfer.problems() == [f"{SQUARE} is packed wrongly in the engine"]


def test_experts_that_vllm_does_not_pack_again_are_named(sync, rollout_engine, monkeypatch):
    """vLLM's own behaviour, without the repair: silently garbage, see mcore_rl.rollout.vllm.patches."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    transfer, exporter = sync
    monkeypatch.setattr(Method, "_setup_kernel", Method._setup_kernel.__wrapped__)
    with pytest.raises(RolloutError, match=r"mlp.experts.0.down_proj.weight is packed wrongly in the engine.*in all"):
        transfer.send(1)


def test_packing_is_probed_in_turns(rollout_engine, rollout_dirs, monkeypatch):
    """All at first and after a failure, then every expert and matrix once in `check_packing_every` syncs."""
    from mcore_rl.rollout.transfer import engine_weights

    transfer = connect(
        rollout_engine,
        CheckpointExporter(rollout_dirs[0]),
        WeightSyncConfig(backend="shm", check_packing_every=4),
        ONE_RANK,
    )
    experts, wrong = layer(rollout_engine, "model.layers.2.mlp.experts.routed_experts"), []
    pack = type(experts.quant_method).process_weights_after_loading

    def pack_wrongly(self, module):
        pack(self, module)
        if module is experts:
            module.w13_weight.data[wrong] = 0

    monkeypatch.setattr(type(experts.quant_method), "process_weights_after_loading", pack_wrongly)
    probed, seen = engine_weights._wrong_rows, []
    monkeypatch.setattr(
        engine_weights, "_wrong_rows", lambda module, *a: [seen.append(module), *probed(module, *a)][1:]
    )
    transfer.send(0)
    all_matrices, seen[:] = list(seen), []
    assert len(all_matrices) > 4
    for version in range(1, 5):
        transfer.send(version)
    assert sorted(map(id, seen)) == sorted(map(id, all_matrices)), "each once in four"

    for expert in (2, 5):
        wrong[:] = [expert]
        with pytest.raises(RolloutError, match=f"{LAYER}mlp.experts.{expert}.down_proj.weight is packed wrongly"):
            for version in range(4):
                transfer.send(version)
        with pytest.raises(RolloutError, match=f"experts.{expert}.down_proj.weight is packed wrongly"):
            transfer.send(5)  # after a failure all are probed
        wrong[:] = []
        transfer.send(6)
    wrong[:] = [3]
    transfer.close()
    transfer = connect(rollout_engine, CheckpointExporter(rollout_dirs[0]), SHM, ONE_RANK)
    with pytest.raises(RolloutError, match="experts.3.down_proj.weight is packed wrongly"):
        transfer.send(7)
    wrong[:] = []
    transfer.send(8)
    transfer.close()


def test_bits_are_checked_at_every_sync(sync):
    """Whatever is left out of the probes."""
    transfer, exporter = sync
    for version in (1, 2, 3):
        transfer.send(version)
    exporter.mistake = lose_one_bit
    with pytest.raises(RolloutError, match=f"{HEAD} arrived with other bits"):
        transfer.send(4)


def test_the_loaders_way_gives_the_same_engine(rollout_engine, rollout_dirs, monkeypatch):
    """Bit for bit: the log-probs of the same samples, and the packed weights."""
    from mcore_rl.rollout.transfer import engine_weights

    exporter, old = Corrupting(rollout_dirs[1]), CheckpointExporter(rollout_dirs[0])
    transfer = connect(rollout_engine, exporter, SHM, ONE_RANK)
    transfer.send(1)
    transfer.close()
    direct, experts = sample(rollout_engine), layer(rollout_engine, "model.layers.2.mlp.experts.routed_experts")
    packed = [experts.w13_weight.clone(), experts.w2_weight.clone()]

    monkeypatch.setattr(engine_weights, "METHODS", ())
    transfer = connect(rollout_engine, old, SHM, ONE_RANK)
    assert "is of Unquantized" in transfer.detour
    transfer.send(0)
    transfer.close()
    assert not torch.equal(experts.w13_weight, packed[0])
    transfer = connect(rollout_engine, exporter, SHM, ONE_RANK)
    transfer.send(1)
    assert sample(rollout_engine) == direct and max_error(load_hf(rollout_dirs[1]), direct) < 1e-5
    assert torch.equal(experts.w13_weight, packed[0]) and torch.equal(experts.w2_weight, packed[1])
    exporter.mistake = transpose
    with pytest.raises(RolloutError, match=f"{SQUARE} arrived with other bits"):
        transfer.send(2)
    transfer.close()

    monkeypatch.undo()
    transfer = connect(rollout_engine, old, SHM, ONE_RANK)
    assert transfer.detour == ""
    transfer.send(0)
    transfer.close()


def test_what_does_not_fit_is_refused_before_anything_is_sent(rollout_engine, rollout_dirs):
    exporter = CheckpointExporter(rollout_dirs[1])
    exporter.tensors = {name: t for name, t in exporter.tensors.items() if not name.startswith(LAYER)}
    with pytest.raises(ValueError, match=rf"{LAYER}.* is missing"):
        connect(rollout_engine, exporter, SHM, ONE_RANK)
    exporter = CheckpointExporter(rollout_dirs[1])
    exporter.tensors[SQUARE] = exporter.tensors[SQUARE].to(torch.int8)
    with pytest.raises(ValueError, match=f"{SQUARE} has dtype int8, a weight is float32"):
        connect(rollout_engine, exporter, SHM, ONE_RANK)


def test_a_tensor_that_the_checkpoint_keeps_in_float32_may_not_be_rounded(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "a": torch.ones(2, dtype=torch.bfloat16),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "bias": torch.ones(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    given = [("a", "bfloat16", [2]), ("b", "float32", [3]), ("bias", "bfloat16", [2])]
    assert compare_with_checkpoint(given, str(tmp_path)) == [
        "bias has dtype bfloat16, the checkpoint keeps it in float32"
    ]
