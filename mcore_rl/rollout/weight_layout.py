"""One buffer that holds a whole checkpoint, and the two ways by which it reaches another process."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

Metadata = list[tuple[str, str, list[int]]]  # HF name, dtype without "torch.", full shape

ALIGNMENT_BYTES = 64
BROADCAST_BYTES = 64 << 20
GLOO_TIMEOUT = timedelta(seconds=120)  # of the rendezvous and of one broadcast


def layout_bytes(metadata: Metadata) -> int:
    """Bytes of one buffer that holds every tensor."""
    return sum(_padded_bytes(dtype, shape) for _, dtype, shape in metadata)


def tensor_views(buffer: Tensor, metadata: Metadata) -> dict[str, Tensor]:
    """Every tensor as a view of `buffer` (uint8), in the order of `metadata`."""
    views, offset = {}, 0
    for name, dtype_name, shape in metadata:
        dtype = getattr(torch, dtype_name)
        size = torch.Size(shape).numel() * dtype.itemsize
        views[name] = buffer[offset : offset + size].view(dtype).view(shape)
        offset += _padded_bytes(dtype_name, shape)
    return views


def _padded_bytes(dtype_name: str, shape: list[int]) -> int:
    size = torch.Size(shape).numel() * getattr(torch, dtype_name).itemsize
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def map_file(path: str, num_bytes: int) -> Tensor:
    """[num_bytes] uint8, shared with all that map the file. Raises ValueError where it cannot be opened."""
    try:
        return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise ValueError(
            f"shared memory {path} of trainer rank 0 cannot be opened here ({error}); weight_sync.backend='shm' needs "
            "all trainer ranks and the engine on one host under one user; use 'gloo' (CPU) or 'nccl' (GPU)"
        ) from error


def broadcast_from_0(group: torch.distributed.ProcessGroupGloo, buffer: Tensor) -> None:
    """In place, piece by piece."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    for piece in buffer.split(BROADCAST_BYTES):
        group.broadcast([piece], options).wait()
