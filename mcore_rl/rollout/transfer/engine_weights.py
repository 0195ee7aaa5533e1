"""A vLLM worker's weights in memory that others write, taken over without vLLM's loader, and read back.

What the trainer writes lies as in the worker's own parameters before vLLM has packed them. Taking it over is then a
copy into the parameters that vLLM keeps as they are, and vLLM's own packing of the others, straight from that memory.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from mcore_rl.rollout.transfer.layout import Area, Metadata, Piece, aligned
from mcore_rl.rollout.transfer.loader_trace import LoadedParameter, NotTraceable, trace_loader
from mcore_rl.weights.checksums import Checksum

METHODS = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod, UnquantizedEmbeddingMethod)
MAX_DIFF = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 4e-3}  # packed against plain, of the largest


@dataclass(frozen=True)
class Slot:
    """A parameter of the engine and where its new values lie in the area."""

    module: nn.Module
    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int  # bytes
    packed: bool  # vLLM keeps it in another form than it is loaded in
    pieces: tuple[int, ...]  # positions in the area

    def view(self, area: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return area[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class EngineWeights:
    """The parameters of one worker's model.

    Raises:
        NotTraceable: they cannot be taken over this way; the message says why.
    """

    def __init__(self, model: nn.Module, model_config: Any, metadata: Metadata) -> None:
        if not current_platform.is_cpu():
            raise NotTraceable("tried on CPUs only")
        self.model, self.model_config = model, model_config
        self._shapes = {name: list(shape) for name, _, shape in metadata}
        self.slots: list[Slot] = []
        pieces: list[Piece] = []
        offset = 0
        for loaded in trace_loader(model, metadata):
            slot, of_slot = self._slot(loaded, offset, len(pieces))
            self.slots.append(slot)
            pieces += of_slot
            offset += aligned(loaded.shape.numel() * slot.dtype.itemsize)
        owners = [_live(slot).data_ptr() for slot in self.slots if not slot.packed]
        if len(set(owners)) < len(owners):
            raise NotTraceable("two parameters share their memory")
        self.area = Area(offset, pieces)
        self._kept: dict[int, tuple[int, list[Checksum]]] = {}  # by a slot's offset: where it is, of its pieces

    def _slot(self, loaded: LoadedParameter, offset: int, first: int) -> tuple[Slot, list[Piece]]:
        module = self.model.get_submodule(loaded.module)
        method = getattr(module, "quant_method", None)
        if method is not None and not isinstance(method, METHODS):
            raise NotTraceable(f"{loaded.module} is of {type(method).__name__}")
        live = getattr(module, loaded.name)
        packed = isinstance(method, UnquantizedFusedMoEMethod) or live.shape != loaded.shape
        dtype = loaded.dtype if packed else live.dtype
        pieces = [
            Piece(
                part.name,
                self._shapes[part.name],
                part.box,
                str(dtype).removeprefix("torch."),
                offset + part.offset * dtype.itemsize,
                part.stride,
            )
            for part in loaded.parts
        ]
        positions = tuple(range(first, first + len(pieces)))
        return Slot(module, loaded.name, loaded.shape, dtype, offset, packed, positions), pieces

    @torch.no_grad()
    def take_over(self, area: Tensor) -> float:
        """Make what `area` holds the engine's weights; returns the seconds that vLLM's packing took of it."""
        for slot in self.slots:
            if slot.packed:
                setattr(slot.module, slot.name, nn.Parameter(slot.view(area), requires_grad=False))
            else:
                _live(slot).copy_(slot.view(area))
        start = time.perf_counter()
        for module in dict.fromkeys(slot.module for slot in self.slots):
            if isinstance(getattr(module, "quant_method", None), METHODS):
                module.quant_method.process_weights_after_loading(module)
        packing = time.perf_counter() - start
        for slot in self.slots:
            if slot.packed and _live(slot).data_ptr() == slot.view(area).data_ptr():  # packing left it where it was
                setattr(slot.module, slot.name, nn.Parameter(_live(slot).clone(), requires_grad=False))
        for module in self.model.modules():
            if is_deferred_attention_layer(module):
                module.process_weights_after_loading(self.model_config.dtype)
        return packing

    @torch.no_grad()
    def engine_problems(self, area: Tensor, expected: Sequence[int], part: int = 0, parts: int = 1) -> list[str]:
        """Tensors that the engine computes with in other values than `area` has; by name.

        What is kept as loaded is read back, bit by bit. What is packed answers to a probe vector: the result of its
        kernel must be that of the plain weights. That takes the longest, so it can be dealt over `parts` calls.

        Args:
            part: one more at every call; any `parts` calls in a row together probe every packed matrix and expert.
        """
        wrong: dict[str, str] = {}
        for slot in self.slots:
            if not slot.packed:
                wrong |= dict.fromkeys(self._changed(slot, expected), "has other bits in the engine than were sent")
        probed: defaultdict[nn.Module, list[Slot]] = defaultdict(list)
        for slot in self.slots:
            if slot.packed or isinstance(slot.module, ParallelLMHead):
                probed[slot.module].append(slot)
        for number, (module, slots) in enumerate(probed.items()):
            first = (part - number) % parts
            if isinstance(module.quant_method, UnquantizedFusedMoEMethod):
                names = _wrong_experts(module, slots, area, self.area.pieces, slice(first, None, parts))
            else:
                names = [] if first else _wrong_rows(module, slots, area, self.area.pieces)
            wrong |= dict.fromkeys(names, "is packed wrongly in the engine")
        return [f"{name} {problem}" for name, problem in wrong.items()]

    def _changed(self, slot: Slot, expected: Sequence[int]) -> Iterator[str]:
        live = _live(slot).detach()
        pointer, checksums = self._kept.get(slot.offset, (0, []))
        if pointer != live.data_ptr():
            checksums = [self._checksum(self.area.pieces[position], slot, live) for position in slot.pieces]
            self._kept[slot.offset] = (live.data_ptr(), checksums)
        for position, checksum in zip(slot.pieces, checksums, strict=True):
            if live.dtype != slot.dtype or checksum() != expected[position]:
                yield self.area.pieces[position].name

    @staticmethod
    def _checksum(piece: Piece, slot: Slot, live: Tensor) -> Checksum:
        size = [high - low for low, high in piece.box]
        start = (piece.offset - slot.offset) // slot.dtype.itemsize
        region = piece.region()
        part = live.as_strided(size, piece.stride, live.storage_offset() + start)
        return Checksum(part, region.box, region.factors)


class Arrivals:
    """What has arrived in the memory of an area."""

    def __init__(self, area: Area, memory: Tensor) -> None:
        self._shards = [piece.shard(memory) for piece in area.pieces]
        self._checksums = [Checksum(shard.view, shard.box, shard.factors) for shard in self._shards]

    def problems(self, expected: Sequence[int]) -> list[str]:
        """Tensors that are not finite or have other checksums than the trainer's, by name."""
        found: dict[str, str] = {}
        for shard, checksum, number in zip(self._shards, self._checksums, expected, strict=True):
            if checksum() != number:
                found[shard.hf_name] = "arrived with other bits than the trainer has"
            elif not _finite(shard.view):
                found[shard.hf_name] = "has values that are not finite"
        return [f"{name} {problem}" for name, problem in found.items()]


