"""All cores of a CPU host work, and a user's OMP_NUM_THREADS is obeyed."""

import pytest

from mcore_rl.config import parse_config
from mcore_rl.planning.threads import ASKED, Threads, cpu_threads, shared_cores


def config(**sections):
    return parse_config({"name": "x", "model": {"path": "m"}} | sections)


@pytest.mark.parametrize(
    "rollout, ranks, cores, threads",
    [
        ({}, 1, 8, (8, 8)),
        ({}, 2, 8, (4, 8)),
        ({}, 4, 2, (1, 2)),
        ({"num_engines": 2, "tensor_parallel_size": 2}, 2, 8, (4, 2)),
        ({"max_staleness": 1}, 1, 8, (4, 4)),
        ({"max_staleness": 1, "num_engines": 3}, 1, 2, (1, 1)),
    ],
)
def test_they_take_turns_or_share(rollout, ranks, cores, threads):
    assert shared_cores(config(rollout=rollout), ranks, cores) == Threads(*threads)


def test_what_was_asked_for_comes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv(ASKED, raising=False)
    assert cpu_threads(config(), 2) == Threads(3, 3)
    assert cpu_threads(config(parallel={"threads": 5}), 2) == Threads(5, 3)
    assert cpu_threads(config(parallel={"threads": 5}, rollout={"threads": 7}), 2) == Threads(5, 7)
    monkeypatch.setenv(ASKED, "auto")  # OMP_NUM_THREADS is the command line's own
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    assert cpu_threads(config(), 2) == Threads(6, 12)


@pytest.mark.parametrize("value", [0, -1, "all"])
def test_what_is_no_number_of_threads_is_refused(value):
    with pytest.raises(ValueError, match="parallel.threads"):
        config(parallel={"threads": value})
