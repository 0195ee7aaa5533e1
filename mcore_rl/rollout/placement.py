"""Where the rollout engine runs and by which way its weights come."""

from __future__ import annotations

import torch

from mcore_rl.config import RolloutConfig, WeightSyncConfig


def resolve(
    rollout: RolloutConfig, weight_sync: WeightSyncConfig, world_size: int, cuda: bool | None = None
) -> tuple[str, str]:
    """Where the engine is and how its weights get there: what "auto" stands for, without starting anything.

    Args:
        cuda: whether trainer and engine have GPUs; None: as this host.

    Raises:
        ValueError: placement, number of ranks and engines, tensor parallelism, staleness, server address and backend do
            not fit together.
    """
    placement = rollout.placement
    if placement == "auto":
        alone = world_size == rollout.tensor_parallel_size == rollout.num_engines == 1 and rollout.max_staleness == 0
        placement = "in_process" if alone else "child"
    if placement == "in_process" and world_size > 1:
        raise ValueError(
            f"rollout.placement='in_process' needs one trainer rank, got {world_size}; use 'child' or 'auto'"
        )
    if placement == "in_process" and rollout.tensor_parallel_size > 1:
        raise ValueError(
            f"rollout.placement='in_process' needs rollout.tensor_parallel_size=1, got {rollout.tensor_parallel_size}; "
            "use placement 'child' or 'server'"
        )
    if placement == "in_process" and rollout.max_staleness > 0:
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness}: an engine in the trainer's process cannot generate while "
            "that trains; use rollout.placement 'child', 'server' or 'auto'"
        )
    if placement != "child" and rollout.num_engines > 1:
        raise ValueError(
            f"rollout.num_engines={rollout.num_engines} is for rollout.placement='child', got {placement!r}; several "
            "servers are a list in rollout.server_url"
        )
    if rollout.partial and rollout.max_staleness == 0:
        raise ValueError(
            "rollout.partial=true with rollout.max_staleness=0: nothing is in flight when weights change; set "
            "max_staleness to 1 or more"
        )
    if rollout.sleep and rollout.max_staleness > 0:
        raise ValueError(
            f"rollout.sleep=true with rollout.max_staleness={rollout.max_staleness}: the engine generates while the "
            "trainer works and cannot leave it its memory; set one of them off"
        )
    if placement == "server" and not rollout.server_url:
        raise ValueError("rollout.placement='server' needs rollout.server_url, for example http://127.0.0.1:8000")
    if placement == "server" and rollout.sleep:
        raise ValueError(
            "rollout.sleep=true is for an engine on the trainer's GPUs, a server has its own; set it to false"
        )
    cuda = torch.cuda.is_available() if cuda is None else cuda
    if cuda and rollout.num_engines > 1:
        raise ValueError(
            f"rollout.num_engines={rollout.num_engines}: on a GPU all children would share that of rank 0; use servers "
            "(rollout.placement='server'), each with GPUs of its own"
        )
    workers = rollout.tensor_parallel_size * rollout.num_engines
    return placement, resolve_backend(weight_sync.backend, placement, workers, cuda)


def resolve_backend(backend: str, placement: str, num_workers: int, cuda: bool) -> str:
    """The weight-transfer backend that "auto" stands for.

    Raises:
        ValueError: the backend cannot work there. A process can neither open CUDA IPC handles of its own nor be two
            ranks of an NCCL group on one GPU, and the handles of rank 0's GPU are of no use to a worker on another.
    """
    if backend in ("nccl", "ipc") and (placement == "in_process" or not cuda):
        where = "an engine in the trainer's process" if cuda else "a host without CUDA"
        raise ValueError(f"weight_sync.backend={backend!r} does not work for {where}; use 'auto', 'shm' or 'gloo'")
    if backend == "ipc" and (placement != "child" or num_workers > 1):
        raise ValueError(
            f"weight_sync.backend='ipc' needs an engine on rank 0's GPU; got rollout.placement={placement!r} with "
            f"rollout.tensor_parallel_size={num_workers}; use 'auto' or 'shm'"
        )
    if backend == "nccl" and placement == "child":
        raise ValueError(
            "weight_sync.backend='nccl' needs GPUs that the trainer does not use, an engine in a child shares rank "
            "0's; use 'auto', 'ipc' or 'shm', or rollout.placement='server'"
        )
    if backend != "auto":
        return backend
    if placement == "in_process" or not cuda:
        return "shm"
    if placement == "child":
        return "ipc" if num_workers == 1 else "shm"
    return "nccl"
