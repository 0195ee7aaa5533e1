"""The trainer's weights: written by every rank where another process wants them, or gathered as full HF tensors.

What goes where is planned once; a step only copies. The views into the parameters are taken again when Megatron has
moved them (wrapping in DistributedDataParallel, loading into new storage).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.weights.checksums import Checksum, signed
from mcore_rl.weights.cuts import Box, Factors
from mcore_rl.weights.hf_write import save_hf
from mcore_rl.weights.plan import BUCKET_BYTES, Copy, buckets, parts, plan, refactor
from mcore_rl.weights.shards import Region, Shard, hf_regions, megatron_shards, owned_boxes


class WeightExporter:
    """Full HF tensors of a model that is spread over ranks. Built and used on every rank.

    Args:
        chunks: this rank's model chunks, bare or wrapped.
        dtype: of what is exported; None: of the parameters.
        bucket_bytes: tensors of about this size in all are sent together; rank 0 holds one bucket at a time.

    Raises:
        ValueError: the model and its weight table do not match, or the layout leaves a tensor uncovered; names it.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        hf_config: Any,
        groups: Groups,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.hf_config, self.groups = hf_config, groups
        self._chunks = list(chunks)
        self._params = [p for chunk in chunks for p in chunk.parameters()]
        self.dtype = dtype or self._params[0].dtype
        self._owned = owned_boxes(hf_config, groups.layout)
        regions = sorted(hf_regions(hf_config), key=lambda r: r.dtype not in (None, self.dtype))  # by dtype, else kept
        self._regions = {r.hf_name: r for r in regions}
        copies = plan(self._owned, list(self._regions.values()), self.dtype.itemsize).copies
        self._buckets = buckets(copies, bucket_bytes // self.dtype.itemsize)
        self._refresh()

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name on disk, dtype, shape) of the whole model, in the order of iteration; the same on every rank."""
        return [(name, region.dtype or self.dtype, region.shape) for name, region in self._regions.items()]

    def write_into(self, targets: Sequence[Shard]) -> list[int]:
        """Copy what this rank owns into boxes of HF tensors; after all ranks have done so each is full. Collective.

        Args:
            targets: of plain factors and any dtype, for instance of memory that every rank has mapped. Give the same
                sequence every time: what goes where is planned for the first.

        Returns:
            `checksums` of them: of the parameters, which are not taken from what was written.

        Raises:
            ValueError: a tensor of `targets` is not the model's or has another shape; names it.
        """
        return self._checksums(targets, write=True)

    def checksums(self, targets: Sequence[Region]) -> list[int]:
        """Of every one of `targets`, what `checksum` gives where it holds the present weights; collective.

        Args:
            targets: as of `write_into`, their memory is not touched; `dtype` is that of their elements.
        """
        return self._checksums(targets, write=False)

    @torch.no_grad()
    def _checksums(self, targets: Sequence[Region], write: bool) -> list[int]:
        self._refresh()
        sums = [0] * len(targets)
        for route in self._routed(targets):
            values, checksum = route.source, route.checksum
            if checksum is None:
                values = values.to(route.dtype)
                checksum = Checksum(values, *route.where)
            if write:
                route.target.copy_(values)
            sums[route.index] += checksum()  # at once, while the values are in the processor's cache
        if self.groups.world_size == 1:
            return [signed(number) for number in sums]
        of_all = torch.tensor([signed(number) for number in sums], device=self.groups.device)
        dist.all_reduce(of_all)
        return of_all.tolist()

    def _routed(self, targets: Sequence[Region]) -> list[_Route]:
        """What this rank has of `targets`."""
        if self._targets is not targets:
            parts = []
            for index, target in enumerate(targets):
                known = self._regions.get(target.hf_name)
                if known is None or known.shape != target.shape:
                    has = f"has shape {known.shape}" if known else "has none of that name"
                    raise ValueError(f"{target.hf_name!r} of shape {target.shape} is asked for, the model {has}")
                parts += [(part, index) for part in refactor(target, known.factors)]
            index_of = {id(part): index for part, index in parts}
            copies = plan(self._owned, [part for part, _ in parts], self.dtype.itemsize).copies
            mine = [copy for copy in copies if copy.src.rank == self.groups.rank]
            self._routes = [self._route(copy, index_of[id(copy.dst)], targets) for copy in mine]
            self._targets = targets
        return self._routes

    def _route(self, copy: Copy, index: int, targets: Sequence[Region]) -> _Route:
        source, dtype = self._source(copy)[copy.src_index], targets[index].dtype
        target = copy.dst.view[copy.dst_index] if isinstance(copy.dst, Shard) else None
        where = (copy.box, copy.src.factors)
        return _Route(index, source, target, dtype, where, Checksum(source, *where) if source.dtype == dtype else None)

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """(name, full tensor) on rank 0, (name, None) elsewhere, in `metadata` order; all ranks must finish it.

        A tensor that rank 0 holds whole is a view of the live parameter: use it before the next optimizer step.
        """
        self._refresh()
        for bucket in self._buckets:
            yield from self._gather(bucket) if self.groups.rank == 0 else self._send(bucket)

    @torch.no_grad()
    def _send(self, bucket: dict[str, list[Copy]]) -> Iterator[tuple[str, None]]:
        mine = [c for copies in bucket.values() for c in copies if c.src.rank == self.groups.rank]
        if mine:
            message = self._message(mine)
            for part, copy in zip(parts(message, mine), mine, strict=True):
                part.copy_(self._source(copy))
            dist.send(message, 0)
        for name in bucket:
            yield name, None

    @torch.no_grad()
    def _gather(self, bucket: dict[str, list[Copy]]) -> Iterator[tuple[str, Tensor]]:
        by_rank: defaultdict[int, list[Copy]] = defaultdict(list)
        for copies in bucket.values():
            for copy in copies:
                by_rank[copy.src.rank].append(copy)
        pieces = {id(copy): self._source(copy) for copy in by_rank.pop(0, [])}
        messages = {rank: self._message(copies) for rank, copies in sorted(by_rank.items())}
        for request in [dist.irecv(message, rank) for rank, message in messages.items()]:
            request.wait()
        for rank, message in messages.items():
            pieces |= {id(c): part for c, part in zip(by_rank[rank], parts(message, by_rank[rank]), strict=True)}
        for name, copies in bucket.items():
            yield name, self._assemble(name, [(copy, pieces[id(copy)]) for copy in copies])

    def _assemble(self, name: str, pieces: list[tuple[Copy, Tensor]]) -> Tensor:
        region = self._regions[name]
        (_, first), *others = pieces
        if not others and first.is_contiguous():
            return first.view(region.shape).to(region.dtype or self.dtype)
        full = self._message([copy for copy, _ in pieces]).view(region.factored_shape)
        for copy, piece in pieces:
            full[copy.dst_index].copy_(piece)
        return full.view(region.shape)

    def _source(self, copy: Copy) -> Tensor:
        return self._shards[copy.src.hf_name, copy.src.box].view

    def _message(self, copies: Sequence[Copy]) -> Tensor:
        dtype = copies[0].dst.dtype or self.dtype
        return torch.empty(sum(copy.numel for copy in copies), dtype=dtype, device=self.groups.device)

    def _refresh(self) -> None:
        """Take the views again if any parameter has moved."""
        pointers = [p.data_ptr() for p in self._params]
        if pointers == getattr(self, "_pointers", None):
            return
        shards = megatron_shards(self._chunks, self.hf_config, self.groups)
        self._shards: dict[Any, Shard] = {}
        for shard in sorted(shards, key=lambda s: s.replica):  # a tied copy must not stand in for its owner
            self._shards.setdefault((shard.hf_name, shard.box), shard)
        self._pointers, self._targets = pointers, None


@dataclass(frozen=True, slots=True)
class _Route:
    """One copy from this rank, with its views."""

    index: int  # position of its target
    source: Tensor
    target: Tensor | None
    dtype: torch.dtype  # of the target
    where: tuple[Box, Factors]
    checksum: Checksum | None  # of the source; None where that has another dtype


def export_hf(
    exporter: WeightExporter, out_dir: str | Path, source_dir: str | Path, dtype: torch.dtype | None = None
) -> Path:
    """Write the model as an HF folder from rank 0; collective. `dtype` None: the exporter's.

    Raises:
        ValueError: as `save_hf`, on rank 0.
        RunFailure: on the other ranks.
    """
    tensors = iter(exporter)
    if exporter.groups.rank != 0:
        for _ in tensors:
            pass

    def write() -> Path:
        try:
            return save_hf(out_dir, exporter.hf_config, source_dir, tensors, dtype)
        finally:
            for _ in tensors:  # after a failure the other ranks are still sending
                pass

    return on_rank_0(exporter.groups, write)
