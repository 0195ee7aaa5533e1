"""An engine of two workers on a CPU: each holds half of every weight, before and after an update."""

from pathlib import Path

import psutil
import pytest
from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, make_prompts, max_error

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.types import SamplingParams

TOLERANCE = 1e-5
pytestmark = pytest.mark.slow


def test_killed_workers_leave_no_shared_memory(rollout_dirs):
    """As vLLM does with those that do not end in time, which then unlink nothing."""

    def shared() -> set[Path]:
        return set(Path("/dev/shm").glob("vllm_dist*"))

    before = shared()
    rollout = RolloutConfig(tensor_parallel_size=2, kv_cache_gb=0.1, max_model_len=200, startup_timeout_s=200)
    arguments = dict(model_path=str(rollout_dirs[0]), model_dtype="float32", max_prompt_tokens=100)
    engine = open_engine(rollout, WeightSyncConfig(), **arguments, world_size=1, seed=0)
    try:
        assert shared() - before
        (child,) = map(psutil.Process, engine.child_pids)
        workers = child.children(recursive=True)
        for worker in workers:
            worker.kill()
        psutil.wait_procs(workers, timeout=20)
        assert shared() - before
    finally:
        engine.close()
    assert not shared() - before


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_two_workers(rollout_dirs, backend):
    rollout = RolloutConfig(tensor_parallel_size=2, kv_cache_gb=0.1, max_model_len=200, startup_timeout_s=200)
    arguments = dict(model_path=str(rollout_dirs[0]), model_dtype="float32", max_prompt_tokens=100)
    engine = open_engine(rollout, WeightSyncConfig(backend=backend), **arguments, world_size=1, seed=0)
    try:
        assert (engine.placement, engine.num_workers) == ("child", 2)
        hf = [load_hf(folder) for folder in rollout_dirs]
        prompts, params = make_prompts([3, 20, 150]), SamplingParams(n=3, max_tokens=24)
        assert max_error(hf[0], engine.generate(prompts, params, seed=0)) < TOLERANCE
        transfer = connect(engine, CheckpointExporter(rollout_dirs[1]), WeightSyncConfig(backend=backend), ONE_RANK)
        transfer.send(1)
        groups = engine.generate(prompts, params, seed=0)
        assert max_error(hf[1], groups) < TOLERANCE < max_error(hf[0], groups)
        transfer.close()
    finally:
        engine.close()
