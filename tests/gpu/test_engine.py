"""vLLM on the trainer's GPU: samples, weights by CUDA IPC and by shared memory, sleep and waking up."""

from __future__ import annotations

import gc

import pytest
import torch

pytestmark = pytest.mark.gpu
TOLERANCE = 2e-3  # fp32 with vLLM's own kernels against transformers'


@pytest.fixture(scope="module", params=["ipc", "shm"])
def engine(request, rollout_dirs):
    """A child on this GPU that may sleep."""
    pytest.importorskip("vllm")
    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.rollout.vllm.engine import open_engine

    rollout = RolloutConfig(placement="child", max_model_len=200, gpu_memory_utilization=0.3, sleep=True)
    engine = open_engine(
        rollout,
        WeightSyncConfig(backend=request.param),
        model_path=str(rollout_dirs[0]),
        model_dtype="float32",
        max_prompt_tokens=100,
        world_size=1,
        seed=0,
    )
    yield engine
    engine.close()


def sample(engine):
    from rollout_reference import make_prompts

    from mcore_rl.types import SamplingParams

    return engine.generate(make_prompts([3, 20, 150]), SamplingParams(n=3, max_tokens=24), seed=0)


def free_bytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_samples_then_new_weights_then_sleep(engine, rollout_dirs):
    from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, max_error

    from mcore_rl.config import WeightSyncConfig
    from mcore_rl.rollout.transfer.transfer import connect

    hf = [load_hf(folder) for folder in rollout_dirs]
    assert max_error(hf[0], sample(engine)) < TOLERANCE < max_error(hf[1], sample(engine))

    current = CheckpointExporter(rollout_dirs[1])
    if engine.weight_backend == "ipc":
        current.tensors = {name: tensor.cuda() for name, tensor in current.tensors.items()}
    transfer = connect(engine, current, WeightSyncConfig(backend=engine.weight_backend), ONE_RANK)
    transfer.send(1)
    after_update = sample(engine)
    assert max_error(hf[1], after_update) < TOLERANCE

    awake = free_bytes()
    engine.sleep()
    asleep = free_bytes()
    total = torch.cuda.get_device_properties(0).total_memory
    print(f"{engine.weight_backend}: sleeping frees {(asleep - awake) / 2**30:.1f} GB of {total / 2**30:.0f}")
    assert asleep - awake > 0.2 * total, "the cache is most of the engine's 0.3 of the GPU"
    engine.sleep()  # twice is once

    assert sample(engine) == after_update, "generating wakes it up, with the weights it had"
    engine.sleep()
    transfer.send(2)  # an update wakes it up too
    assert max_error(hf[1], sample(engine)) < TOLERANCE
    transfer.close()


def test_a_run_of_two_steps_on_the_gpu(tmp_path):
    """Everything together: trainer and child engine on one GPU, the engine sleeping while the trainer works."""
    pytest.importorskip("vllm")
    from runs import Started, rows, tiny

    from tools.make_demo_model import make_demo_model

    make_demo_model(tmp_path / "model", seed=0)
    sections = {"rollout": {"placement": "child", "sleep": True, "gpu_memory_utilization": 0.3}}
    sections |= {"weight_sync": {"max_logprob_diff": 0.01}}
    with Started(tmp_path, tiny(tmp_path, tmp_path / "model", **sections)) as run:
        assert run.wait(600) == 0, run.err.read_text()[-4000:]
    found = rows(tmp_path / "runs" / "run")
    assert set(found) == {0, 1, 2} and found[2]["weight_sync/logprob_max_diff"] < 0.01
