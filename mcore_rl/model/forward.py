"""Run packed micro-batches through a Megatron model: hidden states -> log-probs -> loss, under any schedule.

Under context parallelism a rank passes its share of the tokens through the model. The numbers read off the hidden
states, a few a token, are then put together on all context ranks, so that each of them computes the whole loss: losses,
metrics and everything before and after them see whole micro-batches in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor
from torch.nn import Module

from mcore_rl.functional.logprob import token_logprobs
from mcore_rl.model.offload import HostMemory, in_use
from mcore_rl.parallel.context import context_ranks
from mcore_rl.parallel.groups import Groups
from mcore_rl.types import LossOutput, PackedBatch, PolicyOutput
from moe.record.megatron import Passage, Recorded, Routers


class Model(Protocol):
    """A Megatron model of this rank and what is read off its hidden states."""

    chunks: Sequence[Module]  # one a virtual pipeline stage, wrapped by DDP where it is trained
    groups: Groups
    routers: Routers | None  # where there are, a batch that holds expert_ids is routed by them
    host: HostMemory | None  # where the weights are while nothing runs; None: always on the device

    def read(self, chunk: Module, batch: PackedBatch, hidden: Tensor) -> PolicyOutput:
        """From the last chunk's hidden states, [T, 1, D] or under sequence parallelism this rank's [T/tp, 1, D].

        Under context parallelism `batch` has the targets and the mask of this rank's tokens, and T is their number.
        """


@dataclass(frozen=True)
class Policy:
    """Reads log-probs and entropies of the positions that carry a loss; 0 elsewhere.

    Attributes:
        vocab_size: of the HF model; the output matrix may be padded beyond it.
        temperature: of the sampling distribution; divides the logits here too.
        chunk_tokens: positions whose logits exist at once.
        fp32_head: multiply in fp32 by the output matrix, of which a copy is made for every micro-batch.
    """

    chunks: Sequence[Module]
    groups: Groups
    vocab_size: int
    temperature: float = 1.0
    chunk_tokens: int = 1024
    routers: Routers | None = None
    fp32_head: bool = False
    host: HostMemory | None = None

    def read(self, chunk: Module, batch: PackedBatch, hidden: Tensor) -> PolicyOutput:
        # both sum the gradients that the tensor ranks' vocabulary shares send back
        if get_model_config(chunk).sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        rows = batch.loss_mask.nonzero()[:, 0]
        weight = get_attr_wrapped_model(chunk, "output_weight")()
        if self.fp32_head:
            hidden, weight = hidden.float(), weight.float()
        logprobs, entropy = token_logprobs(
            hidden[:, 0].index_select(0, rows),
            weight,
            batch.targets[rows],
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            tp_group=self.groups.tp if self.groups.layout.tp > 1 else None,
        )
        empty = logprobs.new_zeros(batch.targets.numel())
        return PolicyOutput(empty.index_put((rows,), logprobs), empty.index_put((rows,), entropy))


@dataclass(frozen=True)
class Scorer:
    """Reads one number a position from a model with a score head: a critic's values, a reward model's scores.

    The value of position t is that of the state whose next token is `targets[t]`. `PolicyOutput.values` is [T] float32.
    """

    chunks: Sequence[Module]
    groups: Groups
    host: HostMemory | None = None
    routers: ClassVar[None] = None

    def read(self, chunk: Module, batch: PackedBatch, hidden: Tensor) -> PolicyOutput:
        if get_model_config(chunk).sequence_parallel:
            # every tensor rank computes all of the head: their equal gradients are not to be summed
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        values = get_attr_wrapped_model(chunk, "score")(hidden[:, 0])[:, 0]
        nothing = torch.zeros_like(values)
        return PolicyOutput(nothing, nothing, values)


def routers_of(chunks: Sequence[Module], groups: Groups) -> Routers:
    """Recorder and player of the routes of a model. Raises ValueError for one without MoE layers."""
    return Routers(chunks, get_model_config(chunks[0]), tp=groups.tp, cp=groups.cp, pp=groups.pp)


def forward_backward(
    model: Model, batches: Sequence[PackedBatch], loss: Callable[[PackedBatch, PolicyOutput], LossOutput]
) -> list[LossOutput]:
    """Accumulate the gradient of the sum of `loss` over all micro-batches and data-parallel ranks.

    Args:
        batches: this rank's micro-batches of one global mini-batch, as many as on every other rank.
        loss: already a share of the global mini-batch (see `LossOutput`).

    Returns:
        One detached LossOutput a micro-batch on the last pipeline stage, an empty list elsewhere.
    """
    # The schedule divides a loss by the number of micro-batches and multiplies it by cp; DDP divides by dp * cp.
    # Our losses are shares that add up, so both averages are undone here. Every context rank has the whole loss, but
    # its gradient through that rank's tokens alone: the sum over them is the gradient once.
    scale = len(batches) * model.groups.layout.dp

    def reduce(batch: PackedBatch, out: PolicyOutput):
        result = loss(batch, out)
        detached = LossOutput(result.loss.detach().clone(), result.metrics)
        return result.loss * scale, detached

    return _run(model, batches, reduce, forward_only=False)


@torch.no_grad()
def forward_only(model: Model, batches: Sequence[PackedBatch]) -> list[PolicyOutput]:
    """What the model says of every micro-batch on the last pipeline stage, an empty list elsewhere."""
    return _run(model, batches, _keep, forward_only=True)


@torch.no_grad()
def forward_recorded(
    model: Model, batches: Sequence[PackedBatch], *, statistics: bool = False
) -> tuple[list[PolicyOutput], list[Recorded]]:
    """`forward_only`, and what the routers did with every micro-batch, on every stage; see `Recorded`."""
    passages = [_passage(model, batch, statistics) for batch in batches]
    outputs = _run(model, batches, _keep, forward_only=True, passages=passages)
    return outputs, [model.routers.gather(p) for p in passages]


def _keep(batch: PackedBatch, out: PolicyOutput) -> tuple[Tensor, PolicyOutput]:
    return out.logprobs.new_zeros(()), out


def _passage(model: Model, batch: PackedBatch, statistics: bool = False) -> Passage:
    rows = _held_rows(model.groups, batch)
    if batch.expert_ids is not None:
        return model.routers.replay(batch.expert_ids, rows, statistics=statistics)
    total, device = batch.token_ids.numel(), batch.token_ids.device
    return model.routers.record(total, rows, statistics=statistics, observed=batch.observed_ids, device=device)


def _run(
    model: Model,
    batches: Sequence[PackedBatch],
    reduce: Callable,
    *,
    forward_only: bool,
    passages: Sequence[Passage | None] | None = None,
) -> list:
    for chunk in model.chunks:
        chunk.train(not forward_only)
    if passages is None:
        replayed = [model.routers is not None and batch.expert_ids is not None for batch in batches]
        passages = [_passage(model, batch) if replay else None for batch, replay in zip(batches, replayed)]
    iterators = [zip(batches, passages, strict=True) for _ in model.chunks]
    with model.groups.active(), in_use(model.host):
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, model, reduce),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(model.chunks) if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=len(batches),
            seq_length=max(b.token_ids.numel() for b in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _forward_step(
    model: Model, reduce: Callable, micro_batches: Iterator[tuple[PackedBatch, Passage | None]], chunk: Module
):
    batch, passage = next(micro_batches)
    longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if passage is not None:
        passage.put_on(packed)
    rows = _held_rows(model.groups, batch)
    held = batch if rows is None else _held(batch, rows)
    hidden = chunk(held.token_ids[None], held.positions[None], None, packed_seq_params=packed)
    return hidden, lambda out: reduce(batch, _whole(model.read(chunk, held, out), rows, batch, model.groups))


def _held_rows(groups: Groups, batch: PackedBatch) -> Tensor | None:
    """[T/cp], which tokens of the batch this context rank holds; None: all."""
    if groups.layout.cp == 1:
        return None
    return (context_ranks(batch.cu_seqlens, groups.layout.cp) == groups.coords.cp).nonzero()[:, 0]


def _held(batch: PackedBatch, rows: Tensor) -> PackedBatch:
    """What the model takes of the batch and `read` looks at, for some of its tokens."""
    names = ("token_ids", "positions", "targets", "loss_mask")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names})


def _whole(out: PolicyOutput, rows: Tensor | None, batch: PackedBatch, groups: Groups) -> PolicyOutput:
    """The same of all tokens of the batch, on every context rank; gradients go to the rank that holds a token."""
    if rows is None:
        return out
    held = torch.stack([x for x in (out.logprobs, out.entropy, out.values) if x is not None], dim=1)
    zeros = held.new_zeros(batch.token_ids.numel(), held.shape[1])
    return PolicyOutput(*reduce_from_tensor_model_parallel_region(zeros.index_put((rows,), held), groups.cp).unbind(1))
