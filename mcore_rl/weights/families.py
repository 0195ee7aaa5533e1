"""One table a model family: which HF tensors a Megatron parameter is made of, and how it is split over ranks.

A table lists the HF names as they are on disk. To add a family: write one function that returns a `Family` and
register it in FAMILIES. Everything that moves weights (load, save, convert, sync, reshard) reads these tables.

Letters for shapes: V vocabulary, D hidden, F ffn, E experts, G query groups (kv heads), hd head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # (low, high) in every factored dimension
Factors = tuple[Shape, ...]  # the factors of every dimension of an HF tensor: ((4, 64), (256,)) is a [256, 256] tensor
LAYER = ("decoder.layers.{}.", "model.layers.{}.")  # prefixes of the relative names in a layer's rows: Megatron, HF


class Part(NamedTuple):
    """A box of one HF tensor inside a Megatron parameter: `param.view(cut.fold)[index]` has the shape of `box`."""

    tensor: int  # position in Row.hf
    box: Box
    index: tuple[slice | int, ...]


class Cut(NamedTuple):
    """What one rank holds of a row."""

    param_shape: Shape
    fold: Shape
    factors: tuple[Factors, ...]  # of every HF tensor; the same for any number of ranks
    parts: tuple[Part, ...]


Split = Callable[[Sequence[Shape], int, int], Cut]  # (HF shapes, number of ranks, this rank) -> what it holds


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it is made of.

    Example:
        >>> Row("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": (8, 4), "mlp.up_proj.weight": (8, 4)}, gated).axis
        'tp'
    """

    param: str  # `{expert}` stands for the rank's own count of experts
    hf: dict[str, Shape]  # name -> shape; `{expert}` stands for the model's count
    split: Split
    axis: Literal["tp", "etp"] = "tp"  # the ranks it is split over
    experts: int = 0  # of the whole model, spread over ep; 0: not an expert's parameter
    also: tuple[str, ...] = ()  # the parameter's name in other layer specs
    tied: bool = False  # a second copy of a tensor that another row owns


@dataclass(frozen=True)
class Family:
    first: list[Row]  # on the first pipeline chunk
    layers: list[list[Row]]  # of every decoder layer, names relative to LAYER
    last: list[Row]  # on the last pipeline chunk


def whole(shapes: Sequence[Shape], ranks: int, rank: int) -> Cut:
    """The same tensor on every rank."""
    (shape,) = shapes
    return Cut(shape, shape, (_plain(shape),), (Part(0, _full(shape), ()),))


def split(shapes: Sequence[Shape], ranks: int, rank: int, dim: int) -> Cut:
    """Equal slices along `dim`."""
    (shape,) = shapes
    size = _share(shape[dim], ranks)
    local = (*shape[:dim], size, *shape[dim + 1 :])
    box = (*_full(shape[:dim]), (rank * size, (rank + 1) * size), *_full(shape[dim + 1 :]))
    return Cut(local, local, (_plain(shape),), (Part(0, box, ()),))


def gated(shapes: Sequence[Shape], ranks: int, rank: int) -> Cut:
    """Gate and up projections, each [F, ...], fused as [2, F/ranks, ...]."""
    shape = shapes[0]
    size = _share(shape[0], ranks)
    box = ((rank * size, (rank + 1) * size), *_full(shape[1:]))
    factors = tuple(_plain(s) for s in shapes)
    return Cut((2 * size, *shape[1:]), (2, size, *shape[1:]), factors, (Part(0, box, (0,)), Part(1, box, (1,))))


