"""Which box goes from which rank to which: the intersection of two lists of regions. Pure; nothing is sent here."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.cuts import Box, Factors, volume
from mcore_rl.weights.shards import Region, Shard, megatron_boxes

BUCKET_BYTES = 128 * 2**20  # of tensors that are sent together


@dataclass(frozen=True, slots=True)
class Copy:
    """One rectangular copy: `dst.view[dst_index] <- src.view[src_index]`, elements of `box` of the HF tensor."""

    src: Region
    dst: Region
    box: Box

    @property
    def src_index(self) -> tuple[slice, ...]:
        return _within(self.box, self.src.box)

    @property
    def dst_index(self) -> tuple[slice, ...]:
        return _within(self.box, self.dst.box)

    @property
    def numel(self) -> int:
        return volume(self.box)


@dataclass(frozen=True)
class WeightPlan:
    """Copies that write every element of the destination exactly once.

    Example:
        >>> whole = dict(hf_name="w", factors=((4,),))
        >>> left = Region(**whole, box=((0, 2),), rank=0)
        >>> right = Region(**whole, box=((2, 4),), rank=1)
        >>> plan([left, right], [Region(**whole, box=((0, 4),), rank=0)], itemsize=4).peers
        {(0, 0): 8, (1, 0): 8}
    """

    copies: tuple[Copy, ...]
    itemsize: int  # bytes an element

    @property
    def bytes(self) -> int:
        return self.itemsize * sum(copy.numel for copy in self.copies)

    @property
    def peers(self) -> dict[tuple[int, int], int]:
        """(source rank, destination rank) -> bytes, in rank order."""
        totals: Counter[tuple[int, int]] = Counter()
        for copy in self.copies:
            totals[copy.src.rank, copy.dst.rank] += copy.numel * self.itemsize
        return dict(sorted(totals.items()))

    @property
    def sent(self) -> dict[int, int]:
        """Source rank -> bytes that it gives to other ranks."""
        return self._by_rank(0)

    @property
    def received(self) -> dict[int, int]:
        """Destination rank -> bytes that come from other ranks."""
        return self._by_rank(1)

    def _by_rank(self, side: int) -> dict[int, int]:
        totals: Counter[int] = Counter()
        for pair, size in self.peers.items():
            totals[pair[side]] += size if pair[0] != pair[1] else 0
        return dict(sorted(totals.items()))

    @torch.no_grad()
    def execute_local(self) -> None:
        """Copy, where every source and destination is a `Shard` in this process."""
        for copy in self.copies:
            assert isinstance(copy.src, Shard) and isinstance(copy.dst, Shard), "a region without memory"
            copy.dst.view[copy.dst_index].copy_(copy.src.view[copy.src_index])

    def __str__(self) -> str:
        lines = [f"{len(self.copies)} copies, {self.bytes:,} bytes"]
        lines += [f"  rank {src} -> rank {dst}: {size:,} bytes" for (src, dst), size in self.peers.items()]
        return "\n".join(lines)


def plan(src: Iterable[Region], dst: Sequence[Region], itemsize: int | None = None) -> WeightPlan:
    """Intersect the two sides; the same input gives the same plan on every rank.

    A destination takes what its own rank holds from there. Everything else comes from the ranks that hold it, replicas
    where `src` has them: destinations take turns, so that no rank sends for all.

    Args:
        itemsize: bytes an element on the wire; None: of the first destination's view.

    Raises:
        ValueError: an element of `dst` has no source or several, or the sides factor a tensor differently; names it.
    """
    sources: defaultdict[str, defaultdict[Box, list[Region]]] = defaultdict(lambda: defaultdict(list))
    for region in src:
        sources[region.hf_name][region.box].append(region)
    copies = tuple(copy for region in dst for copy in _cover(region, sources[region.hf_name]))
    if itemsize is None:
        itemsize = dst[0].view.element_size() if dst else 0
    return WeightPlan(copies, itemsize)


def plan_between(
    hf_config: Any, src: ParallelLayout, dst: ParallelLayout, itemsize: int, *, same_ranks: bool = False
) -> WeightPlan:
    """From the ranks of one layout to those of another; made once, then remembered.

    Args:
        same_ranks: both are layouts of the same ranks; otherwise those of `dst` count on after those of `src`.
    """
    first = 0 if same_ranks else src.world_size
    return _plan_between(hf_config.to_json_string(use_diff=False), type(hf_config), src, dst, itemsize, first)


@lru_cache(maxsize=8)
def _plan_between(
    config: str, kind: type, src: ParallelLayout, dst: ParallelLayout, itemsize: int, first: int
) -> WeightPlan:
    hf_config = kind.from_dict(json.loads(config))
    held, wanted = (
        [box for rank in range(layout.world_size) for box in megatron_boxes(hf_config, layout, rank)]
        for layout in (src, dst)
    )
    return plan(held, [replace(box, rank=first + box.rank) for box in wanted] if first else wanted, itemsize)


def _cover(dst: Region, candidates: Mapping[Box, Sequence[Region]]) -> list[Copy]:
    copies = []
    for box, holders in candidates.items():
        if holders[0].factors != dst.factors:
            raise ValueError(
                f"tensor {dst.hf_name!r} is {holders[0].factors} on rank {holders[0].rank} and {dst.factors} on rank "
                f"{dst.rank}"
            )
        if volume(common := _intersect(box, dst.box)):
            own = next((r for r in holders if r.rank == dst.rank), None)
            if own is not None and common == dst.box:
                return [Copy(own, dst, common)]
            owners = [r.rank for r in holders if not r.replica]
            if len(owners) > 1:
                raise ValueError(f"tensor {dst.hf_name!r} is written twice: ranks {owners} all own {box}")
            if owners:
                copies.append(Copy(own or holders[dst.rank % len(holders)], dst, common))
    for a, b in combinations(copies, 2):
        if volume(_intersect(a.box, b.box)):
            raise ValueError(
                f"tensor {dst.hf_name!r} is written twice: ranks {a.src.rank} and {b.src.rank} both own part of "
                f"{a.box} and {b.box}"
            )
    found, needed = sum(copy.numel for copy in copies), volume(dst.box)
    if found != needed:
        raise ValueError(
            f"tensor {dst.hf_name!r}: {needed - found} of {needed} elements needed by rank {dst.rank} have no source"
        )
    return copies


def buckets(copies: Sequence[Copy], limit: int) -> list[dict[str, list[Copy]]]:
    """Copies by tensor, in consecutive buckets of one dtype and at most `limit` elements (or one tensor)."""
    tensors: defaultdict[str, list[Copy]] = defaultdict(list)
    for copy in copies:
        tensors[copy.dst.hf_name].append(copy)
    made: list[dict[str, list[Copy]]] = [{}]
    used, dtype = 0, None
    for name, parts in tensors.items():
        size = sum(part.numel for part in parts)
        if made[-1] and (used + size > limit or parts[0].dst.dtype != dtype):
            made.append({})
            used = 0
        made[-1][name] = parts
        used, dtype = used + size, parts[0].dst.dtype
    return made


def parts(message: Tensor, copies: Sequence[Copy]) -> Iterator[Tensor]:
    """The consecutive boxes of a message."""
    pieces = message.split([copy.numel for copy in copies])
    return (piece.view([high - low for low, high in copy.box]) for piece, copy in zip(pieces, copies, strict=True))


def refactor(region: Region, factors: Factors) -> list[Region]:
    """The same elements in the dimensions of `factors`, as boxes of it; with views of the same memory where it has any.

    Args:
        region: of plain dimensions; each may be split in two.

    Example: rows 24 to 32 of a [32, 8] tensor, which are half of the second of two groups
        >>> rows = Region(hf_name="q", factors=((32,), (8,)), box=((24, 32), (0, 8)), rank=0)
        >>> [part.box for part in refactor(rows, ((2, 16), (8,)))]
        [((1, 2), (8, 16), (0, 8))]
    """
    parts, dim = [region], 0
    for position, sizes in enumerate(factors):
        if sizes != region.factors[position]:
            parts = [piece for part in parts for piece in _split_dim(part, position, dim, sizes)]
        dim += len(sizes)
    return parts


def _split_dim(region: Region, position: int, dim: int, sizes: tuple[int, ...]) -> Iterator[Region]:
    _, height = sizes
    low, high = region.box[dim]
    factors = (*region.factors[:position], sizes, *region.factors[position + 1 :])
    inner, outer = -(-low // height) * height, high // height * height  # the whole groups
    edges = sorted({low, *((inner, outer) if inner < outer else (inner,) if low < inner < high else ()), high})
    for start, end in pairwise(edges):
        group, offset = divmod(start, height)
        rows = end - start
        count = max(1, rows // height)
        pair = ((group, group + count), (offset, offset + rows // count))
        changed = dict(factors=factors, box=(*region.box[:dim], *pair, *region.box[dim + 1 :]))
        if isinstance(region, Shard):
            view = region.view.narrow(dim, start - low, rows)
            changed["view"] = view.unflatten(dim, (count, rows // count))
        yield replace(region, **changed)


def _intersect(a: Box, b: Box) -> Box:
    """The common box; a side without overlap is (x, x)."""
    return tuple((low := max(x[0], y[0]), max(low, min(x[1], y[1]))) for x, y in zip(a, b, strict=True))


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(box, outer, strict=True))
