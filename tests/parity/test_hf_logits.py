"""Logits of the Megatron policy equal those of transformers in fp32, packed or not, under every kind of sharding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import python_path
from tiny_models import save_tiny_hf
from torch import Tensor
from transformers import AutoModelForCausalLM
from worlds import free_ports

from mcore_rl.config import ModelConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.heads import PackedSeqParams, PolicyModel
from mcore_rl.parallel import groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards

TOLERANCE = 1e-5
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
MODELS = {
    "moe": dict(moe=True),
    "moe_unnormalised": dict(moe=True, norm_topk_prob=False),
    "moe_every_second_layer": dict(moe=True, decoder_sparse_step=2),
    "moe_one_dense_layer": dict(moe=True, mlp_only_layers=[2], norm_topk_prob=False),
    "moe_single_expert": dict(moe=True, num_experts_per_tok=1, norm_topk_prob=False),
    "dense": dict(moe=False),
    "dense_tied": dict(moe=False, tie_word_embeddings=True),
    "dense_own_rope_and_eps": dict(moe=False, rope_parameters=PLAIN_ROPE, rms_norm_eps=1e-2, head_dim=16),
    "dense_bias": dict(moe=False, attention_bias=True),
    "qwen2": dict(family="qwen2"),
    "qwen2_moe": dict(family="qwen2_moe"),
    "qwen2_moe_dense_layer": dict(family="qwen2_moe", mlp_only_layers=[1], norm_topk_prob=True, qkv_bias=False),
    "llama": dict(family="llama", tie_word_embeddings=True),
    "llama_bias": dict(family="llama", attention_bias=True),
    "llama3": dict(family="llama", rope_parameters=LLAMA3_ROPE, max_position_embeddings=131_072),
    "mixtral": dict(family="mixtral"),
    "olmoe": dict(family="olmoe"),
    "olmoe_grouped": dict(family="olmoe", num_key_value_heads=2, norm_topk_prob=True),
    "deepseek_v3": dict(family="deepseek_v3"),
    "deepseek_v3_whole_queries": dict(family="deepseek_v3", q_lora_rank=None, num_experts_per_tok=1, topk_group=1)
    | dict(n_group=1, norm_topk_prob=False),
    "deepseek_v3_plain_rope": dict(family="deepseek_v3", rope_parameters=PLAIN_ROPE),
}


@pytest.fixture(scope="module")
def one_rank():
    yield groups.init(ParallelLayout(), timeout_s=60, seed=0)
    groups.destroy()


def policy(path: Path, at: groups.Groups, hf_config=None, **model) -> PolicyModel:
    hf_config = hf_config or read_hf_config(path)
    chunks = build_model(hf_config, ModelConfig(path=str(path), **model), at)
    load_hf(path, megatron_shards(chunks, hf_config, at))
    (chunk,) = chunks
    return chunk


def packed_params(lengths: list[int]) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)


def logits(model: PolicyModel, ids: Tensor, lengths: list[int] | None = None) -> Tensor:
    """[b, s, V] of ids [b, s]; with lengths, ids [1, t] hold that many sequences."""
    if lengths is None:
        hidden = model(ids, torch.arange(ids.shape[1]).expand_as(ids))
    else:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        hidden = model(ids, positions, packed_seq_params=packed_params(lengths))
    return (hidden @ model.output_weight().T).transpose(0, 1)[..., :97]


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_transformers(name, one_rank, tmp_path):
    path = save_tiny_hf(tmp_path, **MODELS[name])
    ids = random_ids(2, 33)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    assert (logits(policy(path, one_rank), ids) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("olmoe", "model.layers.1.self_attn.q_norm.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("qwen2_moe", "model.layers.1.self_attn.k_proj.bias"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_a_layernorm.weight"),
    ],
)
@torch.no_grad()
def test_every_kind_of_tensor_shows(family, tensor, one_rank, tmp_path):
    """Its values in another order change the logits, so the comparison would see a wrong mapping of it."""
    path, ids = save_tiny_hf(tmp_path, family=family), random_ids(2, 33)
    model = policy(path, one_rank)
    right = logits(model, ids)
    (shard,) = [s for s in megatron_shards([model], read_hf_config(path), one_rank) if s.hf_name == tensor]
    shard.view.copy_(shard.view.flip(-1).clone())
    assert (logits(model, ids) - right).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_normalisation_of_router_probabilities_shows(one_rank, tiny_moe_dir):
    """The tolerance is worth something: the other meaning of norm_topk_prob is far outside it."""
    ids, hf_config = random_ids(2, 33), read_hf_config(tiny_moe_dir)
    right = logits(policy(tiny_moe_dir, one_rank), ids)
    hf_config.norm_topk_prob = False
    assert (logits(policy(tiny_moe_dir, one_rank, hf_config), ids) - right).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("lengths", [[9, 17, 1, 9, 24, 8], [12, 12, 12], [40], [7, 5], [1, 1, 2]], ids=str)
def test_packed_sequences_equal_separate_ones(lengths, one_rank, tiny_moe_dir):
    """Values and gradients: no token sees another sequence, none of the padding inside counts."""
    model, ids = policy(tiny_moe_dir, one_rank), random_ids(1, sum(lengths))
    weight = model.decoder.layers[0].self_attention.linear_qkv.weight
    packed = logits(model, ids, lengths)
    (packed_grad,) = torch.autograd.grad(packed.square().sum(), weight)
    separate = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    (separate_grad,) = torch.autograd.grad(separate.square().sum(), weight)
    assert (packed - separate).abs().max() <= TOLERANCE
    torch.testing.assert_close(packed_grad, separate_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute, one_rank, tiny_moe_dir):
    def gradients(recompute: str) -> list[Tensor]:
        model = policy(tiny_moe_dir, one_rank, recompute=recompute).train()
        logits(model, random_ids(1, 30), [9, 17, 4]).square().sum().backward()
        return [weight.grad for weight in model.parameters()]

    for kept, recomputed in zip(gradients("none"), gradients(recompute), strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


@torch.no_grad()
def test_bfloat16(one_rank, tiny_moe_dir):
    ids = random_ids(2, 33)
    model = policy(tiny_moe_dir, one_rank, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    seen = []
    model.decoder.layers[0].mlp.router.register_forward_hook(lambda router, args, out: seen.append(out[0].dtype))
    expected = AutoModelForCausalLM.from_pretrained(tiny_moe_dir, dtype=torch.float32)(ids).logits
    # A token whose second and third expert are close may be routed otherwise: compare the bulk.
    assert (logits(model, ids).float() - expected).abs().median() < 0.02
    assert seen == [torch.float32]


@pytest.mark.parametrize("family", ["deepseek_v3", "olmoe"])
@torch.no_grad()
def test_packed_sequences_of_other_attentions(family, one_rank, tmp_path):
    model, lengths = policy(save_tiny_hf(tmp_path, family=family), one_rank), [9, 17, 1, 9]
    ids = random_ids(1, sum(lengths))
    separate = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    assert (logits(model, ids, lengths) - separate).abs().max() <= TOLERANCE


QWEN3 = {
    2: [
        ("moe", axes) for axes in (dict(ep=2, dp=2), dict(tp=2, ep=2), dict(tp=2, etp=2), dict(pp=2, vpp=2), dict(cp=2))
    ]
    + [("tied", dict(pp=2)), ("tied", dict(tp=2))],
    4: [
        ("moe", axes) for axes in (dict(tp=2, dp=2, ep=2, etp=2), dict(tp=2, pp=2, ep=2), dict(tp=4), dict(cp=2, tp=2))
    ],
}
UNEVEN = dict(num_hidden_layers=3)
OTHERS = {
    "llama": dict(family="llama", attention_bias=True) | UNEVEN,
    "qwen2_moe": dict(family="qwen2_moe") | UNEVEN,
    "mixtral": dict(family="mixtral") | UNEVEN,
    "olmoe": dict(family="olmoe") | UNEVEN,
    "deepseek_v3": dict(family="deepseek_v3", num_hidden_layers=5),
}
LAYOUTS_OF_OTHERS = {
    "llama": [dict(tp=2), dict(pp=2)],
    "qwen2_moe": [dict(tp=2, ep=2)],
    "olmoe": [dict(tp=2, ep=2)],
    "deepseek_v3": [dict(tp=2, ep=2), dict(pp=2, vpp=2), dict(cp=2, ep=2)],
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_logits_equal_transformers(ranks, tiny_moe_dir, tiny_tied_dir, tmp_path):
    """With four ranks also more tensor ranks than key/value heads."""
    paths = {"moe": tiny_moe_dir, "tied": tiny_tied_dir}
    check_sharded(ranks, [(paths[name], axes) for name, axes in QWEN3[ranks]], tmp_path)


def test_sharded_logits_of_other_families(tmp_path):
    """Tensor, expert, context and pipeline ranks, the latter with a number of layers that they do not divide."""
    jobs = []
    for name, layouts in LAYOUTS_OF_OTHERS.items():
        path = save_tiny_hf(tmp_path / name, **OTHERS[name])
        jobs += [(path, axes) for axes in layouts]
    check_sharded(2, jobs, tmp_path)


@pytest.mark.slow
def test_sharded_logits_of_other_families_on_four(tmp_path):
    jobs = []
    for name, model in OTHERS.items():
        path = save_tiny_hf(tmp_path / name, **model)
        dense = name == "llama"
        jobs.append((path, dict(tp=2, pp=2) if dense else dict(tp=2, pp=2, ep=2)))
        jobs.append((path, dict(tp=4) if dense else dict(tp=2, dp=2, ep=2, etp=2)))
        jobs += [(path, dict(tp=4, ep=4)), (path, dict(dp=4, ep=4))] if not dense else []
    jobs = [(path, axes) for path, axes in jobs if (path.name, axes.get("ep")) != ("olmoe", 4) or "tp" not in axes]
    check_sharded(4, jobs, tmp_path)


def check_sharded(ranks: int, jobs: list[tuple[Path, dict]], scratch: Path) -> None:
    """Weights from HF files, and from a checkpoint that the layout before has written."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    worker = Path(__file__).with_name("logits_worker.py")
    done = subprocess.run(
        [
            *torchrun,
            str(worker),
            str(scratch),
            json.dumps([(str(path), axes, port) for (path, axes), port in zip(jobs, free_ports(len(jobs)))]),
        ],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 2 * len(jobs) - len({path for path, _ in jobs})
    for report in reports:
        assert report["max_diff"] <= TOLERANCE, report
