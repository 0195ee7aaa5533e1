"""What each architecture of transformers means as Megatron settings. A setting without a meaning here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from transformers import PretrainedConfig

from mcore_rl.weights.families import sparse_layers

Fields = dict[str, Any]  # of TransformerConfig, of MLATransformerConfig where multi_latent_attention is set

# Llama 3.1's frequency scaling; Megatron has all but the factor as constants (rotary_pos_embedding.py:103).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LATENT_NORM_EPS = 1e-6  # what transformers gives the norms of compressed queries and keys, whatever the others have


def rope_arguments(hf: PretrainedConfig) -> Fields:
    """Arguments of GPTModel for rotary positions; multi-latent attention reads its own from the fields."""
    rope = hf.rope_parameters
    arguments: Fields = dict(rotary_base=rope["rope_theta"])
    if rope.get("rope_type") == "llama3":
        arguments |= dict(rope_scaling=True, rope_scaling_factor=rope["factor"])
    return arguments


def refuse(hf: PretrainedConfig, **unsupported: bool) -> None:
    """Raise ValueError naming the settings of this checkpoint that would be computed wrongly."""
    if found := [name for name, present in unsupported.items() if present]:
        settings = ", ".join(f"{name}={getattr(hf, name)!r}" for name in found)
        raise ValueError(f"{hf.model_type} with {settings} in config.json is not supported; use a checkpoint without")


def _common(hf: PretrainedConfig, rope_types: tuple[str, ...] = ("default",)) -> Fields:
    rope = hf.rope_parameters
    known = rope.get("rope_type", "default") in rope_types and rope.get("partial_rotary_factor", 1.0) == 1.0
    if rope.get("rope_type") == "llama3":
        known = known and all(rope.get(name) == value for name, value in _LLAMA3.items())
    refuse(
        hf,
        rope_parameters=not known,
        sliding_window=bool(getattr(hf, "sliding_window", None)),
        layer_types=not set(getattr(hf, "layer_types", None) or ()) <= {"full_attention"},
        hidden_act=hf.hidden_act != "silu",
    )
    return dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
    )


def _grouped_query(hf: PretrainedConfig, qkv_bias: bool = False, qk_norm: bool = False, **rope: Any) -> Fields:
    return _common(hf, **rope) | dict(
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        add_qkv_bias=qkv_bias,
        qk_layernorm=qk_norm,
    )


def _experts(hf: PretrainedConfig, aux_loss_coef: float, sparse: list[bool], num: int, width: int) -> Fields:
    return dict(
        num_moe_experts=num,
        moe_ffn_hidden_size=width,
        moe_layer_freq=[int(layer) for layer in sparse],
        moe_router_topk=hf.num_experts_per_tok,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if aux_loss_coef else "none",
        moe_aux_loss_coeff=aux_loss_coef,
    )


def _softmax_router(hf: PretrainedConfig, renormalised: bool) -> Fields:
    # The probability of a single, renormalised expert is the constant 1: its router would never learn.
    refuse(hf, num_experts_per_tok=hf.num_experts_per_tok == 1 and renormalised)
    # Renormalised probabilities of the chosen experts are a softmax over their logits alone.
    return dict(moe_router_pre_softmax=not renormalised)


def _qwen3(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    return _grouped_query(hf, hf.attention_bias, qk_norm=True)


def _qwen3_moe(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    experts = _experts(hf, aux_loss_coef, sparse_layers(hf), hf.num_experts, hf.moe_intermediate_size)
    return _qwen3(hf, aux_loss_coef) | _softmax_router(hf, hf.norm_topk_prob) | experts


def _qwen2(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    return _grouped_query(hf, qkv_bias=True)


def _qwen2_moe(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    experts = _experts(hf, aux_loss_coef, sparse_layers(hf), hf.num_experts, hf.moe_intermediate_size)
    shared = dict(moe_shared_expert_intermediate_size=hf.shared_expert_intermediate_size, moe_shared_expert_gate=True)
    return _grouped_query(hf, hf.qkv_bias) | _softmax_router(hf, hf.norm_topk_prob) | experts | shared


def _llama(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    refuse(hf, mlp_bias=hf.mlp_bias)
    return _grouped_query(hf, hf.attention_bias, rope_types=("default", "llama3"))


def _mixtral(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    refuse(hf, router_jitter_noise=bool(hf.router_jitter_noise))
    sparse = [True] * hf.num_hidden_layers
    experts = _experts(hf, aux_loss_coef, sparse, hf.num_local_experts, hf.intermediate_size)
    return _grouped_query(hf) | _softmax_router(hf, renormalised=True) | experts


def _olmoe(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    refuse(hf, clip_qkv=hf.clip_qkv is not None)
    experts = _experts(hf, aux_loss_coef, [True] * hf.num_hidden_layers, hf.num_experts, hf.intermediate_size)
    return _grouped_query(hf, hf.attention_bias, qk_norm=True) | _softmax_router(hf, hf.norm_topk_prob) | experts


def _deepseek_v3(hf: PretrainedConfig, aux_loss_coef: float) -> Fields:
    grouped = hf.n_group > 1
    refuse(
        hf,
        attention_bias=hf.attention_bias,
        rope_interleave=not hf.rope_interleave,
        # Megatron renormalises the chosen experts' scores exactly if there are several of them.
        norm_topk_prob=bool(hf.norm_topk_prob) != (hf.num_experts_per_tok > 1),
        # A group counts by its two best experts; in Megatron by its topk // group_topk best.
        topk_group=grouped and hf.num_experts_per_tok // hf.topk_group != 2,
        rms_norm_eps=hf.rms_norm_eps != _LATENT_NORM_EPS,
    )
    rope = hf.rope_parameters
    scaled = [bool(rope.get(name)) for name in ("mscale", "mscale_all_dim")]
    refuse(hf, rope_parameters=len(set(scaled)) > 1 or "attention_factor" in rope or not rope.get("truncate", True))
    sparse = [layer >= hf.first_k_dense_replace for layer in range(hf.num_hidden_layers)]
    return (
        _common(hf, rope_types=("default", "yarn"))
        | _experts(hf, aux_loss_coef, sparse, hf.n_routed_experts, hf.moe_intermediate_size)
        | _latent_rope(hf)
        | dict(
            multi_latent_attention=True,
            qk_layernorm=True,
            q_lora_rank=hf.q_lora_rank,
            kv_lora_rank=hf.kv_lora_rank,
            qk_head_dim=hf.qk_nope_head_dim,
            qk_pos_emb_head_dim=hf.qk_rope_head_dim,
            v_head_dim=hf.v_head_dim,
            moe_shared_expert_intermediate_size=hf.n_shared_experts * hf.moe_intermediate_size,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.0,  # balances pre-training; in RL the loss decides what the router does
            moe_router_topk_scaling_factor=hf.routed_scaling_factor,
            moe_router_num_groups=hf.n_group if grouped else None,
            moe_router_group_topk=hf.topk_group if grouped else None,
        )
    )


def _latent_rope(hf: PretrainedConfig) -> Fields:
    rope = hf.rope_parameters
    if rope.get("rope_type", "default") == "default":
        # The factor also scales the softmax, under plain rotary positions too.
        return dict(rope_type="rope", rotary_base=rope["rope_theta"], rotary_scaling_factor=1.0)
    return dict(
        rope_type="yarn",
        rotary_base=rope["rope_theta"],
        rotary_scaling_factor=rope["factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        mscale=rope.get("mscale") or 1.0,
        mscale_all_dim=rope.get("mscale_all_dim") or 0.0,
    )


_BACKBONES: dict[str, Callable[[PretrainedConfig, float], Fields]] = {
    "Qwen3Moe": _qwen3_moe,
    "Qwen3": _qwen3,
    "Qwen2Moe": _qwen2_moe,
    "Qwen2": _qwen2,
    "Llama": _llama,
    "Mixtral": _mixtral,
    "Olmoe": _olmoe,
    "DeepseekV3": _deepseek_v3,
}
# Architecture name in config.json -> the fields that come from it; the second argument is the load-balancing loss.
FAMILIES = {f"{name}For{head}": f for name, f in _BACKBONES.items() for head in ("CausalLM", "SequenceClassification")}


def find_family(architectures: list[str]) -> Callable[[PretrainedConfig, float], Fields] | None:
    return next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
