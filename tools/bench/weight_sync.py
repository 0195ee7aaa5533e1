"""A weight update of vLLM from the Megatron policy: our transfer, a plain copy of as many bytes, export and reload.

python -m tools.bench.weight_sync --model 50M --json
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer

from mcore_rl.algorithms.grpo import GRPO
from mcore_rl.config import ModelConfig, RolloutConfig, WeightSyncConfig
from mcore_rl.data.sequences import Sample
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Policy, forward_only
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.types import RolloutGroup, SamplingParams
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards
from mcore_rl.weights.sync import WeightExporter, export_hf
from tools.bench.batches import pack_mini_batch
from tools.bench.models import Json, Model, Repeats, Seed, asked_model, random_prompts
from tools.bench.side_by_side import Timing, check_equal, environment, interleave, ratios, show, spread

MAX_PATH_DIFF = 1e-5  # of log-probs, between the paths
MAX_TRAINER_DIFF = 1e-4  # between engine and trainer
PLACEMENTS = ("child", "in_process")
PROBE_PROMPTS, PROBE_PROMPT_TOKENS, PROBE_RESPONSE_TOKENS = 4, 16, 16

Probe = list[RolloutGroup]


@dataclass(frozen=True)
class SyncPath:
    """One way from the trainer's weights into an engine. `send` returns seconds by phase."""

    engine: RolloutEngine
    send: Callable[[], dict[str, float]]
    phases: list[dict[str, float]] = field(default_factory=list)

    def __call__(self) -> None:
        self.phases.append(self.send())


def measure(folder: Path, repeats: int, seed: int, placements: Sequence[str] = PLACEMENTS) -> dict:
    """Check, then time; see docs/benchmarks.md for the keys."""
    started = environment()
    with ExitStack() as stack:
        groups = process_groups.init(ParallelLayout(), timeout_s=60, seed=seed)
        stack.callback(process_groups.destroy)
        hf_config = read_hf_config(folder)
        chunks = build_model(hf_config, ModelConfig(path=str(folder)), groups)
        load_hf(folder, megatron_shards(chunks, hf_config, groups))
        exporter = WeightExporter(chunks, hf_config, groups)
        policy = Policy(chunks, groups, vocab_size=hf_config.vocab_size)
        paths = _open_paths(stack, exporter, groups, folder, seed, placements)
        equal = check_equal(_differences(paths, policy, seed))
        num_bytes = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in exporter.metadata())
        source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
        timings = interleave({"memcpy": lambda: target.copy_(source)} | paths, repeats)
        tensors = len(exporter.metadata())
    return {
        "benchmark": "weight_sync",
        "contenders": _contenders(timings, paths),
        "ratios": _ratios(timings, paths),
        "equal": equal,
        "work": {"megabytes": num_bytes / 1e6, "tensors": tensors},
        "environment": started,
    }


def _open_paths(
    stack: ExitStack, exporter: WeightExporter, groups: Groups, folder: Path, seed: int, placements: Sequence[str]
) -> dict[str, SyncPath]:
    """Both paths into an engine of each placement."""
    # The rival's files lie in memory where the system has such a folder.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    exported = Path(stack.enter_context(TemporaryDirectory(prefix="mcore_rl_bench_", dir=memory))) / "hf"
    paths = {}
    for placement in placements:
        rollout = RolloutConfig(placement=placement, max_response_tokens=PROBE_RESPONSE_TOKENS, kv_cache_gb=0.1)
        sync = WeightSyncConfig(backend="shm")
        engine = open_engine(rollout, sync, str(folder), "float32", PROBE_PROMPT_TOKENS, world_size=1, seed=seed)
        stack.callback(engine.close)
        transfer = connect(engine, exporter, sync, groups)
        stack.callback(transfer.close)

        assert not transfer.detour, transfer.detour

        def export_and_reload(engine=engine) -> dict[str, float]:
            start = time.perf_counter()
            export_hf(exporter, exported, folder)
            written = time.perf_counter()
            engine.call_workers("reload_weights", weights_path=str(exported))
            return {"export": written - start, "reload": time.perf_counter() - written}

        paths[f"shm, {placement}"] = SyncPath(engine, partial(transfer.send, 1))
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
    if not all(np.array_equal(x.response_ids, y.response_ids) for x, y in pairs):
        return float("inf")
    return max(float(np.abs(x.rollout_logprobs - y.rollout_logprobs).max()) for x, y in pairs)


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
    rows = {name: {"seconds": spread(timing.wall_s)} for name, timing in timings.items()}
    for name in (name for name in rows if not name.endswith("child")):  # whose processor time is not this process's
        rows[name]["cpu_seconds"] = spread(timings[name].cpu_s)
    for name, path in paths.items():
        phases = _measured(path, timings)
        rows[name] |= {phase: spread([of_round[phase] for of_round in phases]) for phase in phases[0]}
    return rows


def _measured(path: SyncPath, timings: dict[str, Timing]) -> list[dict[str, float]]:
    """Phases by round; what came before was the check and the round that is not measured."""
    return path.phases[-len(timings["memcpy"].wall_s) :]


def _ratios(timings: dict[str, Timing], paths: dict[str, SyncPath]) -> dict[str, dict]:
    """Round by round. What has to be is a copy of the bytes and vLLM's packing, as measured within the sync."""
    wall = {name: timing.wall_s for name, timing in timings.items()}
    rows = {}
    for name in (name for name in paths if name.startswith("shm")):
        phases, placement = _measured(paths[name], timings), name.split(", ")[1]
        needed = [copy + of_round["pack"] for copy, of_round in zip(wall["memcpy"], phases)]
        rows |= {
            f"{name} / memcpy": ratios(wall[name], wall["memcpy"]),
            f"{name} / (memcpy + pack)": ratios(wall[name], needed),
            f"export and reload, {placement} / {name}": ratios(wall[f"export and reload, {placement}"], wall[name]),
        }
    return {name: {"seconds": row} for name, row in rows.items()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "10M",
    repeats: Repeats = 5,
    seed: Seed = 0,
    placement: Annotated[str, typer.Option(help="of the engine: child, in_process or both")] = "both",
    json: Json = False,
) -> None:
    """A full weight update in fp32, with its checks; OMP_NUM_THREADS threads (default 1) in trainer and engine each."""
    if placement not in ("both", *PLACEMENTS):
        raise SystemExit(f"error: --placement {placement!r}; use both, {' or '.join(PLACEMENTS)}")
    placements = PLACEMENTS if placement == "both" else (placement,)
    with asked_model(model, seed) as folder:
        result = measure(folder, repeats, seed, placements)
    show(result | {"settings": dict(model=model, repeats=repeats, seed=seed, placement=placement)}, json)


if __name__ == "__main__":
    app()
