"""The only maker of process groups: torch.distributed, Megatron's parallel_state and its random states."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d

from mcore_rl.launch import FailureInWordsError, RunFailure, exit_code
from mcore_rl.parallel.layout import ParallelLayout, RankCoords

_COLLECTIVE_FAILURES = (
    "timed out",
    "timeout",
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
)

_PATIENCE_S = 3.0


@dataclass(frozen=True)
class Groups:
    """This rank's place and its process groups: `model` is tp x pp, `dp_cp` the ranks with the same dense weights."""

    rank: int
    world_size: int
    layout: ParallelLayout
    device: torch.device
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    edp: dist.ProcessGroup
    model: dist.ProcessGroup
    world: dist.ProcessGroup
    host: dist.ProcessGroup  # gloo, of all ranks: what is in the host's memory
    megatron: Mapping[str, Any] = field(repr=False)  # what Megatron's parallel_state holds while it works in them

    @property
    def coords(self) -> RankCoords:
        return self.layout.coords(self.rank)

    @property
    def is_pipeline_first(self) -> bool:
        return self.coords.pp == 0

    @property
    def is_pipeline_last(self) -> bool:
        return self.coords.pp == self.layout.pp - 1

    @property
    def reports(self) -> bool:
        """Whether this is the one of the ranks that share micro-batches whose results count."""
        return self.layout.reports(self.rank)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let Megatron work in these groups for as long as the block takes: a process may have several layouts."""
        before = _megatron_state()
        vars(parallel_state).update(self.megatron)
        try:
            yield
        finally:
            vars(parallel_state).update(before)


def init(layout: ParallelLayout, timeout_s: float, seed: int) -> Groups:
    """Join all ranks: NCCL with CUDA, else gloo. One process without torchrun's environment makes its own world.

    Args:
        layout: its world_size must be the number of started processes.
        timeout_s: longest wait of one collective.
        seed: of the model-parallel random states; tensor ranks differ from each other, data-parallel ranks do not.
    Raises:
        ValueError: the number of started processes is not the layout's, or there are more local ranks than GPUs.
        RuntimeError: already initialised, or the other ranks did not come (the message says what to look at).
    """
    if parallel_state.is_initialized():
        raise RuntimeError("process groups exist already; call groups.destroy() before another groups.init()")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != layout.world_size:
        raise ValueError(
            f"the layout needs {layout.world_size} ranks, but the number of started ranks is {started}; use torchrun "
            f"--nproc-per-node {layout.world_size}"
        )
    device = _local_device()
    with explain_timeouts(timeout_s), _one_gloo_device(timedelta(seconds=timeout_s)):
        _join(device, timeout_s)
        _initialize(layout, timeout_s)
    # As in Megatron's own training loop: stages of a pipeline draw from separate seeds.
    stage_seed = seed + 100 * layout.coords(dist.get_rank()).pp
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
    on_host = device.type == "cpu"
    host = dist.group.WORLD if on_host else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return _groups(layout, device, host)


def another(groups: Groups, layout: ParallelLayout, timeout_s: float) -> Groups:
    """Groups of a second layout over the same ranks; `groups` stay Megatron's but for the time of `active`. Collective.

    Raises:
        ValueError: the layout has another number of ranks.
    """
    if layout.world_size != groups.world_size:
        raise ValueError(f"{layout} has {layout.world_size} ranks, the run has {groups.world_size}")
    first = _megatron_state()
    vars(parallel_state).update(_NO_GROUPS)
    try:
        with explain_timeouts(timeout_s), _one_gloo_device(timedelta(seconds=timeout_s)):
            parallel_state.initialize_model_parallel(
                **layout.megatron_sizes, distributed_timeout_minutes=timeout_s / 60
            )
        return _groups(layout, groups.device, groups.host)
    finally:
        vars(parallel_state).update(first)


def destroy() -> None:
    """Leave all groups. Waits for no other rank, so it is safe after a failure; does nothing where none exist."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def explain_timeouts(timeout_s: float) -> Iterator[None]:
    """Say what to do where a collective failed because another rank is late or gone; other errors pass unchanged.

    Raises:
        FailureInWordsError: from the collective's own error, on the first rank that noticed.
        RunFailure: on the others.
    """
    try:
        yield
    except RuntimeError as error:
        ours = type(error).__module__.startswith("mcore_rl")  # a lost engine or server has said so in its own words
        if ours or not any(sign in str(error).lower() for sign in _COLLECTIVE_FAILURES):
            raise
        first, silent = _ask_the_others()
        lost = f"rank {', '.join(map(str, silent))}, which does not answer," if silent else "another rank"
        failure = FailureInWordsError(
            f"rank {os.environ.get('RANK', 0)} lost {lost} in a collective (limit {timeout_s:g} s). Look for the "
            "first error in the other ranks' output: usually one of them failed, hangs or was killed. If all are alive "
            f"and only slow, raise parallel.timeout_s. Cause: {error}"
        )
        if first:
            raise failure from error
        raise RunFailure(exit_code(failure)) from error  # the first that noticed tells it


def _ask_the_others() -> tuple[bool, list[int]]:
    """Whether this rank is the first that lost another, and the ranks that soon after have not lost one themselves:
    what was killed or hangs is among them. Nobody, where their common store is gone too."""
    try:
        store, rank = distributed_c10d._get_default_store(), dist.get_rank()
        others = [r for r in range(dist.get_world_size()) if r != rank]
        first = store.add("mcore_rl/lost", 1) == 1
        store.set(f"mcore_rl/lost/{rank}", "")
        # the first ends first: with it the launcher ends all
        end = time.monotonic() + (_PATIENCE_S if first else 2 * _PATIENCE_S)
        while time.monotonic() < end and others:
            others = [r for r in others if not store.check([f"mcore_rl/lost/{r}"])]
            time.sleep(0.1)
        return first, others
    except (RuntimeError, ValueError):  # no process group, or no connection
        return True, []


@contextlib.contextmanager
def _one_gloo_device(limit: timedelta) -> Iterator[None]:
    """Let all gloo groups that are made meanwhile share the thread that waits for their sockets.

    torch gives each group a device of its own, whose thread wakes up every 10 ms. Megatron makes some twenty
    groups, and ranks that share cores lose up to a third of their time to those threads. All get the time limit
    too: Megatron 0.16.1 leaves that of the experts' data-parallel group at torch's half an hour.
    """
    own = distributed_c10d.ProcessGroupGloo
    device = own.create_default_device()

    class OfOneDevice(own):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = own._Options()
            options._timeout, options._devices, options._threads = limit, [device], 2  # threads as torch sets them
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OfOneDevice
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = own


def _initialize(layout: ParallelLayout, timeout_s: float) -> None:
    minutes = timeout_s / 60
    parallel_state.initialize_model_parallel(**layout.megatron_sizes, distributed_timeout_minutes=minutes)


def _megatron_state() -> dict[str, Any]:
    """The variables of parallel_state; it has no other state."""
    values = vars(parallel_state).items()
    return {name: value for name, value in values if name[0] == "_" != name[1] and not callable(value)}


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; start at most that many "
            "ranks a host or correct CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(device: torch.device, timeout_s: float) -> None:
    backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _groups(layout: ParallelLayout, device: torch.device, host: dist.ProcessGroup) -> Groups:
    return Groups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        layout=layout,
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        edp=parallel_state.get_expert_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        world=dist.group.WORLD,
        host=host,
        megatron=_megatron_state(),
    )


_NO_GROUPS = _megatron_state()
