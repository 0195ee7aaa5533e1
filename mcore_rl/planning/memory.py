"""Bytes that a rank holds. Weights, gradients and optimizer are exact; activations are counted by a formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.parameters import buffer_numel, held_parameters
from mcore_rl.weights.shards import pipeline_layers

GIB = 2**30
_FP32 = 4
_BACKWARD = 1.3  # of what a layer keeps: with the gradients of its own backward pass (tools/bench/plan_memory.py)
_LOGIT_COPIES = 2  # fp32 copies of a chunk's logits at the peak of functional/logprob.py's backward pass


@dataclass(frozen=True)
class ModelState:
    """What one model occupies on one rank from its loading to the end of the run, in bytes.

    `optimizer` are Adam's two moments, in bf16 also the fp32 main weights; all zero for a frozen model. Adam's step
    counters, 4 bytes a tensor, are left out.
    """

    parameters: int  # elements
    weights: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer


def frozen_state(hf_config: Any, layout: ParallelLayout, stage: int, model: ModelConfig) -> ModelState:
    """A model that is only read: the reference."""
    parameters = sum(chunk.total for chunk in held_parameters(hf_config, layout, stage))
    return ModelState(parameters, parameters * itemsize(model.dtype))


def trained_state(
    hf_config: Any,
    layout: ParallelLayout,
    stage: int,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
) -> ModelState:
    """A model with gradients (always fp32) and optimizer. With the distributed optimizer a rank's share is rounded up:
    the shares of two ranks differ by the padding between parameters.
    """
    weights = gradients = states = parameters = 0
    low_precision = itemsize(model.dtype) < _FP32
    state_bytes = _FP32 * ((2 if optimizer.name == "adam" else 0) + low_precision)
    sharded = parallel.distributed_optimizer
    for chunk in held_parameters(hf_config, layout, stage):
        parameters += chunk.total
        for sizes, ranks in ((chunk.dense, layout.dp * layout.cp), (chunk.experts, layout.edp)):
            numel = buffer_numel(sizes, ranks, padded=sharded)
            weights += numel * itemsize(model.dtype)  # the distributed optimizer moves them into a buffer, padded too
            gradients += numel * _FP32
            states += numel * state_bytes // (ranks if sharded else 1)
    return ModelState(parameters, weights, gradients, states)


def itemsize(dtype: str) -> int:
    """Bytes an element of a torch dtype's name."""
    return getattr(torch, dtype).itemsize


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    kept: int  # by one model chunk until its backward pass
    working: int  # once, whatever the number of micro-batches in flight
    logits: int  # while log-probs and their gradients are computed; last stage only


