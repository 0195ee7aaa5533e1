"""Megatron checkpoints (torch_dist) without Megatron and without process groups: one process, any layout.

A checkpoint holds global tensors in pieces: every rank has written boxes of them. A global tensor is the parameter that
one rank alone would have; the experts of a layer are one tensor [E, ...], and in models whose layers are all alike so
are the layers, [L, ...]. Reading puts a parameter together from whatever pieces there are, writing cuts it as the ranks
of a layout would. Format: torch.distributed.checkpoint (torch/distributed/checkpoint/filesystem.py, torch 2.13) under
the keys of megatron/core/transformer/transformer_block.py:831 and moe/experts.py, version 0.16.1.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.cuts import Shape
from mcore_rl.weights.families import family
from mcore_rl.weights.plan import plan
from mcore_rl.weights.shards import Placement, Shard, megatron_boxes, owned_boxes

METADATA = ".metadata"
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_FORMAT |= {"common_backend": "torch", "common_backend_version": 1}
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")  # may have more rows than the vocabulary
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts\.)(linear_fc\d\.weight)(\d+)")
_NOT_WEIGHTS = re.compile(r"(optimizer|rng|rerun_state_machine)\b|.*\b_extra_state\b")
# linears of which Megatron saves an (empty) `_extra_state` and misses it when loading
_HAS_EXTRA_STATE = re.compile(r".*\.linear_(qkv|proj|fc1|fc2|q_proj|q_up_proj|kv_up_proj)\.weight")


@dataclass(frozen=True)
class Param:
    """A parameter of one rank alone: what is stored, and read, in one piece."""

    places: tuple[Placement, ...]  # of the HF tensors it is made of
    key: str  # with the number of the layer
    layer: int | None
    expert: int | None
    num_layers: int
    num_experts: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(place.hf_name for place in self.places)

    @property
    def shape(self) -> Shape:
        return self.places[0].param_shape

    @property
    def fixed_dtype(self) -> torch.dtype | None:
        return self.places[0].dtype

    def at(self, stacked: bool) -> tuple[str, Shape, Shape]:
        """(key, position, extent) in the global tensor's leading dimensions; `stacked`: layers are one of them."""
        position, extent = (), ()
        key = self.key
        if stacked and self.layer is not None:
            key = key.replace(f"layers.{self.layer}.", "layers.", 1)
            position, extent = (self.layer,), (self.num_layers,)
        if self.expert is not None:
            position, extent = (*position, self.expert), (*extent, self.num_experts)
        return key, position, extent


def params_of(hf_config: Any) -> list[Param]:
    """Every parameter of a model with its keys in checkpoints, in the order of the family's table."""
    grouped: dict[str, list[Placement]] = {}
    for place in megatron_boxes(hf_config, ParallelLayout(), 0):
        grouped.setdefault(place.params[-1], []).append(place)  # checkpoints keep TransformerEngine's names
    parsed = [(_parse(name), tuple(places)) for name, places in grouped.items()]
    layers = 1 + max(layer for (_, layer, _), _ in parsed if layer is not None)
    experts = 1 + max((expert for (_, _, expert), _ in parsed if expert is not None), default=0)
    return [Param(places, key, layer, expert, layers, experts) for (key, layer, expert), places in parsed]


