"""Routes under every layout: those recorded are Hugging Face's, and given ones are followed, gradients included.

The model has a dense layer between its MoE layers, so that a layer counted wrongly would show. The routes that are
replayed are far from the model's own: a rank that took its own, another token's, another layer's or (recomputing) those
of another micro-batch would be off by orders of magnitude.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from frozen_rollout import from_all_ranks, gather_logprobs, gradients, make_samples, relative, sequences
from tiny_models import save_tiny_hf
from worlds import each_world, run_worlds, slug

EXPERTS, TOP_K, DENSE_LAYER = 8, 2, 1
REFERENCE = dict(layout={}, budget=10_000)
CASES = {
    1: [REFERENCE, dict(layout={}, budget=40, recompute="full")],
    2: [
        dict(layout=dict(dp=2, ep=2), budget=60),
        dict(layout=dict(tp=2), budget=60),
        dict(layout=dict(tp=2, ep=2), budget=60),
        dict(layout=dict(pp=2), budget=60, recompute="full"),
        dict(layout=dict(pp=2, vpp=2), budget=40, recompute="full"),
        dict(layout=dict(cp=2, ep=2), budget=60, recompute="full"),
    ],
    4: [dict(layout=dict(cp=2, tp=2, ep=2), budget=60), dict(layout=dict(cp=2, pp=2), budget=60)],
}


def name_of(case: dict) -> str:
    return "-".join([slug(case["layout"]), *(f"{k}_{case[k]}" for k in ("budget", "recompute") if k in case)])


# ---------------------------------------------------------------------------------------------- one rank of one case


def run_case(case: dict, groups) -> None:
    from mcore_rl import algorithms
    from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig, parse_config
    from mcore_rl.data.scores import Scores
    from mcore_rl.data.sequences import Sequences
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.forward import Policy, forward_backward, forward_only, forward_recorded, routers_of
    from mcore_rl.model.optimizer import build_training
    from mcore_rl.step.batches import deal
    from mcore_rl.step.scoring import mini_batches_of
    from mcore_rl.weights.hf_read import load_hf
    from mcore_rl.weights.shards import megatron_shards
    from mcore_rl.weights.sync import WeightExporter

    hf_config = read_hf_config(case["source"])
    chunks = build_model(hf_config, ModelConfig(path=case["source"], recompute=case.get("recompute", "none")), groups)
    load_hf(case["source"], megatron_shards(chunks, hf_config, groups))
    training = build_training(chunks, OptimizerConfig(), ParallelConfig(), total_steps=100)
    exporter = WeightExporter(chunks, hf_config, groups)
    policy = Policy(training.chunks, groups, hf_config.vocab_size, routers=routers_of(training.chunks, groups))
    algorithm = algorithms.load("grpo", entropy_coef=0.01)
    config = parse_config(
        {
            "name": "x",
            "model": {"path": case["source"]},
            "batch": {"micro_batch_tokens": case["budget"]},
            "rollout": {"max_response_tokens": 16},
        }
    )
    owned = Sequences.of(make_samples() if groups.rank == 0 else [])
    share = deal(SimpleNamespace(config=config, algorithm=algorithm), groups, owned)
    (batches,) = mini_batches_of(groups, share, Scores.of(share.mine))
    natural = [replace(b, old_logprobs=b.rollout_logprobs) for b in batches]
    outputs, recorded = forward_recorded(policy, natural, statistics=True)
    plain = forward_only(policy, natural)
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(outputs, plain, strict=True))
    own = [replace(b, expert_ids=r.expert_ids) for b, r in zip(natural, recorded)]
    for a, b in zip(forward_only(policy, own), plain, strict=True):
        assert torch.equal(a.logprobs, b.logprobs), "z is not 0 under the policy's own routes"

    def grads(batches) -> dict:
        training.zero_grad()
        forward_backward(policy, batches, algorithm.loss)
        return gradients(chunks, exporter)

    own_grads, natural_grads = grads(own), grads(natural)
    assert all(torch.equal(own_grads[name], grad) for name, grad in natural_grads.items())
    foreign = [replace(b, expert_ids=foreign_routes(b)) for b in natural]
    results = {
        "facts": gather_facts(natural, recorded, groups),
        "logprobs": gather_logprobs(policy, foreign, groups),
        "own_logprobs": gather_logprobs(policy, natural, groups),
        "grads": grads(foreign),
        "own_grads": own_grads,
    }
    if groups.rank == 0:
        torch.save(results, case["out"])


def foreign_routes(batch) -> torch.Tensor:
    """[T, L, K], a function of token, position and layer."""
    layer = torch.arange(3)[None]
    first = (5 * batch.token_ids[:, None] + 3 * batch.positions[:, None] + layer) % EXPERTS
    second = first + 1 + (batch.token_ids[:, None] + layer) % (EXPERTS - 1)
    return torch.stack([first, second % EXPERTS], dim=-1).to(torch.uint8)


def gather_facts(batches, recorded, groups) -> dict[tuple, dict[str, torch.Tensor]]:
    """What the routers did, by the targets of each sequence, from all ranks."""
    mine = {}
    for batch, facts in zip(batches, recorded, strict=True):
        for targets, where in sequences(batch) if groups.reports else ():
            mine[targets] = {k: v[where] for k, v in vars(facts).items()}
    return from_all_ranks(mine)


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_tiny_hf(tmp_path_factory.mktemp("routes"), mlp_only_layers=[DENSE_LAYER])


@pytest.fixture(scope="module")
def outcomes(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routes_layouts")
    for ranks, cases in CASES.items():
        run_worlds(__file__, [c | dict(source=str(source), out=str(folder / name_of(c))) for c in cases], ranks)
    return {name_of(c): torch.load(folder / name_of(c), weights_only=False) for cases in CASES.values() for c in cases}


@torch.no_grad()
def hf_facts(source: Path) -> dict[tuple, dict[str, torch.Tensor]]:
    """The same facts from transformers: sorted ids [n, L, K], margins and entropies [n, L] of every sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    facts, seen = {}, []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(
                lambda gate, args, out: seen.append(args[0].flatten(0, -2) @ gate.weight.T)
            )
    for sample in make_samples():
        seen.clear()
        tokens = sample.token_ids.tolist()
        model(torch.tensor([tokens[:-1]]))
        logits = torch.stack(seen, dim=1)
        top, log_p = logits.topk(TOP_K + 1), logits.log_softmax(-1)
        facts[tuple(tokens[1:])] = {
            "expert_ids": top.indices[..., :TOP_K].sort(-1).values,
            "margins": top.values[..., -2] - top.values[..., -1],
            "gates": top.values[..., :TOP_K].softmax(-1),
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_p": log_p.gather(-1, top.indices[..., :TOP_K]),
        }
    return facts


