"""A training step while the engine generates the next batch, against one that waits for its own.

python -m tools.bench.async_rollout --json

One trainer rank and one engine in a child take blocks of steps in turn: synchronous, one step off, one step off with
responses that go on over weight updates. The functions are those of the loop. The first step of a block fills the
pipeline and the last has nothing to generate ahead: neither is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from mcore_rl.config import RunConfig, parse_config
from mcore_rl.model.checkpoint import Progress
from mcore_rl.planning.check import make_plan
from mcore_rl.planning.plan import rollout_sampling
from mcore_rl.rollout.ahead import open_ahead
from mcore_rl.run import Run, open_run
from mcore_rl.step.batches import Metrics, share_of_step
from mcore_rl.step.collecting import collect_rollouts, finish_rollouts, start_rollouts
from mcore_rl.step.scoring import score
from mcore_rl.step.syncing import sync_weights
from mcore_rl.step.updating import update
from tools.bench.models import Json, Repeats, Seed
from tools.bench.side_by_side import check_equal, environment, quiet_stdout, ratios, show, spread
from tools.make_demo_model import make_demo_model

MODES = {
    "synchronous": {"max_staleness": 0},
    "one step off": {"max_staleness": 1},
    "one step off, partial": {"max_staleness": 1, "partial": True},
}


@dataclass
class Block:
    """The measured steps of one block."""

    seconds: list[float] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)

    def mean(self, name: str) -> float:
        return statistics.mean(m[name] for m in self.metrics if name in m)


def train_block(run: Run, done: Progress, mode: str, steps: int) -> tuple[Progress, Block]:
    """`steps` steps of the loop in one mode."""
    config = run.plan.config
    rollout = config.rollout.model_copy(update=MODES[mode])
    config = config.model_copy(update={"rollout": rollout, "steps": done.step + steps})
    rollouts = open_ahead(run.engine, rollout_sampling(config), rollout, run.plan.task, ())
    plan, groups, models = replace(run.plan, config=config), run.groups, run.models
    block, first = Block(), done.step
    while done.step < config.steps:
        began = time.perf_counter()
        done = start_rollouts(plan, groups, rollouts, done)
        sequences, done, metrics = collect_rollouts(plan, groups, models, rollouts, done)
        mini_batches, scored = score(plan, groups, models, share_of_step(plan, groups, sequences, done.step))
        updating = time.perf_counter()
        update(plan, groups, models, run.exporter, mini_batches, done.step)
        metrics |= scored | {"update_s": time.perf_counter() - updating}
        done = done.after_step(0.0)
        finish_rollouts(plan, groups, rollouts)
        sync_weights(plan, groups, models.policy, run.engine, run.transfer, done.policy_version)
        if first + 1 < done.step < config.steps:
            block.seconds.append(time.perf_counter() - began)
            block.metrics.append(metrics)
    return done, block


@contextmanager
def opened(folder: Path, prompts: int, max_tokens: int, seed: int) -> Iterator[Run]:
    """A GRPO run on the demo's task and random model; a child engine even where nothing is ahead."""
    make_demo_model(folder / "model", seed=seed)
    (folder / "run").mkdir()
    config: RunConfig = parse_config(
        {
            "name": "run",
            "output_dir": str(folder),
            "seed": seed,
            "model": {"path": str(folder / "model")},
            "algorithm": {"name": "grpo", "correction": "tis_token"},
            "batch": {"prompts_per_step": prompts, "mini_batches": 4},
            "optimizer": {"lr": 1e-5},
            "rollout": {"group_size": 8, "max_response_tokens": max_tokens, "placement": "child"},
            "weight_sync": {"probe_prompts": 0},
            "logging": {"tensorboard": False, "report": False},
        }
    )
    with open_run(make_plan(config, world=1)) as run:
        yield run


def measure(prompts: int, max_tokens: int, steps: int, repeats: int, seed: int) -> dict:
    """`repeats` rounds of a block of each mode, every other round backwards, after one that does not count."""
    started = environment()
    blocks: dict[str, list[Block]] = {mode: [] for mode in MODES}
    with TemporaryDirectory(prefix="mcore_rl_bench_") as name, opened(Path(name), prompts, max_tokens, seed) as run:
        done = run.start
        sync_weights(run.plan, run.groups, run.models.policy, run.engine, run.transfer, done.policy_version)
        for round_ in range(-1, repeats):
            for mode in list(MODES)[:: 1 if round_ % 2 == 0 else -1]:
                done, block = train_block(run, done, mode, steps)
                if round_ >= 0:
                    blocks[mode].append(block)
    worst = max(m.get("mismatch/abs_max", 0.0) for of_mode in blocks.values() for b in of_mode for m in b.metrics)
    oldest = {mode: max(m["staleness/max"] for b in blocks[mode] for m in b.metrics) for mode in MODES}
    bounds = {f"oldest token, {mode}": (oldest[mode], MODES[mode]["max_staleness"]) for mode in MODES}
    equal = check_equal({"logprob_max_diff of present weights": (worst, 1e-4)} | bounds)
    seconds = {mode: [statistics.median(b.seconds) for b in blocks[mode]] for mode in MODES}
    synchronous = blocks["synchronous"]
    ideal = [
        max(b.mean("rollout/generate_s"), s - b.mean("rollout/generate_s")) / s
        for b, s in zip(synchronous, seconds["synchronous"])
    ]
    return {
        "benchmark": "async_rollout",
        "contenders": {
            mode: {
                "seconds": spread(seconds[mode]),
                "update_seconds": spread([b.mean("update_s") for b in blocks[mode]]),
                "generate_seconds": spread([b.mean("rollout/generate_s") for b in blocks[mode]]),
                "overlap": spread([b.mean("rollout/overlap_frac") for b in blocks[mode]]),
                "mean_staleness": spread([b.mean("staleness/mean") for b in blocks[mode]]),
            }
            for mode in MODES
        },
        "ratios": {
            f"{mode} / synchronous": {"seconds": ratios(seconds[mode], seconds["synchronous"])}
            for mode in list(MODES)[1:]
        },
        "equal": equal,
        # if the longer of generating and everything else hid the shorter one completely, from the synchronous steps
        "work": {"least_possible_ratio": spread(ideal), "responses": prompts * 8},
        "environment": started,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    prompts: Annotated[int, typer.Option(min=2, help="of one step, 8 responses each")] = 16,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="of a response; the mean of the random model is about 20")
    ] = 64,
    steps: Annotated[int, typer.Option(min=3, help="of a block; all but the first and last are measured")] = 6,
    repeats: Repeats = 5,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Asynchronous against synchronous rollouts, one trainer rank and one engine of one thread each."""
    sizes = dict(prompts=prompts, max_tokens=max_tokens, steps=steps, repeats=repeats, seed=seed)
    try:
        with quiet_stdout():
            result = measure(**sizes)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    show(result | {"settings": {"model": "demo"} | sizes}, json)


if __name__ == "__main__":
    app()
