"""Starting nodes: what torchrun is told, what the check beforehand finds, and that the scripts parse."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mcore_rl import launch
from mcore_rl.launch import Nodes
from mcore_rl.planning.preflight import MIN_SHARED_MEMORY, node_facts, problems

ROOT = Path(__file__).parents[2]
ALIKE = {
    **{"commit": "a", "config": "b", "versions": "torch 2", "gpus": 8, "clock": 100.0},
    **{"shared_memory": 2**34, "sees_folder": True},
}


def test_torchrun_options():
    assert Nodes(8).torchrun_options("run", 600) == ["--nproc-per-node=8", "--max-restarts=0", "--standalone"]
    meeting = Nodes(8, 4, "node0:29400")
    assert meeting.world_size == 32
    options = meeting.torchrun_options("demo/grpo", 600)
    assert options[2:] == [
        *("--nnodes=4", "--rdzv-id=demo/grpo", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:29400"),
        "--rdzv-conf=join_timeout=600",
    ]
    ordered = Nodes(8, 4, "node0:29400", node_rank=3).torchrun_options("run", 600)
    assert ordered[-3:] == ["--node-rank=3", "--master-addr=node0", "--master-port=29400"]


def test_nodes_that_cannot_meet_are_refused():
    for endpoint in (None, "node0", "node0:port", ":29400"):
        with pytest.raises(ValueError, match="--nnodes=2 needs --rdzv-endpoint HOST:PORT"):
            Nodes(1, 2, endpoint)
    with pytest.raises(ValueError, match="--node-rank=2 must be from 0 to 1"):
        Nodes(1, 2, "node0:1", node_rank=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"commit": "x"}, "commit differs: 'a' on node 0 (n0), 'x' on node 1 (n1)"),
        ({"config": "x"}, "config differs"),
        ({"versions": "torch 3"}, "versions differs: 'torch 2'"),
        ({"gpus": 4}, "gpus differs: 8 on node 0"),
        ({"clock": 91.0}, "the clock of node 1 (n1) is -9.0 s off"),
        ({"shared_memory": MIN_SHARED_MEMORY // 16}, "/dev/shm of node 1 (n1) has 64 MB"),
        ({"sees_folder": False}, "node 1 (n1) does not see output_dir"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_every_difference_is_named(change, words):
    assert problems([ALIKE | {"host": "n0"}, ALIKE | {"host": "n1", "clock": 101.0}]) == []
    (line,) = problems([ALIKE | {"host": "n0"}, ALIKE | {"host": "n1"} | change])
    assert words in line


def test_facts_of_this_node():
    from mcore_rl.config import parse_config

    facts = node_facts(parse_config({"name": "a", "model": {"path": "."}}))
    other = node_facts(parse_config({"name": "b", "model": {"path": "."}}))
    assert facts["config"] != other["config"] and facts["commit"] == other["commit"]
    assert "megatron-core 0.16.1" in facts["versions"] and facts["shared_memory"] > 0
    json.dumps(facts)


def preflight(folder: Path, endpoint: str, node_rank: int, *arguments: str, timeout_s: int = 60) -> subprocess.Popen:
    options = ["--nnodes=2", f"--node-rank={node_rank}", f"--endpoint={endpoint}", f"--timeout-s={timeout_s}"]
    command = [sys.executable, "-m", "mcore_rl.planning.preflight", str(folder / "config.yaml"), *arguments, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=pipe, stderr=pipe, text=True)


def free_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def folder(tmp_path):
    config = {"name": "run", "output_dir": str(tmp_path / "runs"), "model": {"path": "."}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def finished(*nodes: subprocess.Popen) -> list[tuple[int, str, str]]:
    outputs = [node.communicate(timeout=120) for node in nodes]
    return [(node.returncode, *output) for node, output in zip(nodes, outputs)]


def test_two_nodes_check_each_other(folder):
    endpoint = free_endpoint()
    for code, out, err in finished(*(preflight(folder, endpoint, rank) for rank in (0, 1))):
        assert code == 0 and "2 nodes are ready: commit " in out, err
    assert list((folder / "runs").iterdir()) == []
    endpoint = free_endpoint()
    nodes = preflight(folder, endpoint, 0), preflight(folder, endpoint, 1, "optimizer.lr=1e-3")
    for code, _, err in finished(*nodes):
        assert code == 2 and "error: config differs: " in err and "on node 1 (" in err


def test_a_node_that_does_not_come_is_named(folder):
    ((code, _, err),) = finished(preflight(folder, free_endpoint(), 0, timeout_s=2))
    assert code == 2 and "of 2 nodes, [1] did not come to 127.0.0.1:" in err and "Traceback" not in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        ((code, _, err),) = finished(preflight(folder, endpoint, 0, timeout_s=2))
    assert code == 2 and f"cannot listen at {endpoint}" in err


@pytest.mark.parametrize("script", sorted((ROOT / "examples").rglob("*.s[hb]*")), ids=lambda p: p.name)
def test_scripts_parse_and_say_how_they_are_used(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "set -euo pipefail" in text
    assert "pkill" not in text and "killall" not in text
    if script.parent.name == "launch":
        clean = {k: v for k, v in os.environ.items() if k not in ("HEAD", "NNODES", "NODE_RANK")}
        bare = subprocess.run(["bash", script], capture_output=True, text=True, env=clean)
        assert bare.returncode != 0 and "usage: " in bare.stderr


@pytest.mark.parametrize(
    "exit_codes, named, code",
    [
        ({0: -15, 1: -9}, ["rank 1"], 1),  # killed; the other was ended for it
        ({0: 1, 1: -9}, [], 1),  # one lost the other, has said so, and torchrun ended what hung
        ({0: 2, 1: -15}, [], 2),
        ({0: 1, 1: -6}, ["rank 1"], 1),  # nobody but itself aborts
    ],
)
def test_ranks_that_could_say_nothing_are_named(capsys, exit_codes, named, code):
    def failure(exitcode: int) -> SimpleNamespace:
        return SimpleNamespace(exitcode=exitcode, pid=7, signal_name=lambda: signal.Signals(-exitcode).name)

    assert launch._explain({rank: failure(exitcode) for rank, exitcode in exit_codes.items()}) == code
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("error: ")[1].split(" (")[0] for line in lines] == named
