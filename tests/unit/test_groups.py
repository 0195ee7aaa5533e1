"""Process groups: one process needs no launcher, several agree with their layout, failures say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import python_path
from torch.distributed import distributed_c10d

from mcore_rl.parallel import groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.rollout.engine import RolloutError


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_without_launcher(no_launcher):
    for _ in range(2):  # destroy() leaves nothing behind
        at = groups.init(ParallelLayout(), timeout_s=30, seed=3)
        assert (at.rank, at.world_size, at.tp.size(), at.is_pipeline_first, at.is_pipeline_last) == (
            0,
            1,
            1,
            True,
            True,
        )
        with pytest.raises(RuntimeError, match="groups.destroy"):
            groups.init(ParallelLayout(), timeout_s=30, seed=3)
        groups.destroy()
        groups.destroy()
        assert not dist.is_initialized()


def test_all_gloo_groups_share_one_thread_for_their_sockets(no_launcher):
    """And keep their time limit."""

    def threads() -> set[str]:
        return {path.parent.name for path in Path("/proc/self/task").glob("*/comm") if "gloo_tcp" in path.read_text()}

    before = threads()
    groups.init(ParallelLayout(), timeout_s=31, seed=0)
    try:
        made = threads() - before
        limits = {group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map}
    finally:
        groups.destroy()
    assert len(made) == 1
    assert limits == {timedelta(seconds=31)}


def test_seed_decides_the_random_states(no_launcher):
    def drawn(seed: int) -> list[float]:
        groups.init(ParallelLayout(), timeout_s=30, seed=seed)
        try:
            return torch.rand(2, device="cuda" if torch.cuda.is_available() else "cpu").tolist()
        finally:
            groups.destroy()

    assert drawn(3) == drawn(3) != drawn(4)


def test_world_of_another_size(no_launcher):
    with pytest.raises(ValueError, match=r"needs 4 ranks, but .* is 1; use torchrun --nproc-per-node 4"):
        groups.init(ParallelLayout(tp=2, dp=2), timeout_s=30, seed=0)


def test_only_lost_ranks_are_explained():
    with pytest.raises(RuntimeError, match=r"Look for the first error .* raise parallel.timeout_s"):
        with groups.explain_timeouts(5):
            raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")
    with pytest.raises(RuntimeError, match="^shape mismatch$"):
        with groups.explain_timeouts(5):
            raise RuntimeError("shape mismatch")
    with pytest.raises(RolloutError, match="^the server: connection refused$"):
        with groups.explain_timeouts(5):
            raise RolloutError("the server: connection refused")


TWO_RANKS = """
import datetime, os, torch, torch.distributed as dist
from mcore_rl.parallel import groups
from mcore_rl.parallel.layout import ParallelLayout
at = groups.init(ParallelLayout(tp=2), timeout_s=90, seed=0)
assert (at.tp.rank(), at.dp.size(), at.coords.tp) == (at.rank, 1, at.rank)
assert dist.get_process_group_ranks(at.tp) == [0, 1]
for group in (at.world, at.tp):
    assert group._get_backend(at.device).options._timeout == datetime.timedelta(seconds=90)
dist.barrier()
if at.rank == 1:
    os._exit(0)
try:
    with groups.explain_timeouts(90):
        dist.all_reduce(torch.ones(1), group=at.tp)
except RuntimeError as error:
    print("EXPLAINED", "rank 0 lost rank 1, which does not answer, in a collective" in str(error))
groups.destroy()
"""


def test_lost_rank_ends_the_wait(tmp_path):
    script = tmp_path / "lost.py"
    script.write_text(TWO_RANKS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "EXPLAINED True" in done.stdout, done.stdout + done.stderr
