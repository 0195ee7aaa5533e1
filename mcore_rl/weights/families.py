"""One table a model family: the Megatron parameters of every layer, each with the HF tensors it is made of.

A table lists the HF names as they are on disk. To add a family: write one function that returns a `Family` and
register it in FAMILIES (docs/weight_sync.md shows it step by step). Everything that moves weights (load, save, convert,
sync, reshard) reads these tables. Parameter names are those of Megatron's GPTModel with the layers of
`mcore_rl.model.layers`; `also` has the names under TransformerEngine, which fuses some norms into linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mcore_rl.weights.cuts import Row, Shape, gated, grouped_qkv, split, vocabulary, whole

LAYER = ("decoder.layers.{}.", "model.layers.{}.")  # prefixes of the relative names in a layer's rows: Megatron, HF
SCORE = "score.weight"  # head of a sequence classifier

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_columns = partial(split, dim=0)  # Megatron's ColumnParallelLinear splits the output features: dim 0 of [out, in]
_rows = partial(split, dim=1)  # RowParallelLinear: dim 1


@dataclass(frozen=True)
class Family:
    first: list[Row]  # on the first pipeline chunk
    layers: list[list[Row]]  # of every decoder layer, names relative to LAYER
    last: list[Row]  # on the last pipeline chunk


def _ends(c: Any) -> tuple[list[Row], list[Row]]:
    """Embedding, final norm and output layer; tied models have no lm_head on disk, scorers a score head instead."""
    table = (c.vocab_size, c.hidden_size)
    first = [Row("embedding.word_embeddings.weight", {_EMBEDDING: table}, vocabulary)]
    norm = Row("decoder.final_layernorm.weight", {"model.norm.weight": (c.hidden_size,)}, whole)
    if is_scorer(c):
        return first, [norm, Row("output_layer.weight", {SCORE: (c.num_labels, c.hidden_size)}, whole)]
    tied = bool(c.tie_word_embeddings)
    return first, [norm, Row("output_layer.weight", {_EMBEDDING if tied else _HEAD: table}, vocabulary, tied=tied)]


def _input_norm(c: Any, fused_into: str | None = None) -> Row:
    also = (f"self_attention.{fused_into}.layer_norm_weight",) if fused_into else ()
    return Row("input_layernorm.weight", {"input_layernorm.weight": (c.hidden_size,)}, whole, also=also)


def _mlp_norm(c: Any, also: tuple[str, ...] = ()) -> Row:
    return Row("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": (c.hidden_size,)}, whole, also=also)


def _attention(c: Any, qkv_bias: bool = False, out_bias: bool = False, qk_norm: str | None = None) -> list[Row]:
    """Grouped-query attention with its input norm.

    Args:
        qk_norm: "head": queries and keys are normalised head by head with one weight [hd]; "full": over all heads of
            the token with weights [heads * hd], which are split with the heads.
    """
    heads, groups = c.num_attention_heads, c.num_key_value_heads
    hd = getattr(c, "head_dim", None) or c.hidden_size // heads
    sizes = {"q": heads * hd, "k": groups * hd, "v": groups * hd}
    qkv = partial(grouped_qkv, groups=groups)

    def fused(kind: str, rest: Shape) -> Row:
        tensors = {f"self_attn.{x}_proj.{kind}": (size, *rest) for x, size in sizes.items()}
        return Row(f"self_attention.linear_qkv.{kind}", tensors, qkv)

    rows = [
        _input_norm(c, fused_into="linear_qkv"),
        fused("weight", (c.hidden_size,)),
        Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (c.hidden_size, heads * hd)}, _rows),
    ]
    if qkv_bias:
        rows.append(fused("bias", ()))
    if out_bias:
        rows.append(Row("self_attention.linear_proj.bias", {"self_attn.o_proj.bias": (c.hidden_size,)}, whole))
    for x in "qk" if qk_norm else "":
        shape, cut = ((hd,), whole) if qk_norm == "head" else ((sizes[x],), _columns)
        rows.append(Row(f"self_attention.{x}_layernorm.weight", {f"self_attn.{x}_norm.weight": shape}, cut))
    return rows


def _latent_attention(c: Any) -> list[Row]:
    """Multi-latent attention (arXiv:2405.04434, section 2.1) with its input norm. The down projections are whole on
    every rank; the up projections are split by heads."""
    heads, rank = c.num_attention_heads, c.kv_lora_rank
    q_size = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)

    def linear(param: str, hf: str, shape: Shape, cut: Callable) -> Row:
        return Row(f"self_attention.{param}.weight", {f"self_attn.{hf}.weight": shape}, cut)

    def norm(x: str, size: int) -> Row:
        fused = f"self_attention.linear_{x}_up_proj.layer_norm_weight"
        name, hf = f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_a_layernorm.weight"
        return Row(name, {hf: (size,)}, whole, also=(fused,))

    rows = [
        _input_norm(c),
        linear("linear_kv_down_proj", "kv_a_proj_with_mqa", (rank + c.qk_rope_head_dim, c.hidden_size), whole),
        norm("kv", rank),
        linear("linear_kv_up_proj", "kv_b_proj", (heads * (c.qk_nope_head_dim + c.v_head_dim), rank), _columns),
        linear("linear_proj", "o_proj", (c.hidden_size, heads * c.v_head_dim), _rows),
    ]
    if c.q_lora_rank is None:
        return [*rows, linear("linear_q_proj", "q_proj", (q_size, c.hidden_size), _columns)]
    return [
        *rows,
        linear("linear_q_down_proj", "q_a_proj", (c.q_lora_rank, c.hidden_size), whole),
        norm("q", c.q_lora_rank),
        linear("linear_q_up_proj", "q_b_proj", (q_size, c.q_lora_rank), _columns),
    ]


def _gated_mlp(c: Any, param: str, hf: str, size: int) -> list[Row]:
    up, down = (size, c.hidden_size), (c.hidden_size, size)
    return [
        Row(f"{param}linear_fc1.weight", {f"{hf}gate_proj.weight": up, f"{hf}up_proj.weight": up}, gated),
        Row(f"{param}linear_fc2.weight", {f"{hf}down_proj.weight": down}, _rows),
    ]


def _mlp(c: Any) -> list[Row]:
    """Dense gated MLP with its input norm."""
    norm = _mlp_norm(c, also=("mlp.linear_fc1.layer_norm_weight",))
    return [norm, *_gated_mlp(c, "mlp.", "mlp.", c.intermediate_size)]


def _experts(
    c: Any, num: int, size: int, block: str = "mlp", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Row]:
    """Router and gated experts with their input norm; one grouped parameter `weight{i}` an expert.

    Args:
        block, names: of the block and of an expert's gate, up and down projection on disk.
    """
    gate, up, down = (f"{block}.experts.{{expert}}.{name}.weight" for name in names)
    fc1, fc2 = "mlp.experts.linear_fc1.", "mlp.experts.linear_fc2."
    wide, tall = (size, c.hidden_size), (c.hidden_size, size)
    return [
        _mlp_norm(c),
        Row("mlp.router.weight", {f"{block}.gate.weight": (num, c.hidden_size)}, whole),
        Row(fc1 + "weight{expert}", {gate: wide, up: wide}, gated, "etp", experts=num),
        Row(fc2 + "weight{expert}", {down: tall}, _rows, "etp", experts=num),
    ]


def _qwen3_attention(c: Any) -> list[Row]:
    return _attention(c, c.attention_bias, c.attention_bias, qk_norm="head")


def _dense(c: Any, attention: list[Row]) -> Family:
    first, last = _ends(c)
    return Family(first, [attention + _mlp(c)] * c.num_hidden_layers, last)


def sparse_layers(c: Any) -> list[bool]:
    """Which layers of a Qwen MoE have experts."""
    return [i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0 for i in range(c.num_hidden_layers)]


def _qwen3(c: Any) -> Family:
    return _dense(c, _qwen3_attention(c))


def _qwen3_moe(c: Any) -> Family:
    first, last = _ends(c)
    dense = _qwen3_attention(c) + _mlp(c)
    moe = _qwen3_attention(c) + _experts(c, c.num_experts, c.moe_intermediate_size)
    return Family(first, [moe if sparse else dense for sparse in sparse_layers(c)], last)


def _qwen2(c: Any) -> Family:
    return _dense(c, _attention(c, qkv_bias=True))


def _qwen2_moe(c: Any) -> Family:
    first, last = _ends(c)
    attention = _attention(c, qkv_bias=c.qkv_bias)
    shared = _gated_mlp(c, "mlp.shared_experts.", "mlp.shared_expert.", c.shared_expert_intermediate_size)
    gate = Row("mlp.shared_experts.gate_weight", {"mlp.shared_expert_gate.weight": (1, c.hidden_size)}, whole)
    moe = [*attention, *_experts(c, c.num_experts, c.moe_intermediate_size), *shared, gate]
    return Family(first, [moe if sparse else attention + _mlp(c) for sparse in sparse_layers(c)], last)


def _llama(c: Any) -> Family:
    return _dense(c, _attention(c, c.attention_bias, c.attention_bias))


def _mixtral(c: Any) -> Family:
    first, last = _ends(c)
    experts = _experts(c, c.num_local_experts, c.intermediate_size, "block_sparse_moe", ("w1", "w3", "w2"))
    return Family(first, [_attention(c) + experts] * c.num_hidden_layers, last)


def _olmoe(c: Any) -> Family:
    first, last = _ends(c)
    attention = _attention(c, c.attention_bias, c.attention_bias, qk_norm="full")
    return Family(first, [attention + _experts(c, c.num_experts, c.intermediate_size)] * c.num_hidden_layers, last)


def _deepseek_v3(c: Any) -> Family:
    first, last = _ends(c)
    attention, experts = _latent_attention(c), c.n_routed_experts
    bias = {"mlp.gate.e_score_correction_bias": (experts,)}
    moe = [
        *attention,
        *_experts(c, experts, c.moe_intermediate_size),
        Row("mlp.router.expert_bias", bias, whole, dtype=torch.float32),  # bf16 would change which experts are chosen
        *_gated_mlp(c, "mlp.shared_experts.", "mlp.shared_experts.", c.n_shared_experts * c.moe_intermediate_size),
    ]
    layers = [attention + _mlp(c) if i < c.first_k_dense_replace else moe for i in range(c.num_hidden_layers)]
    return Family(first, layers, last)


FAMILIES: dict[str, Callable[[Any], Family]] = {
    "deepseek_v3": _deepseek_v3,
    "llama": _llama,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


def family(hf_config: Any) -> Family:
    """The table of a model. Raises ValueError for a model type without one."""
    build = FAMILIES.get(hf_config.model_type)
    if build is None:
        raise ValueError(f"no weight table for model type {hf_config.model_type!r}; supported: {', '.join(FAMILIES)}")
    return build(hf_config)


def is_scorer(hf_config: Any) -> bool:
    """Whether the model is one of transformers' sequence classifiers."""
    return (hf_config.architectures or [""])[0].endswith("ForSequenceClassification")
