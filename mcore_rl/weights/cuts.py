"""How a rank holds a Megatron parameter and which boxes of HF tensors are in it: integers only.

A `Row` names one Megatron parameter, the HF tensors it is made of and the way they are cut; a cut is one of the
functions below. `families` has the rows of every model.

Letters for shapes: V vocabulary, D hidden, F ffn, E experts, G query groups (kv heads), hd head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # (low, high) in every factored dimension
Factors = tuple[Shape, ...]  # the factors of every dimension of an HF tensor: ((4, 64), (256,)) is a [256, 256] tensor


class Part(NamedTuple):
    """A box of one HF tensor inside a Megatron parameter: `param.view(cut.fold)[index]` has the shape of `box`."""

    tensor: int  # position in Row.hf
    box: Box
    index: tuple[slice | int, ...]


class Spans(NamedTuple):
    """Where a rank's parameter lies in that of one rank alone: these ranges, one after the other, along `dim`.

    Example: the second of two ranks of a gated MLP with F = 8 holds rows 4..8 of the gate and of the up projection
        >>> gated([(8, 4), (8, 4)], 2, 1).spans
        Spans(dim=0, length=16, ranges=((4, 8), (12, 16)))
    """

    dim: int
    length: int  # of the whole parameter along `dim`; a vocabulary has its padding
    ranges: tuple[tuple[int, int], ...]  # (low, high)


class Cut(NamedTuple):
    """What one rank holds of a row."""

    param_shape: Shape
    fold: Shape
    factors: tuple[Factors, ...]  # of every HF tensor; the same for any number of ranks
    parts: tuple[Part, ...]
    spans: Spans


Split = Callable[[Sequence[Shape], int, int], Cut]  # (HF shapes, number of ranks, this rank) -> what it holds


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it is made of.

    Example:
        >>> Row("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": (8, 4), "mlp.up_proj.weight": (8, 4)}, gated).axis
        'tp'
    """

    param: str  # `{expert}` stands for the rank's own count of experts
    hf: dict[str, Shape]  # name -> shape; `{expert}` stands for the model's count
    split: Split
    axis: Literal["tp", "etp"] = "tp"  # the ranks it is split over
    experts: int = 0  # of the whole model, spread over ep; 0: not an expert's parameter
    also: tuple[str, ...] = ()  # the parameter's name in other layer specs
    tied: bool = False  # a second copy of a tensor that another row owns
    dtype: torch.dtype | None = None  # kept whatever the model's is; None: the model's


def whole(shapes: Sequence[Shape], ranks: int, rank: int) -> Cut:
    """The same tensor on every rank."""
    (shape,) = shapes
    return Cut(shape, shape, (_plain(shape),), (Part(0, _full(shape), ()),), _slice(0, shape[0], 1, 0))


def split(shapes: Sequence[Shape], ranks: int, rank: int, dim: int) -> Cut:
    """Equal slices along `dim`."""
    (shape,) = shapes
    size = _share(shape[dim], ranks)
    local = (*shape[:dim], size, *shape[dim + 1 :])
    box = (*_full(shape[:dim]), (rank * size, (rank + 1) * size), *_full(shape[dim + 1 :]))
    return Cut(local, local, (_plain(shape),), (Part(0, box, ()),), _slice(dim, size, ranks, rank))


def gated(shapes: Sequence[Shape], ranks: int, rank: int) -> Cut:
    """Gate and up projections, each [F, ...], fused as [2, F/ranks, ...]."""
    shape = shapes[0]
    size = _share(shape[0], ranks)
    box = ((rank * size, (rank + 1) * size), *_full(shape[1:]))
    factors = tuple(_plain(s) for s in shapes)
    ranges = tuple((start + rank * size, start + (rank + 1) * size) for start in (0, shape[0]))
    parts = (Part(0, box, (0,)), Part(1, box, (1,)))
    return Cut((2 * size, *shape[1:]), (2, size, *shape[1:]), factors, parts, Spans(0, 2 * shape[0], ranges))


def grouped_qkv(shapes: Sequence[Shape], ranks: int, rank: int, groups: int) -> Cut:
    """Rows q..q k v of group 0, then of group 1, ...: [G, (H/G + 2) * hd, ...], cut in `ranks` equal row ranges.

    With more ranks than groups a rank holds a window of one group, which may cut through a head
    (megatron/core/transformer/attention.py:1398, version 0.16.1).
    """
    if groups % ranks and ranks % groups:
        raise ValueError(f"{groups} key/value heads and {ranks} ranks: one must be a multiple of the other")
    rest = shapes[0][1:]
    heights = [shape[0] // groups for shape in shapes]  # rows of q, k, v in one group
    local_groups = max(1, groups // ranks)
    window = _share(groups * sum(heights), ranks) // local_groups  # rows held of each local group
    group, low = divmod(rank * window * local_groups, sum(heights))
    parts = []
    start = 0
    for tensor, height in enumerate(heights):
        first, end = max(start, low), min(start + height, low + window)
        if first < end:
            box = ((group, group + local_groups), (first - start, end - start), *_full(rest))
            parts.append(Part(tensor, box, (slice(None), slice(first - low, end - low))))
        start += height
    factors = tuple(((groups, height), *_plain(rest)) for height in heights)
    rows = local_groups * window
    return Cut((rows, *rest), (local_groups, window, *rest), factors, tuple(parts), _slice(0, rows, ranks, rank))


def vocabulary(shapes: Sequence[Shape], ranks: int, rank: int) -> Cut:
    """Rows of [V, D] after padding V to a multiple of `ranks`; HF has no padding rows, so the part leaves them out."""
    (shape,) = shapes
    size = -(-shape[0] // ranks)
    low, high = min(rank * size, shape[0]), min((rank + 1) * size, shape[0])
    local = (size, *shape[1:])
    part = Part(0, ((low, high), *_full(shape[1:])), (slice(0, high - low),))
    return Cut(local, local, (_plain(shape),), (part,), _slice(0, size, ranks, rank))


def _slice(dim: int, size: int, ranks: int, rank: int) -> Spans:
    return Spans(dim, size * ranks, ((rank * size, (rank + 1) * size),))


def _share(size: int, ranks: int) -> int:
    if size % ranks:
        raise ValueError(f"a dimension of {size} cannot be divided over {ranks} ranks")
    return size // ranks


def _plain(shape: Shape) -> Factors:
    return tuple((size,) for size in shape)


def _full(shape: Shape) -> Box:
    return tuple((0, size) for size in shape)


def volume(box: Box) -> int:
    """Elements in a box."""
    return prod(high - low for low, high in box)
