"""Runs of the command line as a user starts them, and what is left of them afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from mcore_rl.logs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
# metrics that training did not make: durations, and the most a process has held
OF_THE_PROCESS = (
    *("time/", "weight_sync/seconds", "tokens_per_s", "rollout/generate_s", "rollout/overlap_frac"),
    "memory/trainer_peak_gb",
)
# Rewards that tell the responses of a random policy apart, around the 1 from which a response counts as correct. The
# failing ones do so in the middle of a step: step 0 has 8 calls, every other step 8 for its rollouts and 8 to evaluate.
REWARDS = """
import os, signal

calls = 0

def variety(prompt, trajectory):
    global calls
    calls += 1
    return len(set(trajectory.text)) / 6

def raises(prompt, trajectory):
    if calls == 30:
        raise KeyError("no such thing")
    return variety(prompt, trajectory)

def nan(prompt, trajectory):
    return variety(prompt, trajectory) if calls < 30 else float("nan")

def dies_in_step_4(prompt, trajectory):
    if calls == 8 + 3 * 16 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return variety(prompt, trajectory)

def dies_in_step_6(prompt, trajectory):
    if calls == 8 + 5 * 16 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return variety(prompt, trajectory)
"""


def python_path() -> str:
    """PYTHONPATH that puts this checkout and its tests before what is there."""
    return os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))


def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """`mcore-rl ARGUMENTS` with `folder` as working folder, in this process: exit code, output, errors."""
    from mcore_rl import cli

    sys.modules.pop("tiny_rewards", None)  # it counts its calls
    out, err, argv, cwd, code = io.StringIO(), io.StringIO(), sys.argv, os.getcwd(), 0
    try:
        os.chdir(folder)
        sys.argv = ["mcore-rl", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        os.chdir(cwd)
    return code, out.getvalue(), err.getvalue()


def tiny(folder: Path, model: Path, /, **sections: Any) -> dict[str, Any]:
    """The smallest GRPO run, in `folder`/runs, as `folder`/config.yaml; `sections` are laid over it key by key."""
    (folder / "tiny_rewards.py").write_text(REWARDS)
    config = {
        "name": "run",
        "output_dir": str(folder / "runs"),
        "steps": 2,
        "model": {"path": str(model)},
        "data": {"task": "digit_sort", "params": {"n": 6}},
        "reward": "tiny_rewards:variety",
        "batch": {"prompts_per_step": 4},
        "optimizer": {"lr": 1e-3},
        "rollout": {"group_size": 2, "max_response_tokens": 8, "kv_cache_gb": 0.05},
        "weight_sync": {"probe_prompts": 2, "probe_tokens": 4, "probe_every": 1},
        "evaluate": {"every": 1, "prompts": 8},
        "logging": {"tensorboard": False, "report": False},
    }
    for key, value in sections.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return config


def on_examples(folder: Path, model: Path, algorithm: str, /, **sections: Any) -> dict[str, Any]:
    """A `tiny` run of SFT or DPO on four examples that samples nothing; they have no answer to compare with."""
    examples = [{"prompt": f"{d}=", "response": f"#{d}", "chosen": f"#{d}", "rejected": d} for d in "2468"]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))
    evaluate = {"sample": False} | sections.pop("evaluate", {})
    config = tiny(folder, model, algorithm={"name": algorithm}, evaluate=evaluate, **sections)
    del config["reward"]
    config["data"] = {"task": "file", "train_file": "data.jsonl", "eval_file": "data.jsonl"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return config


class Started:
    """One `mcore-rl train` in a process of its own; every process that comes of it carries its mark."""

    def __init__(self, folder: Path, config: dict[str, Any], *arguments: str, ranks: int = 1):
        self.run_dir = Path(config["output_dir"]) / config["name"]
        self.temporary = folder / "tmp"  # also the mark: no other process has it in its environment
        self.temporary.mkdir(exist_ok=True)
        self.seen: set[psutil.Process] = set()
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), "PYTHONPATH": python_path()}
        command = [sys.executable, "-m", "mcore_rl.cli", "train", "config.yaml", *arguments]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, f"--nproc-per-node={ranks}"], cwd=folder, env=env, stdout=out, stderr=err
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = 150) -> int:
        """The exit code."""
        return self.process.wait(timeout_s)

    def errors(self) -> list[str]:
        """What it told the user."""
        return [line for line in self.err.read_text().splitlines() if line.startswith("error: ")]

    def processes(self) -> list[psutil.Process]:
        """All that live of its descendants, those of dead parents included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        mark = f"TMPDIR={self.temporary}".encode()
        for pid in psutil.pids():  # a process may write its title over its environment: both ways are needed
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    self.seen.add(psutil.Process(pid))
        return [p for p in self.seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def rank(self, rank: int) -> psutil.Process:
        """The process of a trainer rank."""
        (process,) = (
            p for p in self.processes() if "mcore_rl.train" in p.cmdline() and p.environ().get("RANK") == str(rank)
        )
        return process

    def engine(self) -> psutil.Process:
        """The engine's child of rank 0."""
        children = self.rank(0).children()
        (process,) = (p for p in children if "EngineCore" in p.name() or "spawn_main" in str(p.cmdline()))
        return process

    def shared_files(self) -> set[Path]:
        """Files of /dev/shm that its processes have mapped."""
        maps = [Path(f"/proc/{p.pid}/maps").read_text() for p in self.processes()]
        return {Path(line.split()[-1]) for text in maps for line in text.splitlines() if "/dev/shm/" in line}

    def wait_for_step(self, step: int, timeout_s: float = 150) -> None:
        """Until metrics.jsonl holds a step."""
        path = self.run_dir / "metrics.jsonl"
        wait_until(
            lambda: path.exists() and any(row["step"] >= step for row in read_metrics(path)),
            timeout_s,
            lambda: f"{self.process.poll()=} {self.err.read_text()[-3000:]}",
            self.process,
        )

    def kill_everything(self) -> None:
        """kill -9, the launcher first."""
        self.process.send_signal(signal.SIGKILL)
        for process in self.processes():
            process.kill()
        self.process.wait()


def wait_until(
    condition: Callable[[], Any], timeout_s: float, explain: Callable[[], str], process: subprocess.Popen | None = None
) -> None:
    """Poll; AssertionError when time is up or `process` has ended."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), explain()
        time.sleep(0.05)


def assert_nothing_left(started: Started, shared: set[Path]) -> None:
    """Soon after its launcher has ended no process and no file of shared memory is left of a run."""
    wait_until(lambda: not started.processes(), 10, lambda: f"left: {[p.cmdline() for p in started.processes()]}")
    assert not [path for path in shared if path.exists()]


def rows(run_dir: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step; each step must be there once."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row for row in lines}
    assert len(by_step) == len(lines), [row["step"] for row in lines]
    return by_step


def numbers(by_step: dict[int, dict[str, Any]]) -> dict[int, dict[str, float]]:
    """step -> every number that training made."""
    return {
        step: {k: v for k, v in row.items() if k != "phase" and not any(name in k for name in OF_THE_PROCESS)}
        for step, row in by_step.items()
    }
