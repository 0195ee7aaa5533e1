"""HF config -> TransformerConfig: every meaning is carried over, what cannot be is refused."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import DENSE, FAMILIES, MOE, YARN
from transformers import AutoConfig, Qwen3Config, Qwen3MoeConfig

from mcore_rl.config import ModelConfig
from mcore_rl.model.build import padded_vocab_size, read_hf_config, transformer_config
from mcore_rl.model.layers import LENGTH_STEP, SegmentBatches
from mcore_rl.parallel.layout import ParallelLayout


def moe_config(**overrides) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**MOE | overrides, architectures=["Qwen3MoeForCausalLM"])


def dense_config(**overrides) -> Qwen3Config:
    return Qwen3Config(**DENSE | overrides, architectures=["Qwen3ForCausalLM"])


LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def family_config(family: str, **overrides):
    names = {"llama": "Llama", "mixtral": "Mixtral", "olmoe": "Olmoe", "deepseek_v3": "DeepseekV3"}
    return AutoConfig.for_model(family, **FAMILIES[family] | overrides, architectures=[f"{names[family]}ForCausalLM"])


def converted(hf_config, layout: ParallelLayout | None = None, **model):
    return transformer_config(hf_config, ModelConfig(path=".", **model), layout or ParallelLayout())


def test_moe_fields():
    config = converted(moe_config(mlp_only_layers=[3]), ParallelLayout(tp=2, ep=2, dp=2), moe_aux_loss_coef=0.01)
    assert (config.num_layers, config.hidden_size, config.kv_channels, config.num_query_groups) == (4, 64, 32, 2)
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (8, 2, 48)
    assert config.moe_layer_freq == [1, 1, 1, 0]
    assert not config.moe_router_pre_softmax and config.moe_router_dtype == "fp32"
    assert (config.moe_router_load_balancing_type, config.moe_aux_loss_coeff) == ("aux_loss", 0.01)
    assert (config.tensor_model_parallel_size, config.expert_model_parallel_size, config.sequence_parallel) == (
        2,
        2,
        True,
    )


def test_sparse_layers_as_transformers_counts_them():
    """transformers: sparse where (layer + 1) % decoder_sparse_step == 0 and layer is not in mlp_only_layers."""
    assert converted(moe_config(decoder_sparse_step=2)).moe_layer_freq == [0, 1, 0, 1]
    assert converted(moe_config(decoder_sparse_step=2, mlp_only_layers=[1])).moe_layer_freq == [0, 0, 0, 1]


def test_router_without_renormalisation():
    assert converted(moe_config(norm_topk_prob=False)).moe_router_pre_softmax


def test_bfloat16_and_recompute():
    config = converted(dense_config(), dtype="bfloat16", recompute="full")
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (torch.bfloat16, torch.bfloat16, True)
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == (
        "full",
        "uniform",
        1,
    )
    assert converted(dense_config(), recompute="selective").recompute_modules == ["core_attn"]


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        (dense_config(hidden_act="gelu"), "hidden_act='gelu'"),
        (dense_config(use_sliding_window=True, sliding_window=16, max_window_layers=2), "sliding_window=16"),
        (
            dense_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "rope_parameters={'rope_type': 'linear'",
        ),
        (moe_config(num_experts_per_tok=1, norm_topk_prob=True), "num_experts_per_tok=1"),
        (family_config("llama", mlp_bias=True), "mlp_bias=True"),
        (
            family_config("llama", rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}),
            "rope_parameters={'rope_type': 'llama3'",
        ),
        (family_config("mixtral", sliding_window=16), "sliding_window=16"),
        (family_config("olmoe", clip_qkv=8.0), "clip_qkv=8.0"),
        (family_config("deepseek_v3", rms_norm_eps=1e-5), "rms_norm_eps=1e-05"),
        (family_config("deepseek_v3", topk_group=1), "topk_group=1"),
        (family_config("deepseek_v3", norm_topk_prob=False), "norm_topk_prob=False"),
        (family_config("deepseek_v3", rope_parameters=YARN | {"mscale": None}), "rope_parameters={'rope_type': 'yarn'"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_what_would_be_computed_wrongly_is_refused(hf_config, message):
    with pytest.raises(ValueError, match="is not supported; use a checkpoint without") as error:
        converted(hf_config)
    assert message in str(error.value)


def test_layout_is_checked():
    with pytest.raises(ValueError, match="parallel.ep=3 must divide the model's num_experts=8"):
        converted(moe_config(), ParallelLayout(ep=3, dp=3))


def test_pipeline_chunks_of_unequal_length():
    layout = converted(moe_config(num_hidden_layers=5), ParallelLayout(pp=2, vpp=2)).pipeline_model_parallel_layout
    assert layout.input_data == [["embedding", "decoder", "decoder"], ["decoder"], ["decoder"], ["decoder", "loss"]]


def test_router_bias_is_left_alone():
    """Megatron would move it by 1e-3 a step to balance the experts, whatever the loss says."""
    config = converted(family_config("deepseek_v3"))
    assert config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate == 0.0


@pytest.mark.parametrize(("tp", "rows"), [(1, 97), (2, 98), (8, 104)])
def test_vocabulary_is_padded_to_tp_only(tp, rows):
    assert padded_vocab_size(dense_config(), ParallelLayout(tp=tp)) == rows


def test_read_hf_config(tiny_moe_dir, tmp_path):
    assert read_hf_config(tiny_moe_dir).num_experts == 8
    with pytest.raises(ValueError, match="model.path='nowhere' does not exist"):
        read_hf_config("nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be used"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="GPT2LMHeadModel.* supported: Qwen3MoeForCausalLM, .*Qwen3ForCausalLM"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("lengths", [[2, 3, 2], [5, 0, 5], [LENGTH_STEP, LENGTH_STEP + 1, 1], [0, 7]], ids=str)
def test_segment_batches_hold_every_token_once(lengths):
    """Each packed token has its place; a batch's row is one segment, in order, then padding."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    batches = SegmentBatches.from_cu_seqlens(bounds.int())
    total = sum(lengths)
    take = torch.arange(total) if batches.take is None else batches.take
    place = torch.arange(total) if batches.place is None else batches.place
    assert take[place].tolist() == list(range(total))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for batch, (count, length) in zip(take.split([c * n for c, n in batches.shapes]), batches.shapes, strict=True):
        for row in batch.view(count, length):
            owner = segment[row[0]]
            real = lengths[owner]
            assert row[:real].tolist() == list(range(bounds[owner], bounds[owner] + real))
            assert (segment[row] == owner).all()


def test_segments_of_one_length_stay_where_they_are():
    assert SegmentBatches.from_cu_seqlens(torch.tensor([0, 3, 6, 9])).take is None