def _finite(values: Tensor) -> bool:
    """A sum is the fastest way to find NaN and infinity; finite values may add up to infinity too."""
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


def _live(slot: Slot) -> Tensor:
    return getattr(slot.module, slot.name)


def _wrong_rows(module: nn.Module, slots: list[Slot], area: Tensor, pieces: Sequence[Piece]) -> list[str]:
    (slot,) = [slot for slot in slots if slot.name == "weight"]
    plain = slot.view(area)
    x = _probe(1, plain.shape[1], plain.dtype)
    wrong = _far(module.quant_method.apply(module, x)[0], torch.nn.functional.linear(x, plain)[0])
    return [pieces[i].name for i in slot.pieces if _rows(pieces[i], slot, wrong).any()]


def _rows(piece: Piece, slot: Slot, values: Tensor) -> Tensor:
    first = (piece.offset - slot.offset) // slot.dtype.itemsize // slot.shape[1]
    return values[first : first + piece.box[0][1] - piece.box[0][0]]


def _wrong_experts(
    module: nn.Module, slots: list[Slot], area: Tensor, pieces: Sequence[Piece], chosen: slice
) -> list[str]:
    """One token to each of the chosen experts."""
    if module.activation != MoEActivation.SILU or module.apply_router_weight_on_input:
        return []
    plain = {slot.name: slot.view(area) for slot in slots}
    w13, w2 = plain["w13_weight"][chosen], plain["w2_weight"][chosen]
    if not len(w13):
        return []
    # no slice of all ids: the kernel takes them to be contiguous, without a look
    ids = torch.arange(*chosen.indices(len(plain["w13_weight"])), dtype=torch.int32)
    x = _probe(len(ids), w13.shape[-1], w13.dtype)
    packed = module.quant_method.apply(module, x, torch.ones(len(ids), 1), ids[:, None], None, None)
    gate, up = torch.bmm(w13, x[:, :, None])[..., 0].chunk(2, dim=-1)
    far = _far(packed, torch.bmm(w2, (torch.nn.functional.silu(gate) * up)[:, :, None])[..., 0]).any(-1)
    wrong, found = set(ids[far].tolist()), []
    if not wrong:
        return []
    for slot in slots:
        numel = slot.shape[1:].numel() * slot.dtype.itemsize
        found += [pieces[i].name for i in slot.pieces if (pieces[i].offset - slot.offset) // numel in wrong]
    return found


def _probe(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def _far(a: Tensor, b: Tensor) -> Tensor:
    """Where two results differ by more than another order of additions explains; NaN differs from everything."""
    scale = b.float().abs().amax(-1, keepdim=True)
    return ~((a.float() - b.float()).abs() <= MAX_DIFF[b.dtype] * scale)
