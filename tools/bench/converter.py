"""The converters against `cp` of the same folder, and the memory they take.

python -m tools.bench.converter --model 300M --json
"""

from __future__ import annotations

import json as json_module
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.atomic import to_disk
from mcore_rl.weights.convert import to_hf, to_megatron
from mcore_rl.weights.stored import open_weights
from mcore_rl.weights.verify import compare
from tools.bench.models import Json, Model, Repeats, Seed, asked_model
from tools.bench.side_by_side import check_equal, environment, interleave, ratios, show, spread

LAYOUT = ParallelLayout(tp=2, pp=2, dp=2, ep=4)
# in a process of its own: its peak of resident memory over what the imports hold, files that it has mapped included
PEAK = """
import sys
from tools.bench.converter import run, resident
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
run(*sys.argv[1:])
print(resident("VmHWM") - before)
"""


def run(what: str, source: str, out: str) -> None:
    """One conversion or comparison."""
    if what == "verify":
        found = compare(open_weights(source), open_weights(out))
        assert not found, found[:3]
        return
    shutil.rmtree(out, ignore_errors=True)
    if what == "to_megatron":
        to_megatron(source, out, LAYOUT)
    else:
        to_hf(source, out)


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def measure(hf: Path, folder: Path, repeats: int) -> dict:
    """Check, then time; see docs/benchmarks.md for the keys."""
    started, specs = environment(), open_weights(hf).specs
    size = sum(spec.nbytes for spec in specs.values())
    paths = {"to_megatron": (hf, folder / "megatron"), "to_hf": (folder / "megatron", folder / "hf")}
    paths["verify"] = (hf, folder / "megatron")
    jobs = {name: (name, str(source), str(out)) for name, (source, out) in paths.items()}
    for job in jobs.values():
        run(*job)
    equal = check_equal(
        {"different_tensors": (float(len(compare(open_weights(hf), open_weights(folder / "hf")))), 0.0)}
    )
    contenders: dict[str, Callable[[], object]] = {"cp": lambda: _copy(hf, folder / "copy")}
    contenders |= {name: lambda job=job: run(*job) for name, job in jobs.items()}
    timings = interleave(contenders, repeats)
    rows = {
        name: {
            "gb_per_s": spread([size / s / 1e9 for s in timing.wall_s]),
            "seconds": spread(timing.wall_s),
        }
        for name, timing in timings.items()
    }
    for name in jobs:  # `cp` has a process of its own
        rows[name]["cpu_seconds"] = spread(timings[name].cpu_s)
    wall = {name: timing.wall_s for name, timing in timings.items()}
    memory = {name: _peak(job) for name, job in jobs.items()}
    largest = max(spec.nbytes for spec in specs.values())
    return {
        "benchmark": "converter",
        "contenders": rows,
        "ratios": {f"{name} / cp": {"seconds": ratios(wall[name], wall["cp"])} for name in jobs},
        "equal": equal,
        "work": {"megabytes": size / 1e6, "tensors": len(specs), "largest_tensor_mb": largest / 1e6, "layout": LAYOUT},
        "peak_mb": {name: peak / 1e6 for name, peak in memory.items()},
        "environment": started,
    }


def _copy(source: Path, out: Path) -> None:
    """`cp`, and the wait for the disk that the converters have too."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["cp", "-rL", "--reflink=never", str(source), str(out)], check=True)
    for file in out.iterdir():
        to_disk(file)


def _peak(job: tuple[str, str, str]) -> int:
    done = subprocess.run([sys.executable, "-c", PEAK, *job], check=True, capture_output=True, text=True)
    return int(done.stdout)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "50M",
    repeats: Repeats = 3,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """HF -> Megatron (8 ranks), Megatron -> HF and their comparison, beside `cp -r` and fsync of the HF folder."""
    with asked_model(model, seed) as hf, TemporaryDirectory(prefix="mcore_rl_bench_") as folder:
        result = measure(hf, Path(folder), repeats)
    result["work"]["layout"] = str(LAYOUT)
    settings = dict(model=model, repeats=repeats, seed=seed)
    show(result | {"settings": settings}, json)
    if not json:
        print(json_module.dumps({"peak_mb": result["peak_mb"]}))


if __name__ == "__main__":
    app()
