"""Small checkpoints that show mistakes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# 97 is a multiple of no tensor-parallel size: padded vocabularies are always exercised.
DENSE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    tie_word_embeddings=False,
)
MOE = DENSE | dict(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
_PLAIN = {name: value for name, value in DENSE.items() if name != "head_dim"}
YARN = dict(
    rope_type="yarn",
    rope_theta=10_000.0,
    factor=8.0,
    original_max_position_embeddings=16,
    mscale=0.7,
    mscale_all_dim=0.9,
    beta_fast=8,
)
FAMILIES: dict[str, dict] = {
    "qwen3": DENSE,
    "qwen3_moe": MOE,
    "qwen2": _PLAIN,
    "qwen2_moe": _PLAIN
    | dict(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2, shared_expert_intermediate_size=40),
    "llama": DENSE | dict(head_dim=16),
    "mixtral": _PLAIN | dict(intermediate_size=48, num_local_experts=8, sliding_window=None),
    "olmoe": _PLAIN | dict(intermediate_size=48, num_experts=8, num_experts_per_tok=2, num_key_value_heads=4),
    "deepseek_v3": _PLAIN
    | dict(
        num_key_value_heads=4,
        moe_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rope_parameters=YARN,
        num_nextn_predict_layers=0,
    ),
}


def save_tiny_hf(folder: Path, moe: bool = True, seed: int = 0, family: str | None = None, **overrides) -> Path:
    """Write a small checkpoint in fp32 into `folder`: of `family`, or Qwen3-MoE or Qwen3.

    A fresh HF model has only ones in its norms, zeros in its biases, and so small a router that its softmax is flat:
    neither a swapped norm, nor a lost bias, nor a wrong normalisation would show. All weights are drawn so that such
    mistakes change the logits.
    """
    family = family or ("qwen3_moe" if moe else "qwen3")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | overrides)).float()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                weight.normal_(std=0.2)
            elif name.endswith("bias"):
                weight.normal_(std=0.3)
            elif not name.endswith("inv_freq"):
                weight.mul_(2)
    model.save_pretrained(folder)
    return folder
