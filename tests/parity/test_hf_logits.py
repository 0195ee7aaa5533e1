"""Logits of the Megatron policy equal those of transformers in fp32, packed or not, under every kind of sharding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_hf
from torch import Tensor
from transformers import AutoModelForCausalLM

from mcore_rl.config import ModelConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.heads import PackedSeqParams, PolicyModel
from mcore_rl.parallel import groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.hf_io import load_hf
from mcore_rl.weights.shards import megatron_shards

TOLERANCE = 1e-5
FAMILIES = {
    "moe": dict(moe=True),
    "moe_unnormalised": dict(moe=True, norm_topk_prob=False),
    "moe_every_second_layer": dict(moe=True, decoder_sparse_step=2),
    "moe_one_dense_layer": dict(moe=True, mlp_only_layers=[2], norm_topk_prob=False),
    "moe_single_expert": dict(moe=True, num_experts_per_tok=1, norm_topk_prob=False),
    "dense": dict(moe=False),
    "dense_tied": dict(moe=False, tie_word_embeddings=True),
    "dense_own_rope_and_eps": dict(
        moe=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-2, head_dim=16
    ),
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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(family, one_rank, tmp_path):
    path = save_tiny_hf(tmp_path, **FAMILIES[family])
    ids = random_ids(2, 33)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    assert (logits(policy(path, one_rank), ids) - expected).abs().max() <= TOLERANCE


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


MOE = [dict(ep=2, dp=2), dict(tp=2, ep=2), dict(tp=2, etp=2), dict(pp=2, vpp=2), dict(cp=2)]
TIED = [dict(pp=2), dict(tp=2)]
MOE_ON_FOUR = [dict(tp=2, dp=2, ep=2, etp=2), dict(tp=2, pp=2, ep=2)]


@pytest.mark.parametrize(("ranks", "moe", "tied"), [(2, MOE, TIED), (4, MOE_ON_FOUR, [])], ids=["2", "4"])
def test_sharded_logits_equal_transformers(ranks, moe, tied, tiny_moe_dir, tiny_tied_dir, tmp_path):
    """Weights from HF files, and from a checkpoint that the layout before has written."""
    jobs = [(str(tiny_moe_dir), layout) for layout in moe] + [(str(tiny_tied_dir), layout) for layout in tied]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    worker = Path(__file__).with_name("logits_worker.py")
    done = subprocess.run(
        [*torchrun, str(worker), str(tmp_path), json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 2 * len(jobs) - bool(moe) - bool(tied)
    for report in reports:
        assert report["max_diff"] <= TOLERANCE, report
