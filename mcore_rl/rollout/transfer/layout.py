"""The memory through which weights reach the engine's workers: which box of which HF tensor lies where in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from mcore_rl.weights.shards import Region, Shard

Metadata = list[tuple[str, str, list[int]]]  # HF name, dtype without "torch.", full shape

ALIGNMENT_BYTES = 64
BROADCAST_BYTES = 64 << 20
GLOO_TIMEOUT = timedelta(seconds=120)  # of the rendezvous and of one broadcast


@dataclass(frozen=True)
class Piece:
    """A box of an HF tensor: elements of `dtype` from byte `offset` on, `stride` elements apart."""

    name: str
    shape: list[int]  # of the HF tensor
    box: list[list[int]]
    dtype: str
    offset: int
    stride: list[int]

    def region(self) -> Region:
        """What it holds, without memory."""
        return Region(**self._region())

    def shard(self, area: Tensor) -> Shard:
        """The same in `area` (uint8)."""
        dtype = getattr(torch, self.dtype)
        size = [high - low for low, high in self.box]
        extent = (1 + sum((n - 1) * stride for n, stride in zip(size, self.stride))) * dtype.itemsize
        view = area[self.offset : self.offset + extent].view(dtype).as_strided(size, self.stride)
        return Shard(**self._region(), view=view)

    def _region(self) -> dict[str, Any]:
        return dict(
            hf_name=self.name,
            factors=tuple((size,) for size in self.shape),
            box=tuple((low, high) for low, high in self.box),
            rank=-1,  # no trainer rank
            dtype=getattr(torch, self.dtype),
        )


@dataclass(frozen=True)
class Area:
    """What one worker reads.

    `detour` says why its pieces are whole HF tensors for vLLM's loader; empty where they lie as in the worker's own
    parameters.
    """

    num_bytes: int
    pieces: list[Piece]
    detour: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Area:
        return cls(**fields | {"pieces": [Piece(**piece) for piece in fields["pieces"]]})


def checkpoint_area(metadata: Metadata, detour: str) -> Area:
    """Every HF tensor whole, in the order of `metadata`."""
    pieces, offset = [], 0
    for name, dtype, shape in metadata:
        strides = [torch.Size(shape[i + 1 :]).numel() for i in range(len(shape))]
        pieces.append(Piece(name, list(shape), [[0, size] for size in shape], dtype, offset, strides))
        offset += aligned(torch.Size(shape).numel() * getattr(torch, dtype).itemsize)
    return Area(offset, pieces, detour)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Areas:
    """The areas of all workers in one buffer; workers that read the same share one."""

    areas: list[Area]
    of_worker: list[int]

    @classmethod
    def of(cls, areas: Sequence[Area]) -> Areas:
        """Of every worker's area, in the order of the workers."""
        different: list[Area] = []
        for area in areas:
            if area not in different:
                different.append(area)
        return cls(different, [different.index(area) for area in areas])

    @property
    def num_bytes(self) -> int:
        return sum(area.num_bytes for area in self.areas)

    @property
    def detour(self) -> str:
        return next((area.detour for area in self.areas if area.detour), "")

    def starts(self) -> list[int]:
        """Byte of the buffer where every area begins."""
        return [sum(area.num_bytes for area in self.areas[:i]) for i in range(len(self.areas))]

    def regions(self) -> list[Region]:
        """All pieces, area by area."""
        return [piece.region() for area in self.areas for piece in area.pieces]

    def shards(self, buffer: Tensor) -> list[Shard]:
        """The same in `buffer` (uint8)."""
        parts = zip(self.areas, buffer.split([area.num_bytes for area in self.areas]), strict=True)
        return [piece.shard(part) for area, part in parts for piece in area.pieces]

    def by_area(self, values: Sequence[int]) -> list[list[int]]:
        """Values in the order of `regions`, one list an area."""
        ends = [sum(len(area.pieces) for area in self.areas[: i + 1]) for i in range(len(self.areas))]
        return [list(values[start:end]) for start, end in zip([0, *ends], ends)]


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
