"""Run packed micro-batches through a Megatron model: hidden states -> log-probs -> loss, under any schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor
from torch.nn import Module

from mcore_rl.functional.logprob import token_logprobs
from mcore_rl.parallel.groups import Groups
from mcore_rl.types import LossOutput, PackedBatch, PolicyOutput


@dataclass(frozen=True)
class Policy:
    """A Megatron model of this rank with what is needed to read log-probs from it.

    Attributes:
        chunks: one module a virtual pipeline stage, wrapped by DDP where it is trained.
        groups: process groups and layout.
        vocab_size: of the HF model; the output matrix may be padded beyond it.
        temperature: of the sampling distribution; divides the logits here too.
        chunk_tokens: positions whose logits exist at once.
    """

    chunks: Sequence[Module]
    groups: Groups
    vocab_size: int
    temperature: float = 1.0
    chunk_tokens: int = 1024


def forward_backward(
    policy: Policy, batches: Sequence[PackedBatch], loss: Callable[[PackedBatch, PolicyOutput], LossOutput]
) -> list[LossOutput]:
    """Accumulate the gradient of the sum of `loss` over all micro-batches and data-parallel ranks.

    Args:
        batches: this rank's micro-batches of one global mini-batch, as many as on every other rank.
        loss: already a share of the global mini-batch (see `LossOutput`).

    Returns:
        One detached LossOutput a micro-batch on the last pipeline stage, an empty list elsewhere.
    """
    # The schedule divides a loss by the number of micro-batches and multiplies it by cp; DDP divides by dp * cp.
    # Our losses are shares that add up, so both averages are undone here.
    scale = len(batches) * policy.groups.layout.dp

    def reduce(batch: PackedBatch, out: PolicyOutput):
        result = loss(batch, out)
        detached = LossOutput(result.loss.detach().clone(), result.metrics)
        return result.loss * scale, detached

    return _run(policy, batches, reduce, forward_only=False)


@torch.no_grad()
def forward_only(policy: Policy, batches: Sequence[PackedBatch]) -> list[PolicyOutput]:
    """Log-probs and entropies of every micro-batch on the last pipeline stage, an empty list elsewhere."""
    return _run(policy, batches, lambda batch, out: (out.logprobs.new_zeros(()), out), forward_only=True)


def _run(policy: Policy, batches: Sequence[PackedBatch], reduce: Callable, *, forward_only: bool) -> list:
    for chunk in policy.chunks:
        chunk.train(not forward_only)
    iterators = [iter(batches) for _ in policy.chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, policy, reduce),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(policy.chunks) if len(policy.chunks) > 1 else policy.chunks[0],
        num_microbatches=len(batches),
        seq_length=max(b.token_ids.numel() for b in batches),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_step(policy: Policy, reduce: Callable, batches: Iterator[PackedBatch], chunk: Module):
    batch = next(batches)
    longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    hidden = chunk(batch.token_ids[None], batch.positions[None], None, packed_seq_params=packed)
    return hidden, lambda out: reduce(batch, _policy_output(policy, chunk, batch, out))


def _policy_output(policy: Policy, chunk: Module, batch: PackedBatch, hidden: Tensor) -> PolicyOutput:
    """Log-probs of the positions that carry a loss; 0 everywhere else."""
    # both sum the gradients that the tensor ranks' vocabulary shares send back
    if get_model_config(chunk).sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    rows = batch.loss_mask.nonzero()[:, 0]
    logprobs, entropy = token_logprobs(
        hidden[:, 0].index_select(0, rows),
        get_attr_wrapped_model(chunk, "output_weight")(),
        batch.targets[rows],
        vocab_size=policy.vocab_size,
        temperature=policy.temperature,
        chunk_tokens=policy.chunk_tokens,
        tp_group=policy.groups.tp if policy.groups.layout.tp > 1 else None,
    )
    empty = logprobs.new_zeros(batch.targets.numel())
    return PolicyOutput(empty.index_put((rows,), logprobs), empty.index_put((rows,), entropy))
