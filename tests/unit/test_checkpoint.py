"""Checkpoints are complete or not there: written beside and renamed, from a copy where training goes on meanwhile."""

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mcore_rl.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.checkpoint import Progress, load_checkpoint
from mcore_rl.model.checkpoint_writer import CheckpointWriter
from mcore_rl.model.optimizer import build_training, torch_optimizers
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.layout import ParallelLayout


def training_of(path, groups, **parallel):
    """A model whose optimizer has made a step."""
    chunks = build_model(read_hf_config(path), ModelConfig(path=str(path)), groups)
    training = build_training(chunks, OptimizerConfig(), ParallelConfig(**parallel), total_steps=10)
    step(training)
    return training


def step(training) -> None:
    for chunk in training.chunks:
        for p in chunk.parameters():
            p.main_grad.normal_()
    training.step()


def weights(training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for chunk in training.chunks for p in chunk.parameters()])


def moments(training) -> torch.Tensor:
    inner = torch_optimizers(training.optimizer)
    return torch.cat([s["exp_avg_sq"].flatten() for one in inner for s in one.state.values()])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def groups():
    yield process_groups.init(ParallelLayout(), timeout_s=30, seed=0)
    process_groups.destroy()


@pytest.fixture(scope="module")
def training(groups, tiny_dense_dir):
    return training_of(tiny_dense_dir, groups)


class Gate:
    """Stands before the writing of each tensor until it is opened."""

    def __init__(self, monkeypatch, error: Exception | None = None):
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        self.opened, write = threading.Event(), filesystem_async._write_item

        @functools.wraps(write)  # its signature is looked at
        def gated(*args, **kwargs):
            assert self.opened.wait(60)
            if error is not None:
                raise error
            return write(*args, **kwargs)

        monkeypatch.setattr(filesystem_async, "_write_item", gated)


def writer(folder, training, groups, asynchronous=True, keep_last=2) -> CheckpointWriter:
    config = CheckpointConfig(keep_last=keep_last, asynchronous=asynchronous)
    return CheckpointWriter(folder, {"policy": training}, groups, config)


def test_training_goes_on_while_its_copy_is_written(tmp_path, training, groups, monkeypatch):
    gate, checkpoints = Gate(monkeypatch), writer(tmp_path, training, groups)
    before = weights(training), moments(training)
    checkpoints.save(Progress(step=3, prompts_seen=7))
    step(training)
    checkpoints.poll()
    assert names(tmp_path) == ["step_000003.tmp"], "nothing is published before all is written"
    after = weights(training), moments(training)
    gate.opened.set()
    checkpoints.wait()
    assert names(tmp_path) == ["step_000003"]
    assert load_checkpoint(tmp_path, {"policy": training}, groups) == Progress(step=3, prompts_seen=7)
    for loaded, saved, changed in zip((weights(training), moments(training)), before, after):
        assert torch.equal(loaded, saved) and not torch.equal(saved, changed)


def test_a_second_checkpoint_waits_for_the_first_and_the_last_ones_stay(tmp_path, training, groups):
    checkpoints = writer(tmp_path, training, groups)
    for number in (1, 2, 10, 10):  # the last one again, as after a resume from an older one
        checkpoints.save(Progress(step=number))
    checkpoints.wait()
    assert names(tmp_path) == ["step_000002", "step_000010"]
    assert load_checkpoint(tmp_path, {"policy": training}, groups).step == 10


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_cannot_be_written_is_told_and_removed(tmp_path, training, groups, monkeypatch, asynchronous):
    checkpoints = writer(tmp_path, training, groups, asynchronous)
    checkpoints.save(Progress(step=1))
    checkpoints.wait()
    Gate(monkeypatch, OSError("the disk is gone")).opened.set()
    with pytest.raises(
        OSError, match=r"step_000002' cannot be written: .*the disk is gone; earlier ones are untouched"
    ):
        checkpoints.save(Progress(step=2))
        checkpoints.wait()
    assert names(tmp_path) == ["step_000001"]
    monkeypatch.undo()
    checkpoints.save(Progress(step=2))
    checkpoints.wait()
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_another_form_of_the_optimizer_is_refused(tmp_path, training, groups, tiny_dense_dir):
    writer(tmp_path, training, groups, asynchronous=False).save(Progress(step=1))
    sharded = training_of(tiny_dense_dir, groups, distributed_optimizer=True)
    with pytest.raises(ValueError, match="written with parallel.distributed_optimizer=False and cannot be read with"):
        load_checkpoint(tmp_path, {"policy": sharded}, groups)


MOMENTS = ["while tensors are written", "before the new one is renamed", "while an old one is removed"]


def save_and_die(path: str, folder: str, moment: str) -> None:
    """A process that saves step 1, and is killed while it saves step 2."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from mcore_rl.model import checkpoint_writer

    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    groups = process_groups.init(ParallelLayout(), timeout_s=30, seed=0)
    training = training_of(path, groups)
    keep_last = 1 if moment == MOMENTS[2] else 2
    checkpoints = writer(Path(folder), training, groups, asynchronous=True, keep_last=keep_last)
    checkpoints.save(Progress(step=1))
    checkpoints.wait()
    if moment == MOMENTS[0]:
        write, left = filesystem_async._write_item, [3]

        @functools.wraps(write)
        def write_three(*args, **kwargs):
            left[0] -= 1
            return write(*args, **kwargs) if left[0] else kill()

        filesystem_async._write_item = write_three
    elif moment == MOMENTS[1]:
        checkpoint_writer.CheckpointWriter._publish = kill
    else:
        checkpoint_writer.shutil.rmtree = kill
        checkpoints._make_room = lambda final: [(final.with_suffix(".tmp") / "policy").mkdir(parents=True)]
    checkpoints.save(Progress(step=2))
    checkpoints.wait()


def test_a_kill_leaves_no_half_checkpoint(tmp_path, training, groups, tiny_dense_dir):
    started = []
    for i, moment in enumerate(MOMENTS):
        (tmp_path / str(i)).mkdir()
        command = [sys.executable, __file__, str(tiny_dense_dir), str(tmp_path / str(i)), moment]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, err = process.communicate(timeout=180)
        assert process.returncode == -signal.SIGKILL, err
    left = [
        ["step_000001", "step_000002.tmp"],
        ["step_000001", "step_000002.tmp"],
        ["step_000001.old.tmp", "step_000002"],
    ]
    for i, (found, step_number) in enumerate(zip(left, (1, 1, 2))):
        assert names(tmp_path / str(i)) == found
        assert load_checkpoint(tmp_path / str(i), {"policy": training}, groups).step == step_number
        writer(tmp_path / str(i), training, groups, asynchronous=False).save(Progress(step=3))
        assert names(tmp_path / str(i)) == [f"step_{step_number:06d}", "step_000003"]


if __name__ == "__main__":
    save_and_die(*sys.argv[1:])
