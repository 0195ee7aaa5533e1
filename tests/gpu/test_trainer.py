"""The trainer on one GPU: torch and megatron-core alone, TransformerEngine where it is installed."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
SPECS = [
    "local",
    pytest.param(
        "transformer_engine",
        marks=pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no TransformerEngine"),
    ),
]


@pytest.fixture(scope="module")
def groups():
    from trainer_kit import one_rank

    with one_rank() as found:
        yield found


@pytest.fixture(params=["moe", "dense"])
def folder(request, tiny_moe_dir, tiny_dense_dir):
    return tiny_moe_dir if request.param == "moe" else tiny_dense_dir


def test_device_and_nccl(groups, monkeypatch):
    from mcore_rl.parallel.groups import _local_device

    assert groups.device == torch.device("cuda", 0) == torch.device("cuda", torch.cuda.current_device())
    assert torch.distributed.get_backend(groups.world) == "nccl"
    ones = torch.ones(1000, device=groups.device)
    torch.distributed.all_reduce(ones, group=groups.dp)
    assert ones.sum().item() == 1000
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ValueError, match="has no GPU: this host shows"):
        _local_device()


def test_what_waits_in_the_host_takes_no_memory_of_the_gpu(groups):
    """Nor does it after it was used; its memory in the host is pinned."""
    from mcore_rl.model.offload import HostMemory

    gc.collect()
    before = torch.cuda.memory_allocated()
    tensor = torch.ones(2**20, device=groups.device)
    assert torch.cuda.memory_allocated() - before == 2**22
    memory = HostMemory(lambda: [tensor], groups.device)
    for _ in range(2):
        assert torch.cuda.memory_allocated() == before and tensor.is_pinned()
        with memory.on_device(change=True):
            assert tensor.device == groups.device and torch.cuda.memory_allocated() - before == 2**22
            tensor += 1
    assert tensor.unique().tolist() == [3.0]


@pytest.mark.parametrize("spec", SPECS)
def test_logprobs_are_those_of_transformers_in_fp32(folder, groups, spec):
    from trainer_kit import hf_logprobs, logprobs

    difference = logprobs(folder, groups, "float32", spec) - hf_logprobs(folder, groups.device, "float32")
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("spec", SPECS)
def test_logprobs_are_those_of_transformers_in_bf16(folder, groups, spec):
    """Where no expert is flipped by rounding: most positions. The mean over all is bounded too."""
    from trainer_kit import hf_logprobs, logprobs

    difference = logprobs(folder, groups, "bfloat16", spec) - hf_logprobs(folder, groups.device, "bfloat16")
    assert difference.abs().median() < 0.1 and difference.abs().mean() < 0.3


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_is_the_cpus(folder, groups, spec):
    from trainer_kit import one_step

    here = one_step(folder, groups, spec)
    there = step_on_cpu(folder)
    assert here["device"].startswith("cuda") and there["device"] == "cpu"
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-4, abs=1e-6)
    assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-3)
    for when in ("before", "after"):
        assert here[when] == pytest.approx(there[when], abs=1e-3), when


def step_on_cpu(folder: Path) -> dict:
    """In a process that sees no GPU: there Megatron runs by the CPU backend."""
    from runs import python_path

    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path()}
    kit = Path(__file__).with_name("trainer_kit.py")
    done = subprocess.run([sys.executable, kit, folder], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_the_planned_one(groups, tmp_path, dtype):
    """Of a model large enough that the allocator's rounding is small."""
    from tiny_models import save_tiny_hf
    from trainer_kit import build

    from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
    from mcore_rl.model.build import read_hf_config
    from mcore_rl.planning.memory import trained_state

    save_tiny_hf(tmp_path, hidden_size=512, moe_intermediate_size=512, intermediate_size=512)
    gc.collect()  # models of other tests, which hold themselves in circles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    training, _ = build(tmp_path, groups, dtype, "local")
    training.zero_grad()
    training.step()
    used = torch.cuda.memory_allocated() - before
    model = ModelConfig(path=str(tmp_path), dtype=dtype)
    planned = trained_state(read_hf_config(tmp_path), groups.layout, 0, model, OptimizerConfig(), ParallelConfig())
    print(f"{dtype}: planned {planned.bytes / 1e6:.1f} MB, used {used / 1e6:.1f} MB")
    assert used == pytest.approx(planned.bytes, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product(dtype):
    """One kernel against one product an expert; the second expert has no rows."""
    from grouped_products import both_ways

    got, want = both_ways([3, 0, 120, 7], (48, 64), device="cuda", dtype=dtype)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=1e-3 if dtype == torch.float32 else 0.1)
    assert got[3].abs().max() == 0, "the second expert's"
