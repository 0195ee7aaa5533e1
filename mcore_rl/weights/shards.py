"""Regions of HF tensors, where they live in Megatron ranks and in HF files, and live views of them.

Both sides of every transfer publish the same thing: a box of a named HF tensor, in that tensor's factored shape.
Factoring makes the fused Megatron parameters plain views: q of a fused QKV is `w.view(G, (q + 2) * hd, D)[:, :q * hd]`,
the gate of a fused MLP is `w.view(2, F, D)[0]`. Copying between two sides is then `dst.copy_(src)` on intersections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mcore_rl.weights.cuts import Box, Cut, Factors, Row, Shape, Spans, whole
from mcore_rl.weights.families import LAYER, Family, family


@dataclass(frozen=True, slots=True)
class TensorSpec:
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A box of one HF tensor that a rank holds.

    Example: the rows of the second of two groups of a [32, 8] q_proj
        >>> Region(hf_name="q", factors=((2, 16), (8,)), box=((1, 2), (0, 16), (0, 8)), rank=1).shape
        (32, 8)
    """

    hf_name: str
    factors: Factors
    box: Box
    rank: int
    replica: bool = False  # another rank holds the same box and is the one that writes it
    dtype: torch.dtype | None = None  # that the tensor has whatever the model's is

    @property
    def shape(self) -> Shape:
        """Of the whole HF tensor on disk."""
        return tuple(prod(f) for f in self.factors)

    @property
    def factored_shape(self) -> Shape:
        """Of the whole HF tensor, in the dimensions that `box` counts in."""
        return tuple(size for f in self.factors for size in f)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Region):
    """A region with its live memory: `view` has the shape of `box`; writing it writes the parameter or file buffer."""

    view: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement(Region):
    """A region of one rank of any layout, without a model: `param.view(fold)[index]` is the view."""

    chunk: int  # model chunk of the rank (virtual pipeline stage)
    params: tuple[str, ...]  # names the parameter has in the chunk, one for each layer spec; the local spec's first
    param_shape: Shape
    fold: Shape
    index: tuple[slice | int, ...]
    spans: Spans

    def bind(self, param: Tensor) -> Shard:
        """A live view of this region in `param` (shape `param_shape`)."""
        view = param.detach().view(self.fold)[self.index]
        return Shard(
            hf_name=self.hf_name, factors=self.factors, box=self.box, rank=self.rank, replica=self.replica, view=view
        )


