"""How many threads the processes of a run compute with on a CPU host."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mcore_rl.config import RunConfig

ASKED = "MCORE_RL_THREADS"  # "auto" where the command line, not the user, has set OMP_NUM_THREADS


@dataclass(frozen=True)
class Threads:
    ranks: int  # of each trainer rank
    engine: int  # of each engine worker in a process of its own


def cpu_threads(config: RunConfig, local_ranks: int) -> Threads:
    """Threads of each process on this host.

    "auto" is the user's OMP_NUM_THREADS where there is one. Else trainer and engine take turns in a synchronous run, so
    that each of them has all cores while the other waits; with `rollout.max_staleness` they share them.

    Example: two ranks and one engine on 8 cores
        >>> from mcore_rl.config import parse_config
        >>> config = parse_config({"name": "x", "model": {"path": "m"}})
        >>> shared_cores(config, local_ranks=2, cores=8)
        Threads(ranks=4, engine=8)
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and os.environ.get(ASKED) != "auto":
        auto = Threads(int(given), int(given))
    else:
        auto = shared_cores(config, local_ranks, len(os.sched_getaffinity(0)))
    parallel, rollout = config.parallel.threads, config.rollout.threads
    return Threads(
        auto.ranks if parallel == "auto" else parallel,
        auto.engine if rollout == "auto" else rollout,
    )


def shared_cores(config: RunConfig, local_ranks: int, cores: int) -> Threads:
    """What "auto" is on `cores` cores."""
    workers = config.rollout.num_engines * config.rollout.tensor_parallel_size
    if config.rollout.max_staleness > 0:
        share = max(1, cores // (local_ranks + workers))
        return Threads(share, share)
    return Threads(max(1, cores // local_ranks), max(1, cores // workers))
