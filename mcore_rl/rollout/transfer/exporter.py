"""What a weight transfer asks of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mcore_rl.weights.shards import Region, Shard


class Exporter(Protocol):
    """The trainer's weights under HF names; `mcore_rl.weights.sync.WeightExporter`."""

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]: ...

    def write_into(self, targets: Sequence[Shard]) -> list[int]: ...

    def checksums(self, targets: Sequence[Region]) -> list[int]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class Ranks(Protocol):
    """This rank among the trainer ranks; `mcore_rl.parallel.groups.Groups`."""

    rank: int
    world_size: int