def _parse(name: str) -> tuple[str, int | None, int | None]:
    layer, expert = _LAYER.match(name), _EXPERT.fullmatch(name)
    key = f"{expert[1]}experts.{expert[2]}" if expert else name
    return key, int(layer[1]) if layer else None, int(expert[3]) if expert else None


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.target[tuple(slice(low, low + size) for low, size in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in its place already."""


class StoredParams:
    """The global tensors of a checkpoint folder.

    Raises:
        ValueError: the folder is not a readable torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, AssertionError) as error:
            raise ValueError(f"{str(folder / METADATA)!r} is no index of a torch_dist checkpoint: {error}") from error
        tensors = metadata.state_dict_metadata.items()
        self.tensors = {k: t for k, t in tensors if isinstance(t, TensorStorageMetadata) and not _NOT_WEIGHTS.match(k)}
        self._storage = metadata.storage_data
        self._sizes: dict[str, int] = {}
        self._by_position: dict[tuple[str, int], dict[Shape, list[ChunkStorageMetadata]]] = {}

    def locate(self, param: Param) -> tuple[str, Shape] | None:
        """(key, position in the leading dimensions) of a parameter; None where the checkpoint has none."""
        for stacked in (False, True):
            key, position, _ = param.at(stacked)
            if key in self.tensors:
                return key, position
        return None

    def problem(self, param: Param) -> str | None:
        """Why a parameter cannot be read, judged by the index and the sizes of the files."""
        found = self.locate(param)
        if found is None:
            return f"is missing: the checkpoint has no {param.key!r}"
        key, position = found
        size = tuple(self.tensors[key].size)
        extent = next(extent for name, _, extent in map(param.at, (False, True)) if name == key)
        rows = size[len(extent)] if len(size) > len(extent) and key in _PADDED else param.shape[0]
        if size != (*extent, rows, *param.shape[1:]) or rows < param.shape[0]:
            return f"has shape {size} as {key!r}, the model needs {(*extent, *param.shape)}"
        for chunk in self._chunks(key, len(position), position):
            stored = self._storage[MetadataIndex(key, chunk.offsets)]
            if self._file_size(stored.relative_path) < stored.offset + stored.length:
                return f"is cut off: {stored.relative_path!r} ends before {tuple(chunk.offsets)} of {key!r}"
        return None

    def dtype(self, param: Param) -> torch.dtype:
        key, _ = self.locate(param)
        return self.tensors[key].properties.dtype

    def read(self, param: Param) -> list[Shard]:
        """The HF tensors of a parameter, whole, as views of it.

        Raises:
            ValueError: a piece cannot be read or some are missing; names the tensors.
        """
        key, position = self.locate(param)
        tensor = torch.empty(param.shape, dtype=self.dtype(param))
        target = tensor.view(*(1 for _ in position), *param.shape)
        items = [
            _read_item(key, chunk, low, high, position)
            for chunk in self._chunks(key, len(position), position)
            for low, high in [_overlap(chunk, position, param.shape)]
            if all(a < b for a, b in zip(low, high))
        ]
        covered = sum(prod(item.lengths) for item in items)
        if covered != tensor.numel():
            raise ValueError(
                f"{', '.join(param.names)}: the pieces of {key!r} in {str(self.folder)!r} hold {covered} of "
                f"{tensor.numel()} elements"
            )
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, AssertionError) as error:
            raise ValueError(f"{', '.join(param.names)} cannot be read from {str(self.folder)!r}: {error}") from error
        return [place.bind(tensor) for place in param.places]

    def _chunks(self, key: str, leading: int, position: Shape) -> list[ChunkStorageMetadata]:
        """The pieces that hold something of a position; there may be very many of others."""
        table = self._by_position.get((key, leading))
        if table is None:
            table = self._by_position[key, leading] = defaultdict(list)
            for chunk in self.tensors[key].chunks:
                spans = zip(chunk.offsets[:leading], chunk.sizes[:leading])
                for place in product(*(range(low, low + size) for low, size in spans)):
                    table[place].append(chunk)
        return table[position]

    def _file_size(self, name: str) -> int:
        if name not in self._sizes:
            file = self.folder / name
            self._sizes[name] = file.stat().st_size if file.is_file() else 0
        return self._sizes[name]


