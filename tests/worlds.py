"""Start torchrun once and let its ranks live through several worlds (layouts): starting them is what costs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import python_path

ROOT = Path(__file__).parents[1]


def run_worlds(script: str, cases: list[dict[str, Any]], ranks: int, timeout_s: float = 300) -> None:
    """Run `script` on `ranks` processes; it must hand its first argument to `each_world`."""
    worlds = [[case, port] for case, port in zip(cases, free_ports(len(cases)))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", script]
    env = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, json.dumps(worlds)], env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks on SIGTERM; a kill would leave them behind
            raise
    errors = [line for line in stderr.splitlines() if line.startswith("[rank")]
    assert process.returncode == 0, "\n".join(errors) or stderr


def each_world(argument: str, body: Callable[[dict[str, Any], Any], None]) -> None:
    """One rank: `body(case, groups)` in every world; `case["layout"]` holds the sizes of its ParallelLayout."""
    from mcore_rl.parallel import groups as process_groups
    from mcore_rl.parallel.layout import ParallelLayout

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's store keeps the keys of the previous world
    for case, port in json.loads(argument):
        os.environ["MASTER_PORT"] = str(port)
        groups = process_groups.init(ParallelLayout(**case["layout"]), timeout_s=300, seed=0)
        try:
            body(case, groups)
        finally:
            process_groups.destroy()


def slug(sizes: dict[str, Any]) -> str:
    """A name for a layout."""
    return "-".join(f"{name}{size}" for name, size in sizes.items()) or "one"


def free_ports(count: int) -> list[int]:
    """Ports that are free and stay so: below those that the system hands to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found
