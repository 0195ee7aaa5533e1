"""Small checkpoints that show mistakes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

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


def save_tiny_hf(folder: Path, moe: bool = True, seed: int = 0, **overrides) -> Path:
    """Write a small Qwen3 or Qwen3-MoE checkpoint in fp32 into `folder`.

    A fresh HF model has only ones in its norms, and so small a router that its softmax is flat: neither a swapped norm
    nor a wrong normalisation would show. All weights are drawn so that such mistakes change the logits.
    """
    config = Qwen3MoeConfig(**MOE | overrides) if moe else Qwen3Config(**DENSE | overrides)
    torch.manual_seed(seed)
    model = (Qwen3MoeForCausalLM if moe else Qwen3ForCausalLM)(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                weight.normal_(std=0.2)
            else:
                weight.mul_(2)
    model.save_pretrained(folder)
    return folder
