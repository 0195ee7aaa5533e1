"""The weight tables against Megatron parameters put together by hand, for many layouts, without processes."""

from collections import Counter

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn
from transformers import AutoConfig, GPT2Config, Qwen3Config, Qwen3MoeConfig

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.plan import plan
from mcore_rl.weights.shards import (
    Region,
    hf_regions,
    hf_shapes,
    hf_shards,
    megatron_boxes,
    megatron_shards,
    owned_boxes,
    pipeline_layers,
)

D, HD, F, FE, V, LAYERS = 16, 8, 24, 12, 97, 4


def moe_config(**overrides) -> Qwen3MoeConfig:
    sizes = dict(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        moe_intermediate_size=FE,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=HD,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    return Qwen3MoeConfig(**sizes | overrides)


def dense_config(**overrides) -> Qwen3Config:
    sizes = dict(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=HD,
    )
    return Qwen3Config(**sizes | overrides)


CONFIGS = {
    "moe": moe_config(),
    "moe_tied": moe_config(tie_word_embeddings=True),
    "moe_dense_layers": moe_config(mlp_only_layers=[0], decoder_sparse_step=2, attention_bias=True),
    "moe_one_group": moe_config(num_attention_heads=4, num_key_value_heads=1),  # tp=4: a rank holds 1.5 heads
    "moe_two_groups": moe_config(num_key_value_heads=2),
}
DENSE_CONFIGS = {
    "dense": dense_config(),
    "dense_tied_bias": dense_config(tie_word_embeddings=True, attention_bias=True),
}
LAYOUTS = [
    dict(),
    dict(tp=2),
    dict(tp=4),
    dict(pp=2),
    dict(pp=4),
    dict(pp=2, vpp=2),
    dict(tp=2, pp=2, vpp=2),
    dict(dp=2),
    dict(cp=2),
    dict(tp=2, cp=2, dp=2),
    dict(dp=2, ep=2),
    dict(dp=4, ep=4),
    dict(tp=2, ep=2),
    dict(tp=2, dp=2, ep=2, etp=2),
    dict(tp=4, ep=2, etp=2),
    dict(tp=2, etp=2),
    dict(tp=4, ep=4),
    dict(cp=2, dp=2, ep=2, etp=2),
    dict(tp=2, pp=2, dp=2, ep=2, etp=2),
    dict(tp=2, pp=2, vpp=2, dp=4, ep=4),
]


def random_hf(config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in hf_shapes(config).items()}


def by_hand(
    hf: dict[str, torch.Tensor], config, layout: ParallelLayout, rank: int
) -> dict[tuple[int, str], torch.Tensor]:
    """(chunk, name) -> what Megatron's layers hold, by concatenating and chunking as their forward passes split."""
    at, tp = layout.coords(rank), layout.tp
    groups = config.num_key_value_heads

    def rows(x):
        return x.chunk(tp, 0)[at.tp]

    def vocabulary(x):
        padding = torch.full((-len(x) % tp, x.shape[1]), float("nan"))
        return rows(torch.cat([x, padding]))

    def mlp(prefix, out, size, index, fc1, fc2):
        gate, up = (hf[f"{prefix}.{x}_proj.weight"].chunk(size, 0)[index] for x in ("gate", "up"))
        out[fc1], out[fc2] = torch.cat([gate, up]), hf[f"{prefix}.down_proj.weight"].chunk(size, 1)[index]

    def layer(number):
        name, out = f"model.layers.{number}.", {}
        for kind in ("weight", "bias"):
            if f"{name}self_attn.q_proj.{kind}" in hf:
                parts = [hf[f"{name}self_attn.{x}_proj.{kind}"].unflatten(0, (groups, -1)) for x in "qkv"]
                out[f"self_attention.linear_qkv.{kind}"] = rows(torch.cat(parts, 1).flatten(0, 1))
        if f"{name}self_attn.o_proj.bias" in hf:
            out["self_attention.linear_proj.bias"] = hf[f"{name}self_attn.o_proj.bias"]
        out["self_attention.linear_proj.weight"] = hf[f"{name}self_attn.o_proj.weight"].chunk(tp, 1)[at.tp]
        out["self_attention.q_layernorm.weight"] = hf[f"{name}self_attn.q_norm.weight"]
        out["self_attention.k_layernorm.weight"] = hf[f"{name}self_attn.k_norm.weight"]
        out["input_layernorm.weight"] = hf[f"{name}input_layernorm.weight"]
        out["pre_mlp_layernorm.weight"] = hf[f"{name}post_attention_layernorm.weight"]
        if f"{name}mlp.gate.weight" not in hf:
            mlp(f"{name}mlp", out, tp, at.tp, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
            return out
        out["mlp.router.weight"] = hf[f"{name}mlp.gate.weight"]
        count = config.num_experts // layout.ep
        for i in range(count):
            fc = [f"mlp.experts.linear_fc{n}.weight{i}" for n in (1, 2)]
            mlp(f"{name}mlp.experts.{at.ep * count + i}", out, layout.etp, at.etp, *fc)
        return out

    # Interleaving: the chunks of all stages, one stage after the other, are consecutive runs of layers.
    runs = torch.arange(LAYERS).chunk(layout.pp * layout.vpp)
    out = {}
    for chunk in range(layout.vpp):
        for local, number in enumerate(runs[chunk * layout.pp + at.pp].tolist()):
            out |= {(chunk, f"decoder.layers.{local}.{name}"): x for name, x in layer(number).items()}
    if at.pp == 0:
        out[0, "embedding.word_embeddings.weight"] = vocabulary(hf["model.embed_tokens.weight"])
    if at.pp == layout.pp - 1:
        out[layout.vpp - 1, "decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not config.tie_word_embeddings:
            out[layout.vpp - 1, "output_layer.weight"] = vocabulary(hf["lm_head.weight"])
        elif layout.pp > 1:
            out[layout.vpp - 1, "output_layer.weight"] = vocabulary(hf["model.embed_tokens.weight"])
    return out


def bind_rank(config, layout, rank):
    """Parameters full of NaN and their shards."""
    places = megatron_boxes(config, layout, rank)
    params = {(p.chunk, p.params[0]): torch.full(p.param_shape, float("nan")) for p in places}
    return params, [p.bind(params[p.chunk, p.params[0]]) for p in places]


CASES = [(name, axes) for name in CONFIGS for axes in LAYOUTS]
CASES += [(name, axes) for name in DENSE_CONFIGS for axes in LAYOUTS if not {"ep", "etp"} & axes.keys()]


@pytest.mark.parametrize(("name", "axes"), CASES, ids=lambda x: x if isinstance(x, str) else str(ParallelLayout(**x)))
def test_hf_to_megatron_and_back(name, axes):
    config = CONFIGS.get(name) or DENSE_CONFIGS[name]
    layout = ParallelLayout(**axes)
    hf = random_hf(config)
    everyone = []
    for rank in range(layout.world_size):
        params, shards = bind_rank(config, layout, rank)
        plan(hf_shards(config, hf), shards).execute_local()
        expected = by_hand(hf, config, layout, rank)
        assert params.keys() == expected.keys()
        for key, param in params.items():
            torch.testing.assert_close(
                param, expected[key], rtol=0, atol=0, equal_nan=True, msg=f"{key} on rank {rank}"
            )
        everyone += shards
    back = {key: torch.full_like(x, float("nan")) for key, x in hf.items()}
    export = plan(everyone, hf_shards(config, back, rank=-1))  # rank -1: outside the trainer, takes from owners only
    export.execute_local()
    assert all(torch.equal(back[key], hf[key]) for key in hf)
    assert export.bytes == 4 * sum(x.numel() for x in hf.values())


@pytest.mark.parametrize("source", [dict(tp=2, ep=2), dict(pp=2, vpp=2, dp=4, ep=4), dict(tp=4, dp=2, ep=2, etp=2)])
@pytest.mark.parametrize("target", [dict(tp=2, pp=2, dp=2, ep=4), dict(dp=2, ep=2), dict(tp=4, etp=4)])
def test_megatron_to_megatron(source, target):
    config = CONFIGS["moe_tied"]
    hf = random_hf(config)
    source, target = ParallelLayout(**source), ParallelLayout(**target)
    held = [s for rank in range(source.world_size) for s in bind_rank(config, source, rank)[1]]
    plan(hf_shards(config, hf), held).execute_local()
    for rank in range(target.world_size):
        params, shards = bind_rank(config, target, rank)
        plan(held, shards).execute_local()
        for key, expected in by_hand(hf, config, target, rank).items():
            torch.testing.assert_close(params[key], expected, rtol=0, atol=0, equal_nan=True, msg=str(key))


def test_owners_write_every_tensor_once():
    config, layout = CONFIGS["moe_tied"], ParallelLayout(tp=2, pp=2, cp=2, dp=2, ep=2, etp=2)
    owned = owned_boxes(config, layout)
    all_owned = [b for rank in range(layout.world_size) for b in megatron_boxes(config, layout, rank) if not b.replica]
    assert owned == all_owned
    assert plan(owned, hf_regions(config), itemsize=2).bytes == 2 * sum(
        torch.Size(spec.shape).numel() for spec in hf_shapes(config).values()
    )
    norms = Counter(b.rank for b in owned if b.hf_name == "model.layers.0.input_layernorm.weight")
    assert norms == {0: 1}
    # Rank 8 * pp + 4 * dp + 2 * cp + tp; experts see rank 8 * pp + 4 * edp + 2 * ep + etp.
    halves = {b.rank: b.box[0] for b in owned if b.hf_name == "model.layers.3.mlp.experts.3.up_proj.weight"}
    assert halves == {10: (0, FE // 2), 11: (FE // 2, FE)}


def test_names_and_shapes_of_a_checkpoint():
    shapes = {name: spec.shape for name, spec in hf_shapes(CONFIGS["moe_dense_layers"]).items()}
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (F, D)  # listed in mlp_only_layers
    assert shapes["model.layers.2.mlp.down_proj.weight"] == (D, F)  # decoder_sparse_step=2 keeps layers 1 and 3
    assert shapes["model.layers.3.mlp.experts.3.down_proj.weight"] == (D, FE)
    assert shapes["model.layers.3.mlp.gate.weight"] == (4, D)
    assert shapes["model.layers.1.self_attn.k_proj.bias"] == (4 * HD,)
    assert shapes["lm_head.weight"] == (V, D)
    assert "lm_head.weight" not in hf_shapes(CONFIGS["moe_tied"])
    assert hf_shapes(moe_config(dtype="bfloat16"))["lm_head.weight"].dtype is torch.bfloat16


def region(box, rank=0, replica=False, factors=((4,), (6,)), name="w"):
    return Region(hf_name=name, factors=factors, box=box, rank=rank, replica=replica)


def test_plan_by_hand():
    left, right = region(((0, 4), (0, 3)), rank=0), region(((0, 4), (3, 6)), rank=1)
    made = plan([left, right], [region(((1, 3), (2, 6)), rank=2)], itemsize=2)
    assert [c.box for c in made.copies] == [((1, 3), (2, 3)), ((1, 3), (3, 6))]
    assert made.copies[0].src_index == (slice(1, 3), slice(2, 3))
    assert made.copies[1].src_index == (slice(1, 3), slice(0, 3))
    assert made.copies[1].dst_index == (slice(0, 2), slice(1, 4))
    assert made.bytes == 16
    assert made.peers == {(0, 2): 4, (1, 2): 12}
    assert str(made) == "2 copies, 16 bytes\n  rank 0 -> rank 2: 4 bytes\n  rank 1 -> rank 2: 12 bytes"


def test_plan_takes_from_the_same_rank_where_it_can():
    full = ((0, 4), (0, 6))
    made = plan([region(full, rank=0), region(full, rank=1, replica=True)], [region(((0, 2), (0, 6)), rank=1)], 1)
    assert made.peers == {(1, 1): 12}


def test_plan_errors_name_the_tensor():
    target = [region(((0, 4), (0, 6)), rank=3)]
    left, right = region(((0, 4), (0, 3))), region(((0, 4), (2, 6)), rank=1)
    with pytest.raises(ValueError, match=r"'w'.*12 of 24 elements needed by rank 3 have no source"):
        plan([left], target, 4)
    with pytest.raises(ValueError, match=r"'w': 24 of 24 elements"):
        plan([region(((0, 4), (0, 6)), replica=True)], target, 4)
    with pytest.raises(ValueError, match=r"'w' is written twice: ranks 0 and 1"):
        plan([left, right], target, 4)
    with pytest.raises(ValueError, match=r"'w' is \(\(2, 2\), \(6,\)\) on rank 0"):
        plan([region(((0, 2), (0, 2), (0, 6)), factors=((2, 2), (6,)))], target, 4)


def test_layouts_that_do_not_fit_name_the_tensor():
    with pytest.raises(ValueError, match=r"mlp.experts.*4 experts cannot be divided over ep=3"):
        megatron_boxes(CONFIGS["moe"], ParallelLayout(dp=3, ep=3), 0)
    with pytest.raises(ValueError, match=r"q_proj.*tp=3.*4 key/value heads and 3 ranks"):
        megatron_boxes(CONFIGS["moe"], ParallelLayout(tp=3), 0)
    with pytest.raises(ValueError, match=r"gate_proj.*etp=5.*12 cannot be divided over 5"):
        megatron_boxes(CONFIGS["moe"], ParallelLayout(dp=5, etp=5), 0)
    with pytest.raises(ValueError, match=r"4 layers are fewer than the pp=3 x vpp=2 pipeline chunks"):
        megatron_boxes(CONFIGS["moe"], ParallelLayout(pp=3, vpp=2), 0)
    with pytest.raises(ValueError, match=r"model type 'gpt2'; supported: deepseek_v3, .*, qwen3_moe"):
        hf_shapes(GPT2Config())


def test_layers_that_do_not_divide_go_to_the_first_chunks():
    assert [pipeline_layers(61, ParallelLayout(pp=4), pp) for pp in (0, 1, 3)] == [
        [range(0, 16)],
        [range(16, 31)],
        [range(46, 61)],
    ]
    interleaved = ParallelLayout(pp=2, vpp=2)
    assert pipeline_layers(5, interleaved, 0) == [range(0, 2), range(3, 4)]
    assert pipeline_layers(5, interleaved, 1) == [range(2, 3), range(4, 5)]


def test_router_bias_keeps_its_dtype():
    """It decides by differences of 1e-3 which experts are chosen; bf16 would round them away."""
    shapes = hf_shapes(AutoConfig.for_model("deepseek_v3", **FAMILIES["deepseek_v3"]), torch.bfloat16)
    kept = {name for name, spec in shapes.items() if spec.dtype is torch.float32}
    assert kept == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2, 3)}


def test_hf_side_checks_names_and_shapes():
    tensors = random_hf(CONFIGS["moe"])
    tensors["model.norm.weight"] = torch.zeros(D + 1)
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \(17,\), the model needs \(16,\)"):
        hf_shards(CONFIGS["moe"], tensors)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match="'model.norm.weight' is missing"):
        hf_shards(CONFIGS["moe"], tensors)


class Groups:
    rank, layout = 0, ParallelLayout()


def model_like(params: dict[tuple[int, str], torch.Tensor]) -> nn.Module:
    """Modules with the names of Megatron's parameters."""
    root = nn.Module()
    for (_, name), tensor in params.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(tensor))
    layers = nn.ModuleList(getattr(root.decoder.layers, str(i)) for i in range(LAYERS))
    for number, layer in enumerate(layers):
        layer.layer_number = number + 1
    root.decoder.layers = layers
    return root


def test_live_views_write_the_parameters():
    config, hf = CONFIGS["moe"], random_hf(CONFIGS["moe"])
    model = model_like(bind_rank(config, Groups.layout, 0)[0])
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel does
    plan(hf_shards(config, hf), megatron_shards([wrapped], config, Groups)).execute_local()
    expected = by_hand(hf, config, Groups.layout, 0)
    assert {name for name, _ in model.named_parameters()} == {name for _, name in expected}
    assert all(torch.equal(p, expected[0, name]) for name, p in model.named_parameters())


def test_transformer_engine_names_are_found():
    config = CONFIGS["moe_dense_layers"]
    params, _ = bind_rank(config, Groups.layout, 0)
    fused = {}
    for (chunk, name), tensor in params.items():
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        if (chunk, name.replace("pre_mlp_layernorm.weight", "mlp.router.weight")) not in params:
            name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        fused[chunk, name] = tensor
    assert len(fused) == len(params)
    assert (0, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight") in fused
    hf = random_hf(config)
    plan(hf_shards(config, hf), megatron_shards([model_like(fused)], config, Groups)).execute_local()
    norm = fused[0, "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"]
    assert torch.equal(norm, hf["model.layers.0.post_attention_layernorm.weight"])


def test_live_model_errors_name_the_parameter():
    config = CONFIGS["moe"]
    params, _ = bind_rank(config, Groups.layout, 0)
    extra = model_like(params | {(0, "decoder.layers.2.mlp.surprise"): torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no row of the weight table.*decoder.layers.2.mlp.surprise \(1 in all\)"):
        megatron_shards([extra], config, Groups)
    name = "decoder.layers.1.mlp.router.weight"
    with pytest.raises(ValueError, match=rf"no parameter '{name}' for 'model.layers.1.mlp.gate.weight'"):
        megatron_shards([model_like({k: v for k, v in params.items() if k[1] != name})], config, Groups)
    with pytest.raises(ValueError, match=rf"'{name}'.*has shape \(16, 4\).*expects \(4, 16\)"):
        megatron_shards([model_like(params | {(0, name): params[0, name].T})], config, Groups)