def _overlap(chunk: ChunkStorageMetadata, position: Shape, shape: Shape) -> tuple[list[int], list[int]]:
    """Common box of a piece and the parameter at `position`, in coordinates of the global tensor."""
    start, end = (*position, *(0 for _ in shape)), (*(p + 1 for p in position), *shape)
    low = [max(a, b) for a, b in zip(start, chunk.offsets, strict=True)]
    high = [min(a, b + size) for a, b, size in zip(end, chunk.offsets, chunk.sizes, strict=True)]
    return low, high


def _read_item(key: str, chunk: ChunkStorageMetadata, low: Sequence[int], high: Sequence[int], at: Shape) -> ReadItem:
    start = (*at, *(0 for _ in low[len(at) :]))
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key),
        dest_offsets=torch.Size(a - b for a, b in zip(low, start)),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size(a - b for a, b in zip(low, chunk.offsets)),
        lengths=torch.Size(b - a for a, b in zip(low, high)),
    )


class ParamsWriter:
    """Writes the parameters of a model as the ranks of `layout` would; one file a rank that owns something.

    Args:
        folder: exists, empty.
    """

    def __init__(self, folder: Path, hf_config: Any, layout: ParallelLayout) -> None:
        self._folder = folder
        self._index = Metadata({}, storage_data={}, version="1.0.0")
        self._owned: defaultdict[str, list[Placement]] = defaultdict(list)
        for place in owned_boxes(hf_config, layout):
            self._owned[place.hf_name].append(place)
        # Megatron stacks the layers where all are alike, and takes those of models with experts to differ
        # (megatron/core/transformer/transformer_block.py:830).
        self._stacked = not any(row.experts for rows in family(hf_config).layers for row in rows)

    def write(self, param: Param, sources: Sequence[Shard], dtype: torch.dtype) -> None:
        """Cut one parameter. `sources`: its HF tensors, whole."""
        key, position, extent = param.at(self._stacked)
        held: dict[tuple[int, int, str], list[Placement]] = {}
        for place in (place for name in param.names for place in self._owned[name]):
            held.setdefault((place.rank, place.chunk, place.params[0]), []).append(place)
        for (rank, _, _), places in held.items():
            tensor = torch.zeros(places[0].param_shape, dtype=dtype)  # zeros pad a vocabulary
            plan(sources, [place.bind(tensor) for place in places]).execute_local()
            dim, length, ranges = places[0].spans
            whole = tuple(length if i == dim else n for i, n in enumerate(tensor.shape))
            entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size((*extent, *whole)), [])
            entry = self._index.state_dict_metadata.setdefault(key, entry)
            pieces = tensor.split([high - low for low, high in ranges], dim)
            for (low, _), piece in zip(ranges, pieces, strict=True):
                offsets = torch.Size((*position, *(low if i == dim else 0 for i in range(tensor.dim()))))
                sizes = torch.Size((*(1 for _ in position), *piece.shape))
                entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
                alone = piece if len(ranges) == 1 else piece.clone()  # a view would be saved with all of its storage
                self._append(rank, MetadataIndex(key, offsets), alone.view(sizes))
        if _HAS_EXTRA_STATE.fullmatch(param.key) and param.expert is None:
            layer, layers = (param.layer, param.num_layers) if self._stacked else (0, 1)
            name = f"{key.removesuffix('weight')}_extra_state/shard_{layer}_{layers}"
            self._index.state_dict_metadata[name] = BytesStorageMetadata()
            self._append(min(rank for rank, _, _ in held), MetadataIndex(name), [None])

    def _append(self, rank: int, index: MetadataIndex, value: Any) -> None:
        name = f"__{rank}_0.distcp"
        with (self._folder / name).open("ab") as file:  # not kept open: a layout may have more ranks than files may be
            offset = file.tell()
            torch.save(value, file)
            self._index.storage_data[index] = _StorageInfo(name, offset, file.tell() - offset)

    def finish(self) -> None:
        """Write the index and what Megatron looks for beside it."""
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_FORMAT))
        with (self._folder / METADATA).open("wb") as file:
            pickle.dump(self._index, file)
