"""HF config -> TransformerConfig -> this rank's chunks of the policy."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from transformers import AutoConfig, PretrainedConfig

from mcore_rl.config import ModelConfig
from mcore_rl.model.heads import PolicyModel, ScoreModel
from mcore_rl.model.layers import RMSNorm, local_layer_spec
from mcore_rl.parallel.device import has_transformer_engine
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.families import is_scorer


def read_hf_config(path: str | Path, key: str = "model.path") -> PretrainedConfig:
    """Read config.json of a HF folder; `key` of the configuration named it.

    Raises:
        ValueError: no such folder, no readable config.json, or an architecture without an entry in FAMILIES.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        what = "has no config.json" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{key}={str(path)!r} {what}; pass a Hugging Face folder (config.json, safetensors)")
    try:
        architectures = json.loads(file.read_text()).get("architectures") or []
        if _family(architectures) is None:
            raise ValueError(f"architectures={architectures} is not supported; supported: {', '.join(FAMILIES)}")
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error


def transformer_config(hf_config: PretrainedConfig, model: ModelConfig, layout: ParallelLayout) -> TransformerConfig:
    """Megatron's configuration of this model under this layout.

    Raises:
        ValueError: an unsupported architecture or feature (none is ignored), or a layout that does not divide it.
    """
    family = _family(hf_config.architectures or [])
    if family is None:
        raise ValueError(f"architectures={hf_config.architectures} is not supported; supported: {', '.join(FAMILIES)}")
    layout.validate_model(hf_config)
    dtype = getattr(torch, model.dtype)
    settings = dict(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tp > 1,
        # Packed micro-batches differ in length: in time between pipeline stages, and between data-parallel ranks, which
        # only this dispatcher allows. Megatron wants it named for dense models too.
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=torch.cuda.is_available(),  # gloo has no batched send and receive
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        cuda_graph_scope=[],  # the default value is a deprecated one
        # All weights come from files, but initialisation also marks the split ones, by which clipping counts them.
        perform_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        # Fused kernels of apex and TransformerEngine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_recompute(model),
        **family(hf_config, model),
    )
    with warnings.catch_warnings():
        # Asked for by model.recompute=selective; Megatron wonders whether it is useful with TransformerEngine.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer impl")
        return TransformerConfig(**settings)


def build_model(hf_config: PretrainedConfig, model: ModelConfig, groups: Groups) -> list[PolicyModel]:
    """This rank's chunks, one a virtual pipeline stage, on `groups.device`; weights are to be filled from files.

    Parameters are created in `model.dtype` and inputs are integers, so no Float16Module is needed around them: they go
    straight into Megatron's DistributedDataParallel. Rows that pad the vocabulary to a multiple of tp are zero. The
    configuration of a sequence classifier gives ScoreModels (see `heads.as_scorer`).
    """
    make = partial(ScoreModel, num_labels=hf_config.num_labels) if is_scorer(hf_config) else PolicyModel
    config = transformer_config(hf_config, model, groups.layout)
    use_te = _use_transformer_engine(model)
    config.moe_grouped_gemm = use_te and config.num_moe_experts is not None
    vpp, pp, at = groups.layout.vpp, groups.layout.pp, groups.coords.pp
    chunks = []
    for stage in range(vpp):
        vp_stage = stage if vpp > 1 else None
        chunk = make(
            config,
            _block_spec(config, use_te, vp_stage),
            vocab_size=padded_vocab_size(hf_config, groups.layout),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=at == 0 and stage == 0,
            post_process=at == pp - 1 and stage == vpp - 1,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=hf_config.rope_parameters["rope_theta"],
            vp_stage=vp_stage,
        )
        for name, weight in chunk.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                weight.data.zero_()
        chunks.append(chunk.to(groups.device))
    return chunks


def padded_vocab_size(hf_config: PretrainedConfig, layout: ParallelLayout) -> int:
    """Rows of the vocabulary matrices: the smallest multiple of tp that holds the vocabulary."""
    return -(-hf_config.vocab_size // layout.tp) * layout.tp


def _qwen3(hf: PretrainedConfig, model: ModelConfig) -> dict[str, Any]:
    rope = hf.rope_parameters
    _refuse(
        hf,
        rope_parameters=rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0,
        # Without a window HF sets sliding_window to None.
        sliding_window=hf.sliding_window is not None,
        layer_types=not set(getattr(hf, "layer_types", None) or ()) <= {"full_attention"},
        attention_bias=hf.attention_bias,
        hidden_act=hf.hidden_act != "silu",
    )
    return dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
    )


def _qwen3_moe(hf: PretrainedConfig, model: ModelConfig) -> dict[str, Any]:
    # The probability of a single, renormalised expert is the constant 1: its router would never learn.
    _refuse(hf, num_experts_per_tok=hf.num_experts_per_tok == 1 and hf.norm_topk_prob)
    sparse = [
        int(layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0)
        for layer in range(hf.num_hidden_layers)
    ]
    return _qwen3(hf, model) | dict(
        num_moe_experts=hf.num_experts,
        moe_ffn_hidden_size=hf.moe_intermediate_size,
        moe_layer_freq=sparse,
        moe_router_topk=hf.num_experts_per_tok,
        # Renormalised probabilities of the chosen experts are a softmax over their logits alone.
        moe_router_pre_softmax=not hf.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coef else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coef,
    )


# Architecture name in config.json -> the TransformerConfig fields that come from it.
FAMILIES: dict[str, Callable[[PretrainedConfig, ModelConfig], dict[str, Any]]] = {
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Qwen3MoeForSequenceClassification": _qwen3_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3ForSequenceClassification": _qwen3,
}


def _family(architectures: list[str]) -> Callable[[PretrainedConfig, ModelConfig], dict[str, Any]] | None:
    return next((FAMILIES[name] for name in architectures if name in FAMILIES), None)


def _refuse(hf: PretrainedConfig, **unsupported: bool) -> None:
    """Raise ValueError naming the settings of this checkpoint that would be computed wrongly."""
    if found := [name for name, present in unsupported.items() if present]:
        settings = ", ".join(f"{name}={getattr(hf, name)!r}" for name in found)
        raise ValueError(f"{hf.model_type} with {settings} in config.json is not supported; use a checkpoint without")


def _recompute(model: ModelConfig) -> dict[str, Any]:
    if model.recompute == "none":
        return {}
    if model.recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _use_transformer_engine(model: ModelConfig) -> bool:
    if model.spec == "transformer_engine" and not has_transformer_engine():
        raise ValueError(
            "model.spec=transformer_engine needs CUDA and TransformerEngine, and one of them is missing; install "
            "transformer-engine or set model.spec=auto"
        )
    return model.spec != "local" and has_transformer_engine()


def _block_spec(config: TransformerConfig, use_te: bool, vp_stage: int | None) -> TransformerBlockSubmodules:
    if use_te:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    sparse = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    specs = {moe: local_layer_spec(config, bool(moe)) for moe in set(sparse)}
    return TransformerBlockSubmodules(layer_specs=[specs[sparse[layer]] for layer in layers], layer_norm=RMSNorm)