def activations(
    shape: Any,
    layout: ParallelLayout,
    stage: int,
    model: ModelConfig,
    positions: int,
    chunk_tokens: int,
    vocab_size: int,
    fused_norms: bool = True,
) -> Activations:
    """Of one micro-batch, counted from what this repository's own layers keep; TransformerEngine's keep rather less.

    Args:
        shape: Megatron's TransformerConfig; of any layout, only the model's own sizes are read.
        positions: tokens of the micro-batch, the context-parallel ranks together; spread evenly over the experts.
        chunk_tokens: positions whose logits exist at once.
        fused_norms: torch has one kernel for a norm on CUDA; on a CPU it also keeps two fp32 copies of every input.
    """
    tokens, size = positions / layout.cp, itemsize(model.dtype)
    chunks = pipeline_layers(shape.num_layers, layout, stage)
    kept_by = {
        sparse: tokens * _layer_bytes(shape, layout, sparse, model, fused_norms)
        for sparse in {is_sparse(shape, layer) for chunk in chunks for layer in chunk}
    }
    of_chunk = max(sum(kept_by[is_sparse(shape, layer)] for layer in chunk) for chunk in chunks)
    hidden = tokens * size * shape.hidden_size
    if model.recompute == "full":
        kept, working = max(map(len, chunks)) * hidden / layout.tp, _BACKWARD * max(kept_by.values())
    else:
        rows = (shape.moe_router_topk if shape.num_moe_experts else 1) * layout.etp
        kept, working = of_chunk, 2 * rows * hidden / layout.tp  # gradients of what the experts were sent
    logits = 0.0
    if stage == layout.pp - 1:
        kept += tokens * _norm_bytes(shape.hidden_size, size, fused_norms) / layout.tp + hidden
        vocabulary = -(-vocab_size // layout.tp)
        copied = size < _FP32 and model.fp32_head
        head = size + 2 * _FP32 * copied  # the gradient; an fp32 copy of the matrix and its gradient
        product = size if size < _FP32 and not copied else 0  # the chunk's logits as the matrices multiply them
        chunk = min(chunk_tokens, tokens) * (_LOGIT_COPIES * _FP32 + product)
        logits = vocabulary * (chunk + shape.hidden_size * head)
    return Activations(int(kept), int(working), int(logits))


def _layer_bytes(shape: Any, layout: ParallelLayout, sparse: bool, model: ModelConfig, fused_norms: bool) -> float:
    """What one layer keeps of a token, without recomputation of the whole layer."""
    tp, size, hidden = layout.tp, itemsize(model.dtype), shape.hidden_size
    kept = _attention_bytes(shape, tp, size, fused_norms, copied=model.recompute == "none")
    kept += 2 * _norm_bytes(hidden / tp, size, fused_norms)
    if not sparse:
        return kept + 4 * shape.ffn_hidden_size / tp * size  # gate and up; silu(gate); their product
    kept += 4 * (shape.moe_shared_expert_intermediate_size or 0) / tp * size
    rows = shape.moe_router_topk * layout.etp / tp  # sent to each rank on average, for each of its tokens
    # Input; gate and up; silu(gate), their product, the same times the router's probability in two precisions.
    kept += rows * (hidden + 6 * shape.moe_ffn_hidden_size / layout.etp) * size
    return kept + shape.num_moe_experts * _FP32 / tp


def _attention_bytes(shape: Any, tp: int, size: int, fused_norms: bool, copied: bool) -> float:
    heads = shape.num_attention_heads / tp
    if getattr(shape, "multi_latent_attention", False):
        head, latent = shape.qk_head_dim + shape.qk_pos_emb_head_dim, (shape.q_lora_rank or 0) + shape.kv_lora_rank
        query, key, value = heads * head, heads * head, heads * shape.v_head_dim
    else:
        head, latent = shape.kv_channels, 0
        query, value = heads * head, head * max(shape.num_query_groups / tp, 1)
        key = value
    # The projections; q and k rotated; the tables of the rotation; the output.
    elements = 2 * latent + (query + key + value) + (query + key) + 4 * head + (value if latent else query)
    if copied:
        elements += query + key  # segments of uneven length are laid side by side
    norms = 0 if fused_norms or not shape.qk_layernorm else (query + key) * (_FP32 if size == _FP32 else 2 * _FP32)
    return elements * size + norms


def _norm_bytes(width: float, size: int, fused: bool) -> float:
    """Input and output of a norm; without a fused kernel also fp32 copies of the input and of the normalised input."""
    return width * (2 * size if fused else size + _FP32 + _FP32)


def is_sparse(shape: Any, layer: int) -> bool:
    """Whether a layer (from 0) has experts."""
    frequency = shape.moe_layer_freq
    return bool(shape.num_moe_experts) and bool(frequency[layer] if isinstance(frequency, list) else True)


def cache_bytes(shape: Any, engine_tp: int, size: int) -> int:
    """Bytes that one position takes in the engine's cache, on each of its GPUs."""
    if getattr(shape, "multi_latent_attention", False):
        return shape.num_layers * (shape.kv_lora_rank + shape.qk_pos_emb_head_dim) * size  # held by every rank
    heads = -(-shape.num_query_groups // engine_tp)  # where there are more ranks, several hold the same
    return 2 * shape.num_layers * heads * shape.kv_channels * size