def hf_dtype(hf_config: Any) -> torch.dtype:
    """The dtype that the model's config names; float32 where it names none."""
    dtype = getattr(hf_config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def hf_regions(hf_config: Any, rank: int = 0) -> list[Region]:
    """Every tensor of a complete HF checkpoint as one whole region, in the order they are written."""
    regions = {}
    for _, hf_prefix, rows in _model_rows(family(hf_config)):
        for row in rows:
            cut = row.split(list(row.hf.values()), 1, 0)
            for expert in range(max(1, row.experts)):
                for name, factors in zip(row.hf, cut.factors, strict=True):
                    full = hf_prefix + name.format(expert=expert)
                    box = tuple((0, size) for f in factors for size in f)
                    region = Region(hf_name=full, factors=factors, box=box, rank=rank, dtype=row.dtype)
                    regions.setdefault(full, region)
    return list(regions.values())


def hf_shapes(hf_config: Any, dtype: torch.dtype | None = None) -> dict[str, TensorSpec]:
    """Names (as on disk) -> shape and dtype of a complete HF checkpoint in `dtype` (None: the config's)."""
    dtype = dtype or hf_dtype(hf_config)
    return {r.hf_name: TensorSpec(r.shape, r.dtype or dtype) for r in hf_regions(hf_config)}


def hf_shards(hf_config: Any, tensors: Mapping[str, Tensor], rank: int = 0) -> list[Shard]:
    """Whole regions over full HF tensors (contiguous, any device).

    Raises:
        ValueError: a name is missing or a tensor has another shape; both name the tensor.
    """
    shards = []
    for region in hf_regions(hf_config, rank):
        tensor = tensors.get(region.hf_name)
        if tensor is None:
            raise ValueError(f"tensor {region.hf_name!r} is missing; the model needs it with shape {region.shape}")
        shards.append(whole_shard(region, tensor))
    return shards


def whole_shard(region: Region, tensor: Tensor) -> Shard:
    """The whole HF tensor `tensor` as one shard. Raises ValueError if its shape is not the region's."""
    if tuple(tensor.shape) != region.shape:
        raise ValueError(f"tensor {region.hf_name!r} has shape {tuple(tensor.shape)}, the model needs {region.shape}")
    sizes = region.factored_shape
    box = tuple((0, size) for size in sizes)
    return Shard(
        hf_name=region.hf_name, factors=region.factors, box=box, rank=region.rank, view=tensor.detach().view(sizes)
    )


def pipeline_layers(num_layers: int, layout: Any, pp: int) -> list[range]:
    """Layers (from 0) of each model chunk of pipeline rank `pp`, chunk-major over ranks as Megatron deals them out.

    Layers that do not divide evenly are given to the first chunks, one each: with pp=4, 61 layers are 16, 15, 15, 15.

    Raises:
        ValueError: fewer layers than chunks.
    """
    chunks = layout.pp * layout.vpp
    if num_layers < chunks:
        raise ValueError(
            f"{num_layers} layers are fewer than the pp={layout.pp} x vpp={layout.vpp} pipeline chunks; lower pp or vpp"
        )
    starts = [i * (num_layers // chunks) + min(i, num_layers % chunks) for i in range(chunks + 1)]
    return [range(starts[i], starts[i + 1]) for i in range(pp, chunks, layout.pp)]


def megatron_boxes(
    hf_config: Any, layout: Any, rank: int, layers: Sequence[Sequence[int]] | None = None
) -> list[Placement]:
    """What `rank` of `layout` holds, from the shapes alone.

    Args:
        layout: ParallelLayout, of any size.
        layers: layers (from 0) of each model chunk; None: `pipeline_layers`.

    Raises:
        ValueError: a dimension cannot be divided as the layout asks; names the tensors.
    """
    table, at = family(hf_config), layout.coords(rank)
    layers = layers or pipeline_layers(len(table.layers), layout, at.pp)
    placements = []
    for chunk, numbers in enumerate(layers):
        first = at.pp == 0 and chunk == 0
        last = at.pp == layout.pp - 1 and chunk == len(layers) - 1
        for prefix, hf_prefix, rows in _model_rows(table, first, numbers, last):
            for row in rows:
                if not (row.tied and first):  # one chunk from embedding to output: the output layer has no weight
                    placements += _place(row, prefix, hf_prefix, layout, at, rank, chunk)
    return placements


def owned_boxes(hf_config: Any, layout: Any) -> list[Placement]:
    """The non-replica regions of every rank of `layout`: together each element of the model exactly once."""
    return [
        box
        for rank in range(layout.world_size)
        if _may_own(layout.coords(rank))
        for box in megatron_boxes(hf_config, layout, rank)
        if not box.replica
    ]


def megatron_shards(chunks: Sequence[nn.Module], hf_config: Any, groups: Any) -> list[Shard]:
    """Live views of every parameter of this rank's model chunks.

    The views point at the parameters' present memory: wrapping the model in Megatron's DistributedDataParallel moves
    it, so take the shards again afterwards.

    Args:
        chunks: GPT models, bare or wrapped (DistributedDataParallel, Float16Module), one a virtual pipeline stage.
        groups: has `.rank` and `.layout`.

    Raises:
        ValueError: a parameter is in no row of the table, is missing, or has another shape; names it.
    """
    models = [unwrap(chunk) for chunk in chunks]
    layers = [[layer.layer_number - 1 for layer in model.decoder.layers] for model in models]
    tensors = [{**dict(model.named_buffers()), **dict(model.named_parameters())} for model in models]
    mapped: list[set[str]] = [set() for _ in models]
    shards = []
    for place in megatron_boxes(hf_config, groups.layout, groups.rank, layers):
        name = next((n for n in place.params if n in tensors[place.chunk]), None)
        if name is None:
            raise ValueError(f"model chunk {place.chunk} has no parameter {place.params[0]!r} for {place.hf_name!r}")
        param = tensors[place.chunk][name]
        if tuple(param.shape) != place.param_shape:
            raise ValueError(
                f"parameter {name!r} of model chunk {place.chunk} has shape {tuple(param.shape)}, "
                f"the table of {hf_config.model_type!r} expects {place.param_shape} for {place.hf_name!r}"
            )
        mapped[place.chunk].add(name)
        shards.append(place.bind(param))
    _check_all_mapped(models, mapped, hf_config)
    return shards


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model inside Megatron's wrappers."""
    while isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module
    return chunk


def _check_all_mapped(models: Sequence[nn.Module], mapped: Sequence[set[str]], hf_config: Any) -> None:
    for chunk, (model, names) in enumerate(zip(models, mapped, strict=True)):
        left = [n for n, _ in model.named_parameters() if n not in names]
        if left:
            raise ValueError(
                f"parameters of model chunk {chunk} are in no row of the weight table of {hf_config.model_type!r}, "
                f"so they would be neither loaded nor saved: {', '.join(left[:8])} ({len(left)} in all)"
            )


def _may_own(at: Any) -> bool:
    return (at.dp == 0 and at.cp == 0) or at.edp == 0


def _model_rows(
    table: Family, first: bool = True, layers: Sequence[int] | None = None, last: bool = True
) -> Iterator[tuple[str, str, list[Row]]]:
    """(Megatron prefix, HF prefix, rows) of a pipeline chunk; by default of the whole model."""
    if first:
        yield "", "", table.first
    for local, number in enumerate(range(len(table.layers)) if layers is None else layers):
        yield LAYER[0].format(local), LAYER[1].format(number), table.layers[number]
    if last:
        yield "", "", table.last


def _place(row: Row, prefix: str, hf_prefix: str, layout: Any, at: Any, rank: int, chunk: int) -> Iterator[Placement]:
    cut = _cut(row, layout, at)
    first_copy = at.edp == 0 if row.experts else at.dp == at.cp == 0
    owner = first_copy and not row.tied and (row.split is not whole or getattr(at, row.axis) == 0)
    names = list(row.hf)
    per_rank = row.experts // layout.ep
    for local in range(max(1, per_rank)):
        params = tuple(prefix + name.format(expert=local) for name in (row.param, *row.also))
        for part in cut.parts:
            yield Placement(
                hf_name=hf_prefix + names[part.tensor].format(expert=at.ep * per_rank + local),
                factors=cut.factors[part.tensor],
                box=part.box,
                rank=rank,
                replica=not owner,
                dtype=row.dtype,
                chunk=chunk,
                params=params,
                param_shape=cut.param_shape,
                fold=cut.fold,
                index=part.index,
                spans=cut.spans,
            )


def _cut(row: Row, layout: Any, at: Any) -> Cut:
    try:
        if row.experts % layout.ep:
            raise ValueError(f"{row.experts} experts cannot be divided over ep={layout.ep}")
        return row.split(list(row.hf.values()), getattr(layout, row.axis), getattr(at, row.axis))
    except ValueError as error:
        raise ValueError(f"{', '.join(row.hf)} does not fit {row.axis}={getattr(layout, row.axis)}: {error}") from None
