"""After an update the engine samples from the new weights, whichever way they came: checked against Hugging Face."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, make_prompts, max_error
from runs import python_path
from tiny_models import save_tiny_hf

from mcore_rl.config import WeightSyncConfig
from mcore_rl.rollout.engine import RolloutError
from mcore_rl.rollout.transfer.layout import Area, Areas, checkpoint_area
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.types import SamplingParams

TESTS = Path(__file__).parents[1]
SHM = WeightSyncConfig(backend="shm")
TOLERANCE = 1e-5
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def hf(rollout_dirs):
    return [load_hf(folder) for folder in rollout_dirs]


@pytest.fixture
def engine(rollout_engine, rollout_dirs):
    """The shared engine, on its first weights again afterwards."""
    yield rollout_engine
    send(rollout_engine, CheckpointExporter(rollout_dirs[0]), 0)


def send(engine, exporter, version):
    transfer = connect(engine, exporter, SHM, ONE_RANK)
    transfer.send(version)
    transfer.close()


def sample(engine, seed=0):
    return engine.generate(make_prompts([3, 20, 150]), SamplingParams(n=3, max_tokens=24), seed=seed)


def test_repeated_updates_through_one_connection(engine, rollout_dirs, hf):
    exporters = [CheckpointExporter(folder) for folder in rollout_dirs]
    before = sample(engine)
    assert max_error(hf[0], before) < TOLERANCE and max_error(hf[1], before) > 0.1
    current = CheckpointExporter(rollout_dirs[1])
    transfer = connect(engine, current, SHM, ONE_RANK)
    for version in range(1, 6):
        current.tensors = exporters[version % 2].tensors
        transfer.send(version)
        groups = sample(engine)
        assert max_error(hf[version % 2], groups) < TOLERANCE
        assert {t.policy_version for g in groups for t in g.trajectories} == {version}
    transfer.close()
    send(engine, exporters[0], 0)
    assert sample(engine) == before, "the same weights and seed must give the same samples after any number of updates"


def test_ranks_of_sampled_tokens_are_counted_without_the_compiler(rollout_engine):
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import logprobs

    assert hasattr(logprobs.batched_count_greater_than, "_torchdynamo_orig_callable"), "upstream no longer compiles it"
    assert sampler.batched_count_greater_than is logprobs.batched_count_greater_than._torchdynamo_orig_callable
    values = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    assert sampler.batched_count_greater_than(values, torch.tensor([[0.2], [0.2]])).tolist() == [2, 3]


def test_tensors_that_are_not_the_models_are_refused_by_name(rollout_engine, rollout_dirs, hf):
    def refused(change):
        exporter = CheckpointExporter(rollout_dirs[1])
        change(exporter.tensors)
        with pytest.raises(ValueError) as caught:
            connect(rollout_engine, exporter, SHM, ONE_RANK)
        return str(caught.value)

    assert f"in 1 tensors: {EXPERT} is missing" in refused(lambda t: t.pop(EXPERT))
    assert "model.layers.9.extra is not in the model" in refused(
        lambda t: t.update({"model.layers.9.extra": torch.ones(1)})
    )
    wrong_shape = refused(lambda t: t.update({EXPERT: torch.ones(8, 64)}))
    assert f"{EXPERT} has shape [8, 64], the model [64, 64]" in wrong_shape
    assert max_error(hf[0], sample(rollout_engine)) < TOLERANCE


def test_another_backend_than_the_engines_is_refused(rollout_engine, rollout_dirs):
    with pytest.raises(ValueError, match="weight_sync.backend='gloo', but the rollout engine was started with 'shm'"):
        connect(rollout_engine, CheckpointExporter(rollout_dirs[1]), WeightSyncConfig(backend="gloo"), ONE_RANK)


def test_memory_that_the_worker_cannot_open_is_explained(rollout_engine):
    with pytest.raises(RolloutError, match="needs all trainer ranks and the engine on one host"):
        rollout_engine.sync_client.init_weight_transfer_engine({"num_bytes": 4, "places": [[0, 0]], "path": "/none/a"})


def test_a_checkpoint_in_a_buffer_is_aligned_and_does_not_overlap():
    area = checkpoint_area([("a", "float32", [3, 5]), ("b", "bfloat16", [7]), ("c", "float32", [2])], "a reason")
    assert Area.from_json(json.loads(json.dumps(area.to_json()))) == area and area.num_bytes == 64 + 64 + 64
    both = Areas.of([area, checkpoint_area([("a", "float32", [1])], ""), area])
    assert both.of_worker == [0, 1, 0] and both.starts() == [0, 192] and both.detour == "a reason"
    assert both.by_area([1, 2, 3, 4]) == [[1, 2, 3], [4]]
    buffer = torch.zeros(both.num_bytes, dtype=torch.uint8)
    shards = both.shards(buffer)
    for i, shard in enumerate(shards, 1):
        shard.view.fill_(i)
    assert [(s.hf_name, s.view.shape, s.view.unique().tolist()) for s in shards] == [
        ("a", (3, 5), [1]),
        ("b", (7,), [2]),
        ("c", (2,), [3]),
        ("a", (1,), [4]),
    ]
    assert [shard.view.data_ptr() - buffer.data_ptr() for shard in shards] == [0, 64, 128, 192]


def run_script(launcher, placement, backend, dirs, *more, expect=0):
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(TESTS / "rollout_script.py"), placement, backend, *map(str, dirs), *more]
    pipe = subprocess.PIPE
    script = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = script.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        script.terminate()  # torchrun passes it on to its ranks
        raise
    assert script.returncode == expect, errors[-3000:]
    report = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert len(report["errors"]) == 4 and max(report["errors"]) < TOLERANCE
    assert report["versions"] == [1, 2, 3]
    assert report["environment_kept"] and report["generator_kept"]
    return report


@pytest.fixture(scope="module")
def padded_dirs(tmp_path_factory):
    """Experts whose width the CPU kernel pads: 48, where `rollout_dirs` have 64."""
    return [save_tiny_hf(tmp_path_factory.mktemp(f"padded_{seed}"), seed=seed) for seed in (0, 1)]


def test_gloo_into_the_trainers_own_process(padded_dirs):
    report = run_script([sys.executable], "in_process", "gloo", padded_dirs)
    assert report["children"] == [] and report["group_kept"]


def test_two_ranks_write_into_the_memory_of_a_child(padded_dirs):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    report = run_script(torchrun, "child", "shm", padded_dirs)
    assert len(report["children"]) == 1 and not alive(report["children"][0])


def test_a_child_ends_with_a_trainer_that_was_killed(padded_dirs):
    assert_all_end(run_script([sys.executable], "child", "gloo", padded_dirs, "die", expect=-9))


@pytest.mark.slow
def test_the_workers_of_a_child_end_with_it_too(padded_dirs):
    report = run_script([sys.executable], "child", "shm", padded_dirs, "die", "tp2", expect=-9)
    assert len(report["children"]) >= 3
    assert_all_end(report)


def assert_all_end(report, within_s=30):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and (any(map(alive, report["children"])) or left(report["shared_files"])):
        time.sleep(0.1)
    assert not any(map(alive, report["children"]))
    assert not left(report["shared_files"])


def left(names):
    return [name for name in names if Path(name).exists()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
