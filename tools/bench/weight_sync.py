"""A weight update of vLLM from the Megatron policy: our transfer, a plain copy of as many bytes, export and reload.

python -m tools.bench.weight_sync --model 50M --json
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor

from mcore_rl.algorithms.grpo import GRPO
from mcore_rl.config import ModelConfig, RolloutConfig, WeightSyncConfig
from mcore_rl.data.packing import Sample, pack_mini_batch
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Policy, forward_only
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.vllm_engine import open_engine
from mcore_rl.rollout.weight_transfer import connect
from mcore_rl.types import RolloutGroup, SamplingParams
from mcore_rl.weights.hf_io import load_hf
from mcore_rl.weights.shards import megatron_shards
from mcore_rl.weights.sync import WeightExporter, export_hf
from tools.bench.models import SIZES, model_folder, random_prompts
from tools.bench.side_by_side import Timing, check_equal, environment, interleave, quiet_stdout, ratios, show, spread

MAX_PATH_DIFF = 1e-5  # of log-probs, between the paths
MAX_TRAINER_DIFF = 1e-4  # between engine and trainer
PLACEMENTS = ("child", "in_process")
PROBE_PROMPTS, PROBE_PROMPT_TOKENS, PROBE_RESPONSE_TOKENS = 4, 16, 16

Probe = list[RolloutGroup]


class TimedExporter(WeightExporter):
    """Remembers how long the last write took."""

    last_write_s = 0.0

    def write_into(self, views: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        super().write_into(views)
        self.last_write_s = time.perf_counter() - start


@dataclass(frozen=True)
class SyncPath:
    """One way from the trainer's weights into an engine. `send` returns the seconds of its first part, the writing."""

    engine: RolloutEngine
    send: Callable[[], float]
    write_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        start = time.perf_counter()
        write = self.send()
        self.write_s.append(write)
        self.load_s.append(time.perf_counter() - start - write)


def measure(folder: Path, repeats: int, seed: int) -> dict:
    """Check, then time; see docs/benchmarks.md for the keys."""
    started = environment()
    with ExitStack() as stack:
        groups = process_groups.init(ParallelLayout(), timeout_s=60, seed=seed)
        stack.callback(process_groups.destroy)
        hf_config = read_hf_config(folder)
        chunks = build_model(hf_config, ModelConfig(path=str(folder)), groups)
        load_hf(folder, megatron_shards(chunks, hf_config, groups))
        exporter = TimedExporter(chunks, hf_config, groups)
        policy = Policy(chunks, groups, vocab_size=hf_config.vocab_size)
        paths = _open_paths(stack, exporter, groups, folder, seed)
        equal = check_equal(_differences(paths, policy, seed))
        num_bytes = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in exporter.metadata())
        source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
        timings = interleave({"memcpy": lambda: target.copy_(source)} | paths, repeats)
        tensors = len(exporter.metadata())
    return {
        "benchmark": "weight_sync",
        "contenders": _contenders(timings, paths),
        "ratios": _ratios(timings),
        "equal": equal,
        "work": {"megabytes": num_bytes / 1e6, "tensors": tensors},
        "environment": started,
    }


def _open_paths(
    stack: ExitStack, exporter: TimedExporter, groups: Groups, folder: Path, seed: int
) -> dict[str, SyncPath]:
    """Both paths into an engine of each placement."""
    # The rival's files lie in memory where the system has such a folder.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    exported = Path(stack.enter_context(TemporaryDirectory(prefix="mcore_rl_bench_", dir=memory))) / "hf"
    paths = {}
    for placement in PLACEMENTS:
        rollout = RolloutConfig(placement=placement, max_response_tokens=PROBE_RESPONSE_TOKENS, kv_cache_gb=0.1)
        sync = WeightSyncConfig(backend="shm")
        engine = open_engine(rollout, sync, str(folder), "float32", PROBE_PROMPT_TOKENS, world_size=1, seed=seed)
        stack.callback(engine.close)
        transfer = connect(engine, exporter, sync, groups)
        stack.callback(transfer.close)

        def send(transfer=transfer) -> float:
            transfer.send(1)
            return exporter.last_write_s

        def export_and_reload(engine=engine) -> float:
            start = time.perf_counter()
            export_hf(exporter, exported, folder)
            written = time.perf_counter() - start
            engine.call_workers("reload_weights", weights_path=str(exported))
            return written

        paths[f"shm, {placement}"] = SyncPath(engine, send)
        paths[f"export and reload, {placement}"] = SyncPath(engine, export_and_reload)
    return paths


