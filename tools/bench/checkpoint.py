"""Saving and loading a training checkpoint against a plain write and read of as many bytes.

python -m tools.bench.checkpoint --model 50M --json
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor

from mcore_rl.config import CheckpointConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.checkpoint import Progress, load_checkpoint
from mcore_rl.model.checkpoint_writer import CheckpointWriter
from mcore_rl.model.optimizer import Training, build_training, torch_optimizers
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards
from tools.bench.models import Json, Model, Repeats, Seed, asked_model
from tools.bench.side_by_side import Timing, check_equal, environment, ratios, show, spread

_PIECE = 1 << 24  # bytes


def measure(folder: Path, out: Path, repeats: int, seed: int) -> dict:
    """Check that what is loaded is what was saved, then time; see docs/benchmarks.md for the keys."""
    started = environment()
    groups = process_groups.init(ParallelLayout(), timeout_s=60, seed=seed)
    try:
        trained = {"policy": _training(folder, groups)}

        def writer(name: str, asynchronous: bool) -> CheckpointWriter:
            return CheckpointWriter(
                out / name, trained, groups, CheckpointConfig(keep_last=1, asynchronous=asynchronous)
            )

        waiting, beside = writer("waiting", False), writer("beside", True)
        waiting.save(Progress())
        equal = check_equal({"different_elements": (_lost(trained["policy"], out / "waiting", groups), 0)})
        size = sum(file.stat().st_size for file in (out / "waiting").rglob("*") if file.is_file())
        content, plain = os.urandom(_PIECE), out / "plain"
        contenders = {
            "plain write": lambda: _write(plain, content, size),
            "save": lambda: waiting.save(Progress()),
            "asynchronous save, until training goes on": lambda: beside.save(Progress()),
            "asynchronous save, the rest": beside.wait,
            "plain read": lambda: _read(plain),
            "load": lambda: load_checkpoint(out / "waiting", trained, groups),
        }
        timings = _in_order(contenders, repeats)
    finally:
        process_groups.destroy()
    pairs = [("save", "plain write"), ("load", "plain read"), ("asynchronous save, until training goes on", "save")]
    return {
        "benchmark": "checkpoint",
        "contenders": {
            name: {"mb_per_s": spread([size / 1e6 / s for s in t.wall_s]), "seconds": spread(t.wall_s)}
            for name, t in timings.items()
        },
        "ratios": {f"{a} / {b}": {"seconds": ratios(timings[a].wall_s, timings[b].wall_s)} for a, b in pairs},
        "equal": equal,
        "work": {"bytes": size},
        "environment": started,
    }


def _training(folder: Path, groups: Groups) -> Training:
    """A model with Adam's state of one step."""
    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, ModelConfig(path=str(folder)), groups)
    load_hf(folder, megatron_shards(chunks, hf_config, groups))
    training = build_training(chunks, OptimizerConfig(lr=1e-5), ParallelConfig(), total_steps=1)
    for p in (p for chunk in training.chunks for p in chunk.parameters()):
        p.main_grad.normal_()
    training.step()
    return training


def _lost(training: Training, checkpoints: Path, groups: Groups) -> int:
    """Elements of weights and optimizer state that a load does not bring back."""
    saved = [x.clone() for x in _state(training)]
    for x in _state(training):
        x.zero_()
    load_checkpoint(checkpoints, {"policy": training}, groups)
    return sum(int((a != b).sum()) for a, b in zip(_state(training), saved, strict=True))


def _state(training: Training) -> list[Tensor]:
    states = [s for inner in torch_optimizers(training.optimizer) for s in inner.state.values()]
    moments = [s[k] for s in states for k in ("exp_avg", "exp_avg_sq")]
    return [p.data for chunk in training.chunks for p in chunk.parameters()] + moments


def _write(path: Path, content: bytes, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, _PIECE):
            file.write(content[: size - start])
        os.fsync(file.fileno())


def _read(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).clone()


def _in_order(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Every round in the given order, as one needs what the one before left; the first round is not measured."""
    timings = {name: Timing() for name in contenders}
    for round_ in range(-1, rounds):
        for name, contender in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            contender()
            if round_ >= 0:
                timings[name].wall_s.append(time.perf_counter() - wall)
                timings[name].cpu_s.append(time.process_time() - cpu)
    return timings


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "50M",
    repeats: Repeats = 5,
    seed: Seed = 0,
    folder: Annotated[Path | None, typer.Option(help="on the disk to measure; default: the temporary one")] = None,
    json: Json = False,
) -> None:
    """Weights and Adam's state of one rank to the disk and back."""
    work = dict(repeats=repeats, seed=seed)
    with asked_model(model, seed) as source, TemporaryDirectory(dir=folder) as out:
        result = measure(source, Path(out), **work)
    show(result | {"settings": dict(model=model) | work}, json)


if __name__ == "__main__":
    app()
