"""Every family that vLLM runs on a CPU takes weights the direct way, three times in a row, and answers as Hugging Face.

`python test_sync_families.py WORKERS FOLDER...` is a process with an engine of its own for each folder, in turn.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import python_path
from tiny_models import FAMILIES, save_tiny_hf

from mcore_rl.rollout.vllm.arguments import CPU_LATENT_SIZE

TESTS = Path(__file__).parents[1]
TOLERANCE = 1e-5
pytestmark = pytest.mark.slow
# heads of a size that vLLM has an attention kernel for
SIZES = {name: dict(hidden_size=128) for name in ("qwen2", "qwen2_moe", "mixtral", "olmoe")} | {
    "llama": dict(head_dim=32)
}


def sync_family(folder: Path, workers: int) -> dict:
    from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, make_prompts, max_error

    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.rollout.transfer.transfer import connect
    from mcore_rl.rollout.vllm.engine import open_engine
    from mcore_rl.types import SamplingParams

    sync = WeightSyncConfig(backend="shm")
    placement = "child" if workers > 1 else "in_process"
    rollout = RolloutConfig(
        placement=placement, tensor_parallel_size=workers, kv_cache_gb=0.05, max_model_len=128, startup_timeout_s=600
    )
    engine = open_engine(rollout, sync, str(folder / "0"), "float32", 32, world_size=1, seed=0)
    try:
        models = [load_hf(folder / str(i)) for i in range(2)]
        exporters = [CheckpointExporter(folder / str(i)) for i in range(2)]
        current = CheckpointExporter(folder / "0")
        transfer = connect(engine, current, sync, ONE_RANK)
        errors = []
        for version in (1, 2, 3):
            current.tensors = exporters[version % 2].tensors
            transfer.send(version)
            groups = engine.generate(make_prompts([3, 20, 60]), SamplingParams(n=2, max_tokens=12), seed=version)
            errors.append(max_error(models[version % 2], groups))
        found = dict(detour=transfer.detour, errors=errors, problems=transfer.problems())
        transfer.close()
        return found
    finally:
        engine.close()


@pytest.fixture(scope="module", params=[1, 2], ids=lambda workers: f"into-{workers}")
def found(request, tmp_path_factory):
    """Family -> what was found, with as many workers."""
    folders = []
    for name in (name for name in FAMILIES if name != "deepseek_v3"):
        folders.append(tmp_path_factory.mktemp("families") / name)
        for seed in range(2):
            save_tiny_hf(folders[-1] / str(seed), family=name, seed=seed, **SIZES.get(name, {}))
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(request.param), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "deepseek_v3"])
def test_direct_and_right(name, found):
    assert found[name]["detour"] == "" and found[name]["problems"] == []
    assert len(found[name]["errors"]) == 3 and max(found[name]["errors"]) < TOLERANCE


def test_deepseek_in_float32_is_refused_with_what_to_do(tmp_path):
    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.rollout.vllm.engine import open_engine

    save_tiny_hf(tmp_path, family="deepseek_v3")
    with pytest.raises(ValueError, match=rf"in bfloat16 with kv_lora_rank={CPU_LATENT_SIZE[0]} .* use a GPU"):
        open_engine(RolloutConfig(), WeightSyncConfig(), str(tmp_path), "float32", 32, world_size=1, seed=0)


if __name__ == "__main__":
    print(json.dumps({Path(f).name: sync_family(Path(f), int(sys.argv[1])) for f in sys.argv[2:]}), flush=True)
