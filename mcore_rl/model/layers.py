"""Layer submodules that need neither TransformerEngine nor apex: norm, core attention, grouped expert linears.

They run on CPU and GPU, and carry the parameter names of their TransformerEngine counterparts, so that checkpoints and
weight tables are the same for both.

Letters for shapes: s sequence, b batch, t packed tokens, h query heads, g key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor

from mcore_rl.parallel.context import context_ranks

LENGTH_STEP = 8  # tokens


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose weight gradient Megatron sums over tensor ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


@dataclass(frozen=True)
class SegmentBatches:
    """Packed segments laid out as a few dense batches, one a length rounded up to LENGTH_STEP: many short segments then
    cost a few kernels. Padding follows its segment, where causal attention hides it: the result is exact.

    Example: with LENGTH_STEP=2, segments of 2, 3, 2 tokens give shapes ((2, 2), (1, 4)), take [0 1 5 6 2 3 4 4] and
    place [0 1 4 5 6 2 3].
    """

    shapes: tuple[tuple[int, int], ...]  # (segments, rounded length) of every batch
    take: Tensor | None  # the packed token at each place of the batches; None where the layout is the packed one
    place: Tensor | None  # [t], the place of each packed token

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> SegmentBatches:
        """cu_seqlens [S+1]: bounds of the segments; empty ones are skipped."""
        bounds = cu_seqlens.tolist()
        batches: dict[int, list[tuple[int, int]]] = {}
        for low, high in zip(bounds[:-1], bounds[1:], strict=True):
            if high > low:
                batches.setdefault(-(-(high - low) // LENGTH_STEP), []).append((low, high))
        if len({high - low for of_length in batches.values() for low, high in of_length}) == 1:
            ((low, high), *_), *_ = batches.values()
            return cls(((bounds[-1] // (high - low), high - low),), None, None)
        shapes = tuple((len(of_length), steps * LENGTH_STEP) for steps, of_length in batches.items())
        take, place, start = [], torch.empty(bounds[-1], dtype=torch.int64), 0
        for (_, length), of_length in zip(shapes, batches.values(), strict=True):
            for low, high in of_length:
                take.append(torch.arange(low, low + length).clamp_(max=high - 1))
                place[low:high] = torch.arange(start, start + high - low)
                start += length
        return cls(shapes, torch.cat(take).to(cu_seqlens.device), place.to(cu_seqlens.device))


@dataclass(frozen=True)
class ContextBatches:
    """Packed segments under context parallelism, laid out as one dense batch a length: a rank's queries of a segment
    against all keys of it. Keys and values come from all ranks, one rank after the other.

    `counts` segments have the length of each mask [queries, keys], which says what a query may see.
    """

    counts: tuple[int, ...]
    masks: tuple[Tensor, ...]
    take_query: Tensor  # [t] held tokens in the order of the batches
    take_key: Tensor  # [T] gathered tokens in the order of the batches
    place: Tensor  # [t] the place in the batches of each held token

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, cp: int, rank: int) -> ContextBatches:
        """cu_seqlens [S+1]: bounds of the segments over all ranks; empty ones are skipped."""
        owner, lengths = context_ranks(cu_seqlens, cp), cu_seqlens.diff().long()
        gathered = owner.argsort(stable=True).argsort()  # the place of each token where the ranks' shares are joined
        order = lengths.repeat_interleave(lengths).argsort(stable=True)
        take_query = gathered[order[owner[order] == rank]] - rank * (len(owner) // cp)
        masks, counts = [], []
        for length, count in zip(*lengths[lengths > 0].unique(return_counts=True)):
            keys = torch.arange(int(length), device=owner.device)
            queries = keys[context_ranks(torch.stack([length * 0, length]), cp) == rank]
            masks.append(queries[:, None] >= keys)
            counts.append(int(count))
        return cls(tuple(counts), tuple(masks), take_query, gathered[order], take_query.argsort())


class SdpaAttention(MegatronModule):
    """Core attention on torch's scaled_dot_product_attention: causal, dense [s, b] batches or packed segments.

    Under context parallelism each rank holds two chunks of every packed sequence (`parallel.context`), gathers all keys
    and values and masks; the memory of a sequence grows with s^2 / cp.

    Raises:
        ValueError: an attention mask or bias, or dense batches under context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,  # given by multi-latent attention; the tensors say the same
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0 and not attention_dropout, "SdpaAttention has no dropout"
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h*d]; packed: [t, h, d], [t, g, d] -> [t, h*d]."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "SdpaAttention is causal only; pass attention_mask=None, and padded batches as packed ones"
            )
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp_group is not None:
            raise ValueError("under context parallelism SdpaAttention takes packed sequences; pass packed_seq_params")
        return self._dense(query, key, value)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
        out = F.scaled_dot_product_attention(
            *heads_first,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        if self.cp_group is not None:
            return self._context_parallel(query, key, value, params)
        batches = getattr(params, "segment_batches", None)
        if batches is None:
            # Kept on the micro-batch's own object: all layers and the recomputation see the same segments.
            batches = params.segment_batches = SegmentBatches.from_cu_seqlens(params.cu_seqlens_q)
        if batches.take is not None:
            query, key, value = (_rows(x, batches.take) for x in (query, key, value))
        sizes = [count * length for count, length in batches.shapes]
        outs = []
        for shape, *qkv in zip(batches.shapes, *(x.split(sizes) for x in (query, key, value)), strict=True):
            # [count*length, h, d] -> [length, count, h, d]
            out = self._dense(*(x.unflatten(0, shape).transpose(0, 1) for x in qkv))
            outs.append(out.transpose(0, 1).flatten(0, 1))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if batches.place is None else out.index_select(0, batches.place)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        batches = getattr(params, "context_batches", None)
        if batches is None:
            batches = params.context_batches = ContextBatches.from_cu_seqlens(
                params.cu_seqlens_q, self.cp_group.size(), self.cp_group.rank()
            )
        key, value = (
            _rows(gather_from_sequence_parallel_region(x, group=self.cp_group), batches.take_key) for x in (key, value)
        )
        query = _rows(query, batches.take_query)
        held = [count * len(mask) for count, mask in zip(batches.counts, batches.masks)]
        read = [count * mask.shape[1] for count, mask in zip(batches.counts, batches.masks)]
        outs = []
        for count, mask, *qkv in zip(
            batches.counts, batches.masks, query.split(held), key.split(read), value.split(read), strict=True
        ):
            out = self._dense(*(x.unflatten(0, (count, -1)).transpose(0, 1) for x in qkv), mask=mask)
            outs.append(out.transpose(0, 1).flatten(0, 1))
        return torch.cat(outs).index_select(0, batches.place)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] of [t, heads, d]; with flat rows, forward and backward are several times faster on a CPU."""
    return x.flatten(1).index_select(0, index).unflatten(1, x.shape[1:])


class GroupedProduct(torch.autograd.Function):
    """All experts' products in one kernel. Their weights are put side by side for it, again in the backward pass: kept
    that way they would be held twice.

    x [t, in], its rows sorted by expert; ends [E] int32, the row behind each expert's last; E weights [out, in]
    -> [t, out]. An expert without rows gets a zero gradient, which the gradient buckets wait for.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, ends, *weights)
        return F.grouped_mm(x, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = F.grouped_mm(grad, torch.stack(weights), offs=ends)
        return grad_x, None, *F.grouped_mm(grad.t(), x, offs=ends).unbind()


class _GroupedLinear(MegatronModule):
    """One weight an expert, `weight0` .. `weight{N-1}`, as TransformerEngine's GroupedLinear: Megatron's TEGroupedMLP,
    which is plain Python itself, works with either. Weights are left as allocated: they come from files."""

    partition_dim: ClassVar[int]  # of the weight [out, in], over expert-tensor ranks

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        assert is_expert and not bias, "grouped linears are for experts without bias"
        self.num_gemms, self.groups = num_gemms, pg_collection
        shape = [output_size, input_size]
        shape[self.partition_dim] = divide(shape[self.partition_dim], pg_collection.expt_tp.size())
        stride = 2 if self.partition_dim == 0 and config.gated_linear_unit else 1  # gate and up are cut separately
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=self.partition_dim, stride=stride)
            # Also with one expert rank: Megatron then builds the same pair of optimizers (dense, expert) for every
            # layout, and a checkpoint can be loaded under another one.
            weight.allreduce = False
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, None]:
        """x [t, in], its rows sorted by expert, m_splits rows each -> ([t, out], no bias)."""
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        ends = torch.tensor(m_splits).cumsum(0).to(x.device, torch.int32)
        return GroupedProduct.apply(x, ends, *weights), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The keys that TEGroupedLinear and SequentialMLP write, experts as an axis of their own."""
        assert metadata and "dp_cp_group" in metadata, "TEGroupedMLP passes the groups in metadata"
        ep, etp = self.groups.ep, self.groups.expt_tp
        shards: ShardedStateDict = {}
        for i in range(self.num_gemms):
            expert = ep.rank() * self.num_gemms + i
            if metadata.get("singleton_local_shards", False):
                offsets, key_prefix = sharded_offsets, f"{expert}.{prefix}"
            else:
                axis = (len(sharded_offsets), expert, ep.size() * self.num_gemms)
                offsets, key_prefix = (*sharded_offsets, axis), prefix
            shard = make_sharded_tensors_for_checkpoint(
                {f"{i}.weight": getattr(self, f"weight{i}")},
                "",
                {f"{i}.weight": self.partition_dim},
                offsets,
                tp_group=etp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(shard, f"{i}.", key_prefix)
            tensor = shard[f"{i}.weight"]
            tensor.replica_id = (*tensor.replica_id[:2], self.groups.expt_dp.rank())
            shards[f"{prefix}weight{i}"] = tensor
        return shards


class GroupedColumnLinear(_GroupedLinear):
    """Experts' first linear: output features split over expert-tensor ranks."""

    partition_dim = 0


class GroupedRowLinear(_GroupedLinear):
    """Experts' second linear: input features split over expert-tensor ranks."""

    partition_dim = 1