def grouped_qkv(shapes: Sequence[Shape], ranks: int, rank: int, groups: int) -> Cut:
    """Rows q..q k v of group 0, then of group 1, ...: [G, (H/G + 2) * hd, ...], cut in `ranks` equal row ranges.

    With more ranks than groups a rank holds a window of one group, which may cut through a head
    (megatron/core/transformer/attention.py:1398, version 0.16.1).
    """
    if groups % ranks and ranks % groups:
        raise ValueError(f"{groups} key/value heads and {ranks} ranks: one must be a multiple of the other")
    rest = shapes[0][1:]
    heights = [shape[0] // groups for shape in shapes]  # rows of q, k, v in one group
    local_groups = max(1, groups // ranks)
    window = _share(groups * sum(heights), ranks) // local_groups  # rows held of each local group
    group, low = divmod(rank * window * local_groups, sum(heights))
    parts = []
    start = 0
    for tensor, height in enumerate(heights):
        first, end = max(start, low), min(start + height, low + window)
        if first < end:
            box = ((group, group + local_groups), (first - start, end - start), *_full(rest))
            parts.append(Part(tensor, box, (slice(None), slice(first - low, end - low))))
        start += height
    factors = tuple(((groups, height), *_plain(rest)) for height in heights)
    return Cut((local_groups * window, *rest), (local_groups, window, *rest), factors, tuple(parts))


def vocabulary(shapes: Sequence[Shape], ranks: int, rank: int) -> Cut:
    """Rows of [V, D] after padding V to a multiple of `ranks`; HF has no padding rows, so the part leaves them out."""
    (shape,) = shapes
    size = -(-shape[0] // ranks)
    low, high = min(rank * size, shape[0]), min((rank + 1) * size, shape[0])
    local = (size, *shape[1:])
    part = Part(0, ((low, high), *_full(shape[1:])), (slice(0, high - low),))
    return Cut(local, local, (_plain(shape),), (part,))


def _share(size: int, ranks: int) -> int:
    if size % ranks:
        raise ValueError(f"a dimension of {size} cannot be divided over {ranks} ranks")
    return size // ranks


def _plain(shape: Shape) -> Factors:
    return tuple((size,) for size in shape)


def _full(shape: Shape) -> Box:
    return tuple((0, size) for size in shape)


_columns = partial(split, dim=0)  # Megatron's ColumnParallelLinear splits the output features: dim 0 of [out, in]
_rows = partial(split, dim=1)  # RowParallelLinear: dim 1
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCORE = "score.weight"  # head of a sequence classifier


def _ends(c: Any) -> tuple[list[Row], list[Row]]:
    """Embedding, final norm and output layer; tied models have no lm_head on disk, scorers a score head instead."""
    table = (c.vocab_size, c.hidden_size)
    first = [Row("embedding.word_embeddings.weight", {_EMBEDDING: table}, vocabulary)]
    norm = Row("decoder.final_layernorm.weight", {"model.norm.weight": (c.hidden_size,)}, whole)
    if is_scorer(c):
        return first, [norm, Row("output_layer.weight", {SCORE: (c.num_labels, c.hidden_size)}, whole)]
    tied = bool(c.tie_word_embeddings)
    return first, [norm, Row("output_layer.weight", {_EMBEDDING if tied else _HEAD: table}, vocabulary, tied=tied)]


def _attention(c: Any, qk_norm: bool) -> list[Row]:
    """Grouped-query attention with its input norm."""
    heads, groups = c.num_attention_heads, c.num_key_value_heads
    hd = getattr(c, "head_dim", None) or c.hidden_size // heads
    sizes = {"q": heads * hd, "k": groups * hd, "v": groups * hd}
    qkv = partial(grouped_qkv, groups=groups)

    def fused(kind: str, rest: Shape) -> Row:
        tensors = {f"self_attn.{x}_proj.{kind}": (size, *rest) for x, size in sizes.items()}
        return Row(f"self_attention.linear_qkv.{kind}", tensors, qkv)

    rows = [
        Row(
            "input_layernorm.weight",
            {"input_layernorm.weight": (c.hidden_size,)},
            whole,
            also=("self_attention.linear_qkv.layer_norm_weight",),
        ),
        fused("weight", (c.hidden_size,)),
        Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (c.hidden_size, heads * hd)}, _rows),
    ]
    if getattr(c, "attention_bias", False):
        rows.append(fused("bias", ()))
        rows.append(Row("self_attention.linear_proj.bias", {"self_attn.o_proj.bias": (c.hidden_size,)}, whole))
    if qk_norm:
        rows += [
            Row(f"self_attention.{x}_layernorm.weight", {f"self_attn.{x}_norm.weight": (hd,)}, whole) for x in "qk"
        ]
    return rows


def _mlp(c: Any) -> list[Row]:
    """Dense gated MLP with its input norm."""
    up, down = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
    return [
        Row(
            "pre_mlp_layernorm.weight",
            {"post_attention_layernorm.weight": (c.hidden_size,)},
            whole,
            also=("mlp.linear_fc1.layer_norm_weight",),
        ),
        Row("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": up, "mlp.up_proj.weight": up}, gated),
        Row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": down}, _rows),
    ]


def _experts(c: Any) -> list[Row]:
    """Router and gated experts with their input norm; one grouped parameter `weight{i}` an expert."""
    num, up, down = c.num_experts, (c.moe_intermediate_size, c.hidden_size), (c.hidden_size, c.moe_intermediate_size)
    hf, fc1, fc2 = "mlp.experts.{expert}.", "mlp.experts.linear_fc1.", "mlp.experts.linear_fc2."
    gate_up = {hf + "gate_proj.weight": up, hf + "up_proj.weight": up}
    return [
        Row("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": (c.hidden_size,)}, whole),
        Row("mlp.router.weight", {"mlp.gate.weight": (num, c.hidden_size)}, whole),
        Row(fc1 + "weight{expert}", gate_up, gated, "etp", experts=num),
        Row(fc2 + "weight{expert}", {hf + "down_proj.weight": down}, _rows, "etp", experts=num),
    ]


def _qwen3(c: Any) -> Family:
    first, last = _ends(c)
    return Family(first, [_attention(c, qk_norm=True) + _mlp(c)] * c.num_hidden_layers, last)


def _qwen3_moe(c: Any) -> Family:
    first, last = _ends(c)
    sparse = [i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0 for i in range(c.num_hidden_layers)]
    dense, moe = _attention(c, qk_norm=True) + _mlp(c), _attention(c, qk_norm=True) + _experts(c)
    return Family(first, [moe if s else dense for s in sparse], last)


FAMILIES: dict[str, Callable[[Any], Family]] = {"qwen3": _qwen3, "qwen3_moe": _qwen3_moe}


def family(hf_config: Any) -> Family:
    """The table of a model. Raises ValueError for a model type without one."""
    build = FAMILIES.get(hf_config.model_type)
    if build is None:
        raise ValueError(f"no weight table for model type {hf_config.model_type!r}; supported: {', '.join(FAMILIES)}")
    return build(hf_config)


def is_scorer(hf_config: Any) -> bool:
    """Whether the model is one of transformers' sequence classifiers."""
    return (hf_config.architectures or [""])[0].endswith("ForSequenceClassification")


def volume(box: Box) -> int:
    """Elements in a box."""
    return prod(high - low for low, high in box)
