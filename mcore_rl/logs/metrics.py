"""Where a run's numbers go: metrics.jsonl always, TensorBoard and W&B if asked for; phase timers; the progress line."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mcore_rl.config import RunConfig

# key in the metrics, label on the line, format
LINE = (
    ("policy/loss", "loss", "{:.4f}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("eval/accuracy", "accuracy", "{:.3f}"),
    ("response/length_mean", "length", "{:.0f}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("policy/clip_frac", "clipped", "{:.3f}"),
    ("weight_sync/logprob_max_diff", "sync diff", "{:.1e}"),
    ("rollout/tokens_per_s", "rollout tok/s", "{:,.0f}"),
    ("train/tokens_per_s", "train tok/s", "{:,.0f}"),
    ("time/step_s", "step", "{:.1f}s"),
)


class RunLog:
    """The open log of one run's folder; only one rank of a run makes it.

    Writes `metrics.jsonl` and, if the config asks, `tensorboard/` and a W&B run. A line of metrics.jsonl is one object
    {"step": int, "phase": str, metric: float, ...} and has left the process when `log` returns. NaN and infinity, which
    JSON has no words for, are written as null.

    Args:
        resume_step: steps the continued run has done: lines of later steps, and a line cut off by a crash, are removed;
            with 0 the run begins again, so all are. None is a new run.

    Raises:
        ValueError: a new run in a folder that already holds one; W&B asked for and not installed.
    """

    def __init__(self, run_dir: str | Path, config: RunConfig, resume_step: int | None = None):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        if resume_step is not None:
            _truncate(path, resume_step)
        elif path.exists() and path.stat().st_size > 0:
            raise ValueError(
                f"run folder {str(self.run_dir)!r} already holds a run of {len(read_metrics(path))} logged lines; "
                "resume=true continues it, another name=... starts beside it, or delete the folder"
            )
        self.file = path.open("a", buffering=1)  # line by line
        self.tensorboard = _open_tensorboard(self.run_dir, resume_step) if config.logging.tensorboard else None
        self.wandb = _open_wandb(self.run_dir, config) if config.logging.wandb else None

    def log(self, step: int, values: Mapping[str, float], phase: str = "train") -> None:
        """Append the metrics of one step; values may be Python or numpy numbers or 0-d tensors."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self.file.write(json.dumps({"step": step, "phase": phase, **finite}) + "\n")
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics.jsonl; a last line that a crash cut off is left out.

    Raises:
        ValueError: the file does not exist, or a line before the last is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"metrics file {str(path)!r} does not exist; pass the folder of a run")
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a line of metrics: {error}") from error
    return rows


class Timers:
    """Seconds spent by phase.

    Example:
        >>> timers = Timers()
        >>> with timers("collect"):
        ...     pass
        >>> list(timers.metrics())
        ['time/collect_s']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """{"time/<name>_s": seconds}."""
        return {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}


def format_step(values: Mapping[str, float]) -> str:
    """One short line of the metrics a person watches; those that are missing are left out."""
    return "  ".join(f"{label} {form.format(float(values[key]))}" for key, label, form in LINE if key in values)


class ProgressDisplay:
    """What `progress_display` yields: call `update` after every step."""

    def __init__(self, show: Callable[[int, str], None]):
        self.show = show

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done and what the last one gave."""
        self.show(step, format_step(metrics))


@contextmanager
def progress_display(
    config: RunConfig, completed: int, enabled: bool = True, stream: TextIO | None = None
) -> Iterator[ProgressDisplay]:
    """A line a step, on a terminal with a live bar below them; nothing if not `enabled` (every rank but one).

    Args:
        completed: steps done before, by the run that is resumed.
        stream: where to write; standard output if None.
    """
    stream = stream or sys.stdout
    if not enabled:
        yield ProgressDisplay(lambda step, text: None)
    elif not stream.isatty():
        width = len(str(config.steps))
        yield ProgressDisplay(
            lambda step, text: print(f"{config.name} {step:>{width}}/{config.steps}  {text}", file=stream, flush=True)
        )
    else:
        with _bar(stream) as bar:
            task = bar.add_task(config.name, total=config.steps, completed=completed)

            def show(step: int, text: str) -> None:
                bar.console.print(f"{step:>6}  {text}", markup=False, highlight=False, soft_wrap=True)
                bar.update(task, completed=step, refresh=True)

            yield ProgressDisplay(show)


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`; the file is replaced in one move, so a crash here loses nothing."""
    rows = read_metrics(path) if path.exists() else []
    kept = "".join(json.dumps(row) + "\n" for row in rows if step > 0 and row["step"] <= step)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(kept)
    os.replace(temporary, path)


def _open_tensorboard(run_dir: Path, resume_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run_dir / "tensorboard", purge_step=None if resume_step is None else resume_step + 1)


def _open_wandb(run_dir: Path, config: RunConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("logging.wandb=true needs the package wandb; pip install wandb, or set it to false") from error
    values = config.model_dump(mode="json")
    return wandb.init(project="mcore-rl", name=config.name, dir=run_dir, config=values, resume="allow")