def _differences(paths: dict[str, SyncPath], policy: Policy, seed: int) -> dict[str, tuple[float, float]]:
    """Sends two versions of the weights, one after the other, along every path: whichever does nothing is found out."""
    probes, trainer_diff = {}, 0.0
    for name, path in paths.items():
        for version, factor in (("halved", 0.5), ("original", 2.0)):
            with torch.no_grad():
                for p in policy.chunks[0].parameters():
                    p.mul_(factor)  # exact, so the weights come back bit for bit
            path()
            probes[name, version] = _probe(path.engine, policy, seed)
            trainer_diff = max(trainer_diff, _trainer_diff(policy, probes[name, version]))
    first = next(iter(paths))
    return {
        "logprob_max_diff": (
            max(_diff(probe, probes[first, version]) for (_, version), probe in probes.items()),
            MAX_PATH_DIFF,
        ),
        "trainer_logprob_max_diff": (trainer_diff, MAX_TRAINER_DIFF),
        "updates_without_effect": (
            float(
                sum(_diff(probes[name, "halved"], probes[name, "original"]) < 100 * MAX_TRAINER_DIFF for name in paths)
            ),
            0.0,
        ),
    }


def _probe(engine: RolloutEngine, policy: Policy, seed: int) -> Probe:
    prompts = random_prompts(PROBE_PROMPTS, PROBE_PROMPT_TOKENS, policy.vocab_size, seed)
    return engine.generate(prompts, SamplingParams(max_tokens=PROBE_RESPONSE_TOKENS), seed=seed)


def _diff(a: Probe, b: Probe) -> float:
    """Largest difference of log-probs; infinite where other tokens were sampled."""
    pairs = [(x.trajectories[0], y.trajectories[0]) for x, y in zip(a, b, strict=True)]
    if any(x.response_ids != y.response_ids for x, y in pairs):
        return float("inf")
    return max(
        (torch.tensor(x.rollout_logprobs) - torch.tensor(y.rollout_logprobs)).abs().max().item() for x, y in pairs
    )


def _trainer_diff(policy: Policy, probe: Probe) -> float:
    samples = [
        Sample((*t.prompt_ids, *t.response_ids), len(t.response_ids), 0.0, t.rollout_logprobs)
        for group in probe
        for t in group.trajectories
    ]
    batches = pack_mini_batch(samples, GRPO(), rank=0, num_ranks=1, budget=4096, max_response=PROBE_RESPONSE_TOKENS)
    outs = forward_only(policy, batches)
    return max((o.logprobs - b.rollout_logprobs)[b.loss_mask].abs().max().item() for b, o in zip(batches, outs))


def _contenders(timings: dict[str, Timing], paths: dict[str, SyncPath]) -> dict[str, dict]:
    rounds = len(timings["memcpy"].wall_s)  # what came before was the check and the round that is not measured
    rows = {name: {"seconds": spread(timing.wall_s)} for name, timing in timings.items()}
    for name, path in paths.items():
        rows[name] |= {"write_seconds": spread(path.write_s[-rounds:]), "load_seconds": spread(path.load_s[-rounds:])}
    return rows


def _ratios(timings: dict[str, Timing]) -> dict[str, dict]:
    wall = {name: timing.wall_s for name, timing in timings.items()}
    pairs = [(f"shm, {p}", "memcpy") for p in PLACEMENTS]
    pairs += [(f"export and reload, {p}", f"shm, {p}") for p in PLACEMENTS]
    return {f"{a} / {b}": {"seconds": ratios(wall[a], wall[b])} for a, b in pairs}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help=f"HF folder, or one of {', '.join(SIZES)} (random weights)")] = "10M",
    repeats: Annotated[int, typer.Option(min=1, help="measured rounds")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """A full weight update in fp32; one thread in the trainer and one in the engine (OMP_NUM_THREADS changes both)."""
    try:
        with quiet_stdout(), model_folder(model, seed) as folder:
            result = measure(folder, repeats, seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    show(result | {"settings": dict(model=model, repeats=repeats, seed=seed)}, json)


if __name__ == "__main__":
    app()
