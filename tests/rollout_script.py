"""python rollout_script.py PLACEMENT BACKEND MODEL_A MODEL_B [die] [tp2]: what needs a process of its own, or two.

Opens an engine on A, updates it to B and back, and prints one JSON line of what rank 0 saw. With `die` it then kills
itself without a chance to clean up.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from rollout_reference import CheckpointExporter, load_hf, make_prompts, max_error

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.types import SamplingParams

placement, backend, model_a, model_b = sys.argv[1:5]
world_size = int(os.environ.get("WORLD_SIZE", 1))
if world_size > 1:
    torch.distributed.init_process_group("gloo")
else:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
ranks = SimpleNamespace(rank=torch.distributed.get_rank(), world_size=world_size)
environment = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LD_PRELOAD")}
torch.manual_seed(5)
expected_draw = torch.rand(1)
torch.manual_seed(5)

sync = WeightSyncConfig(backend=backend)
engine = None
if ranks.rank == 0:
    engine = open_engine(
        RolloutConfig(
            placement=placement,
            tensor_parallel_size=2 if "tp2" in sys.argv else 1,
            max_response_tokens=16,
            kv_cache_gb=0.05,
        ),
        sync,
        model_a,
        "float32",
        48,
        world_size,
        0,
    )
    prompts, params = make_prompts([5, 20, 31]), SamplingParams(n=2, max_tokens=16)
    models = {folder: load_hf(folder) for folder in (model_a, model_b)}
    report = {"errors": [max_error(models[model_a], engine.generate(prompts, params, seed=1))], "versions": []}
exporters = {folder: CheckpointExporter(folder, ranks.rank, world_size) for folder in (model_a, model_b)}
current = exporters[model_a]


class Current:
    """The exporter of whichever checkpoint is current."""

    def metadata(self):
        return current.metadata()

    def write_into(self, targets):
        return current.write_into(targets)

    def checksums(self, targets):
        return current.checksums(targets)

    def __iter__(self):
        return iter(current)


def shared_files(pid):
    """Names in /dev/shm that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split()[-1] for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]


def children(pid):
    """Of a process: the workers of an engine with several."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


transfer = connect(engine, Current(), sync, ranks)
for version, folder in enumerate((model_b, model_a, model_b), 1):
    current = exporters[folder]
    transfer.send(version)
    if engine is not None:
        groups = engine.generate(prompts, params, seed=version)
        report["errors"].append(max_error(models[folder], groups))
        report["versions"].append(groups[0].trajectories[0].policy_version)
if engine is not None:
    report["children"] = [pid for child in engine.child_pids for pid in (child, *children(child))]
    report["shared_files"] = [name for pid in (os.getpid(), *report["children"]) for name in shared_files(pid)]
    report["environment_kept"] = environment == {name: os.environ.get(name) for name in environment}
    report["generator_kept"] = bool(torch.rand(1) == expected_draw)
    if "die" in sys.argv:
        print(json.dumps(report), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
transfer.close()
if engine is not None:
    engine.close()
    report["group_kept"] = torch.distributed.is_initialized()
    print(json.dumps(report), flush=True)
torch.distributed.destroy_process_group()
