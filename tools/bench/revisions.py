"""The demo's GRPO step at two revisions of this repository, side by side: processor seconds, seconds, what came out.

python -m tools.bench.revisions 7fb4578 --model runs/demo/sft/hf

Each revision runs its own code from a worktree of its own, on the same model and configuration, in turn. A run of a few
steps is taken off a longer one, so that starting and ending do not count.
"""

from __future__ import annotations

import json as json_
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from tools.bench.models import Json
from tools.bench.side_by_side import environment

ROOT = Path(__file__).resolve().parents[2]
FEW = 2  # steps of the shorter run
COMPARED = ("reward/mean", "response/length_mean", "policy/loss", "optimizer/grad_norm_max")


@dataclass(frozen=True)
class Ran:
    """One run: what it took, and its lines of metrics by step."""

    wall_s: float
    cpu_s: float  # of all its processes
    rows: dict[int, dict[str, float]]


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A checkout of a revision."""
    subprocess.run(["git", "worktree", "add", "--detach", str(folder), revision], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def run(code: Path, model: Path, out: Path, name: str, steps: int, ranks: int, seed: int) -> Ran:
    """Train the demo for some steps with the code of a revision. Raises SystemExit with the end of its output."""
    settings = [f"name={name}", f"output_dir={out}", f"model.path={model}", f"steps={steps}", f"seed={seed}"]
    settings += ["evaluate.every=0", "evaluate.prompts=1", "checkpoint.export_hf=false", "logging.report=false"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", "-m",
               "mcore_rl.train", str(code / "examples/demo/grpo.yaml"), *settings]  # fmt: skip
    log = out / f"{name}.log"
    with log.open("w") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=code, stdout=stream, stderr=stream,
                                   env=os.environ | {"PYTHONPATH": str(code)})  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)  # with what it has waited for itself: ranks and engine
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"error: {name} failed:\n{log.read_text()[-2000:]}")
    lines = (json_.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines())
    return Ran(wall, usage.ru_utime + usage.ru_stime, {line["step"]: line for line in lines})


def measure(revisions: list[str], model: Path, steps: int, ranks: int, rounds: int, seed: int) -> dict:
    """See docs/benchmarks.md for the keys."""
    found: dict[str, list[dict[str, float]]] = {revision: [] for revision in revisions}
    rows: dict[str, dict[int, dict[str, float]]] = {}
    with TemporaryDirectory(prefix="mcore_rl_revisions_") as folder:
        out = Path(folder)
        for round_ in range(rounds):
            for i, revision in list(enumerate(revisions))[:: 1 if round_ % 2 == 0 else -1]:
                with worktree(revision, out / f"code_{i}") as code:
                    short, long = (
                        run(code, model, out, f"r{i}_{round_}_{n}", n, ranks, seed) for n in (FEW, FEW + steps)
                    )
                found[revision].append(
                    {"cpu_s": (long.cpu_s - short.cpu_s) / steps, "wall_s": (long.wall_s - short.wall_s) / steps}
                )
                rows[revision] = long.rows
    best = {revision: {key: min(r[key] for r in runs) for key in runs[0]} for revision, runs in found.items()}
    old, new = (best[revision] for revision in revisions)
    first, second = (rows[revision] for revision in revisions)
    differences = {key: [abs(first[step][key] - second[step][key]) for step in range(1, FEW + steps + 1)]
                   for key in COMPARED}  # fmt: skip
    return {
        "benchmark": "revisions",
        "a_step": best,
        "ratio": {key: new[key] / old[key] for key in old},
        "difference_at_step_1": {key: values[0] for key, values in differences.items()},
        "steps_with_equal_rewards": next((i for i, d in enumerate(differences["reward/mean"]) if d), FEW + steps),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    old: Annotated[str, typer.Argument(help="revision to compare with")],
    new: Annotated[str, typer.Argument(help="the other one")] = "HEAD",
    model: Annotated[Path, typer.Option(help="what the demo's SFT leaves")] = Path("runs/demo/sft/hf"),
    steps: Annotated[int, typer.Option(min=1, help="that count")] = 8,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="the fastest counts")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
) -> None:
    """The demo's step at two revisions; OMP_NUM_THREADS threads a process (default 1)."""
    if not (model / "config.json").is_file():
        raise SystemExit(f"error: --model={model} is no Hugging Face folder; run examples/demo/run.sh first")
    result = measure([old, new], model.resolve(), steps, ranks, rounds, seed) | {"environment": environment()}
    if json:
        print(json_.dumps(result))
        return
    for revision, figures in result["a_step"].items():
        print(f"{revision:12} {figures['cpu_s']:.2f} processor seconds a step, {figures['wall_s']:.2f} s")
    ratio = result["ratio"]
    print(f"ratio: {ratio['cpu_s']:.3f} of the processor seconds, {ratio['wall_s']:.3f} of the time")
    print(f"step 1 differs by {result['difference_at_step_1']}; equal rewards in the first "
          f"{result['steps_with_equal_rewards']} steps")  # fmt: skip


if __name__ == "__main__":
    app()
