"""The weights of one live model into another of the same architecture, in any two layouts of the same ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mcore_rl.parallel.groups import Groups
from mcore_rl.weights.cuts import Box
from mcore_rl.weights.plan import BUCKET_BYTES, Copy, buckets, parts, plan_between
from mcore_rl.weights.shards import Region, megatron_shards


class Live(Protocol):
    """A model in one layout."""

    chunks: Sequence[nn.Module]  # bare or wrapped
    groups: Groups


@torch.no_grad()
def reshard(hf_config: Any, source: Live, target: Live, bucket_bytes: int = BUCKET_BYTES) -> int:
    """Write the weights of `source` into `target`; collective over all ranks.

    Each rank sends boxes of its parameters straight to the ranks that hold them in the other layout. Its memory for
    that is about one bucket of `bucket_bytes`, and the dtypes may differ.

    Returns:
        Bytes that this rank received from others.

    Raises:
        ValueError: a model and its weight table do not match; names the tensor.
    """
    dtype = next(source.chunks[0].parameters()).dtype
    layouts = source.groups.layout, target.groups.layout
    plan = plan_between(hf_config, *layouts, dtype.itemsize, same_ranks=True)
    sources, targets = (_views(model, hf_config) for model in (source, target))
    rank, device, received = target.groups.rank, target.groups.device, 0
    for bucket in buckets(plan.copies, bucket_bytes // dtype.itemsize):
        by_pair: defaultdict[tuple[int, int], list[Copy]] = defaultdict(list)
        for copy in (copy for copies in bucket.values() for copy in copies):
            by_pair[copy.src.rank, copy.dst.rank].append(copy)
        mine = {pair: copies for pair, copies in by_pair.items() if rank in pair}
        messages, transfers = {}, []
        for (sender, receiver), copies in mine.items():
            if sender == receiver:
                for copy in copies:
                    _part(targets, copy.dst, copy.dst_index).copy_(_part(sources, copy.src, copy.src_index))
                continue
            size = sum(copy.numel for copy in copies)
            message = torch.empty(size, dtype=copies[0].src.dtype or dtype, device=device)
            if rank == sender:
                for part, copy in zip(parts(message, copies), copies, strict=True):
                    part.copy_(_part(sources, copy.src, copy.src_index))
                transfers.append(dist.P2POp(dist.isend, message, receiver))
            else:
                messages[sender, receiver] = message
                transfers.append(dist.P2POp(dist.irecv, message, sender))
                received += message.nbytes
        for request in dist.batch_isend_irecv(transfers) if transfers else ():
            request.wait()
        for pair, message in messages.items():
            for part, copy in zip(parts(message, mine[pair]), mine[pair], strict=True):
                _part(targets, copy.dst, copy.dst_index).copy_(part)
    return received


def _views(model: Live, hf_config: Any) -> dict[tuple[str, Box], Tensor]:
    """Of this rank's parameters."""
    shards = megatron_shards(model.chunks, hf_config, model.groups)
    return {(shard.hf_name, shard.box): shard.view for shard in shards}


def _part(views: Mapping[tuple[str, Box], Tensor], region: Region, index: tuple[slice, ...]) -> Tensor:
    return views[region.hf_name, region.box][index]