ALL = [c for cases in CASES.values() for c in cases]


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_recorded_routes_are_those_of_hugging_face(case, outcomes, source):
    """0 differences in fp32, and the margins, gates and entropies to rounding."""
    expected, got = hf_facts(source), outcomes[name_of(case)]["facts"]
    assert got.keys() == expected.keys()
    for targets, facts in expected.items():
        found = got[targets]
        assert torch.equal(found["expert_ids"].long().sort(-1).values, facts["expert_ids"])
        for name in ("margins", "gates", "entropy", "log_p"):
            torch.testing.assert_close(found[name], facts[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ALL[1:], ids=name_of)
def test_given_routes_are_followed(case, outcomes):
    got, want = outcomes[name_of(case)], outcomes[name_of(REFERENCE)]
    for key, values in want["logprobs"].items():
        assert got["logprobs"][key] == pytest.approx(values, abs=2e-5)
    for name, grad in want["grads"].items():
        assert relative(got["grads"][name], grad) < 1e-5, name


def test_the_comparison_can_fail(outcomes):
    """The given routes change log-probs and gradients, and the routers get gradients through the gates."""
    want = outcomes[name_of(REFERENCE)]
    moved = [abs(a - b) for k, v in want["logprobs"].items() for a, b in zip(v, want["own_logprobs"][k])]
    assert max(moved) > 0.1
    for name in (n for n in want["grads"] if n.endswith("mlp.gate.weight")):
        assert want["grads"][name].abs().max() > 0 and relative(want["own_grads"][name], want["grads"][name]) > 0.1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    each_world(sys.argv[1], run_case)
