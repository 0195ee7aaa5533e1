"""Two agents on loopback with one rank each are two nodes: the same numbers as one; neither outlives the other."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import Started, assert_nothing_left, numbers, python_path, rows, tiny, wait_until

# sleep: nothing happens on a CPU, but every rank takes part
SECTIONS = {"rollout": {"sleep": True}, "parallel": {"ep": 2, "timeout_s": 60}, "checkpoint": {"export_hf": False}}


class Node:
    """One agent, with a mark of its own in the environment of everything it starts."""

    def __init__(self, folder: Path, name: str, endpoint: str, *arguments: str):
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        (folder / name).mkdir()
        env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / name), "PYTHONPATH": python_path()}
        command = [sys.executable, "-m", "mcore_rl.cli", "train", "config.yaml", "--nproc-per-node=1", "--nnodes=2"]
        command += [f"--rdzv-endpoint={endpoint}", *arguments]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=out, stderr=err, start_new_session=True
            )

    def kill(self) -> None:
        """The node loses its power: the agent and all it started, at once."""
        import psutil

        mine = [self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in mine:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def two_nodes(tmp_path):
    """Starts them, and leaves nothing behind."""
    started: list[Node] = []

    def start(*arguments: list[str]) -> list[Node]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        started.extend(Node(tmp_path, f"node{i}", endpoint, *a) for i, a in enumerate(arguments))
        return started

    yield start
    for node in started:
        if node.process.poll() is None:
            node.kill()


def test_two_nodes_give_the_numbers_of_one(tmp_path, model, two_nodes):
    """By torchrun's c10d rendezvous: the agents find out who is rank 0."""
    config = tiny(tmp_path, model, name="two", **SECTIONS)
    for node in two_nodes([], []):
        assert node.process.wait(240) == 0, node.err.read_text()[-3000:]
    config = tiny(tmp_path, model, name="one", **SECTIONS)
    with Started(tmp_path, config, ranks=2) as run:
        assert run.wait() == 0, run.err.read_text()[-3000:]
        assert_nothing_left(run, set())
    one, two = (numbers(rows(tmp_path / "runs" / name)) for name in ("one", "two"))
    assert set(two) == {0, 1, 2} and two[1]["policy/loss"] != 0
    for step, row in one.items():
        assert two[step] == pytest.approx(row, rel=1e-5, abs=1e-6), step


@pytest.mark.slow
def test_a_dead_node_ends_the_other(tmp_path, model, two_nodes):
    """--node-rank fixes the order, so it is known that the node with rank 1 dies and rank 0's has to notice."""
    config = tiny(tmp_path, model, steps=500, **SECTIONS)
    first, second = two_nodes(["--node-rank=0"], ["--node-rank=1"])
    metrics = Path(config["output_dir"]) / "run" / "metrics.jsonl"
    told = lambda: first.err.read_text()[-3000:] + second.err.read_text()[-3000:]  # noqa: E731
    wait_until(lambda: metrics.exists() and '"step": 1' in metrics.read_text(), 240, told, first.process)
    second.kill()
    started = time.monotonic()
    assert first.process.wait(60) == 1
    assert time.monotonic() - started < 60
    errors = [line for line in first.err.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rank 0 lost another rank in a collective" in errors[0], first.err.read_text()


@pytest.mark.slow
def test_nodes_with_different_configurations_say_so(tmp_path, model, two_nodes):
    tiny(tmp_path, model, **SECTIONS)
    for node in two_nodes([], ["optimizer.lr=2e-3"]):
        assert node.process.wait(240) != 0
    errors = "".join((tmp_path / f"node{i}.err").read_text() for i in (0, 1))
    assert "the configuration differs between ranks: '  lr: " in errors
