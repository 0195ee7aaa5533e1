"""The transformers adapter: recorded routes are the model's, replayed ones are used, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES as TINY
from tiny_models import MOE, save_tiny_hf
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from moe.record import hf
from moe.record.trace import RoutingTrace

SEQUENCES = [(3, 5, 7, 11, 13), (2, 4), (6, 1, 9, 9, 8, 7, 30, 31)]
COMMON = {k: MOE[k] for k in ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")}
COMMON |= dict(num_hidden_layers=2, intermediate_size=48, num_experts_per_tok=2)
ONE_GROUP = dict(n_group=1, topk_group=1, num_experts_per_tok=2, num_hidden_layers=3)
FAMILIES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=8, **COMMON)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(num_experts=8, norm_topk_prob=False, pad_token_id=0, **COMMON)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**TINY["deepseek_v3"] | ONE_GROUP)),
    "granite": lambda: GraniteMoeForCausalLM(GraniteMoeConfig(num_local_experts=8, **COMMON)),
}


@pytest.fixture(scope="module")
def model(tiny_moe_dir):
    return hf.load_model(tiny_moe_dir)


def built(family: str):
    torch.manual_seed(0)
    model = FAMILIES[family]().double().eval()
    with torch.no_grad():
        for router in hf.routers_of(model):
            router.weight.normal_()
            for buffer in router.buffers():
                buffer.normal_(std=0.2)
    model.set_experts_implementation("eager")
    return model


def random_routes(trace: RoutingTrace) -> RoutingTrace:
    generator = torch.Generator().manual_seed(0)
    shape = (*trace.expert_ids.shape[:2], trace.num_experts)
    ids = torch.rand(shape, generator=generator).topk(trace.expert_ids.shape[2], dim=-1).indices
    return RoutingTrace(ids, None, None, trace.num_experts, trace.cu_seqlens)


@torch.no_grad()
def test_logprobs_and_routes_are_the_models_own(model, tiny_moe_dir):
    plain = AutoModelForCausalLM.from_pretrained(tiny_moe_dir, dtype=torch.float64)
    plain.set_experts_implementation("eager")  # the default has no float64
    logprobs, trace, logits = hf.forward_with_logits(model, SEQUENCES)
    assert trace.expert_ids.shape == (15, 4, 2) and trace.cu_seqlens.tolist() == [0, 5, 7, 15]
    for i, sequence in enumerate(SEQUENCES):
        out = plain(input_ids=torch.tensor([sequence]), output_router_logits=True)
        expected = out.logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0]
        torch.testing.assert_close(logprobs[i], expected, rtol=0, atol=1e-10)
        rows = slice(*trace.cu_seqlens[i : i + 2].tolist())
        router = torch.stack(out.router_logits, 1)
        torch.testing.assert_close(logits[rows], router, rtol=0, atol=1e-10)
        assert torch.equal(trace.expert_ids[rows].sort(-1).values, router.topk(2, dim=-1).indices.sort(-1).values)
        best = router.topk(3, dim=-1).values
        torch.testing.assert_close(trace.margins[rows], best[..., 1] - best[..., 2], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", *FAMILIES])
def test_replay_of_own_routes_changes_no_bit(family, model):
    model = model if family == "qwen3" else built(family)
    own, trace = hf.forward(model, SEQUENCES)
    again, used = hf.forward(model, SEQUENCES, trace)
    assert all(torch.equal(a, b) for a, b in zip(own, again)) and torch.equal(used.expert_ids, trace.expert_ids)
    assert torch.equal(used.gates, trace.gates)
    other, used = hf.forward(model, SEQUENCES, random_routes(trace))
    assert torch.equal(used.expert_ids, random_routes(trace).expert_ids)
    assert max((a - b).abs().max() for a, b in zip(own, other)) > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(own, hf.forward(model, SEQUENCES)[0]))  # the hooks are gone


@torch.no_grad()
def test_replayed_gates_are_the_softmax_over_the_given_experts(model):
    """Every token through experts 3 and 5 is the model that has these two experts only."""
    _, trace = hf.forward(model, SEQUENCES)
    ids = torch.tensor([5, 3]).expand_as(trace.expert_ids)
    replayed, _ = hf.forward(model, SEQUENCES, RoutingTrace(ids, None, None, 8, trace.cu_seqlens))
    config = copy.deepcopy(model.config)
    config.num_experts = 2
    small = AutoModelForCausalLM.from_config(config)
    state = {
        name: w[[3, 5]] if name.endswith(("gate.weight", "gate_up_proj", "experts.down_proj")) else w
        for name, w in model.state_dict().items()
    }
    small.double().eval().load_state_dict(state)
    small.set_experts_implementation("eager")
    expected, _ = hf.forward(small, SEQUENCES)
    for got, want in zip(replayed, expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # the router's softmax is float32 in both


@torch.no_grad()
def test_chunks_change_nothing_but_rounding(model):
    whole, trace = hf.forward(model, SEQUENCES)
    cut, cut_trace = hf.forward(model, SEQUENCES, chunk_tokens=5)
    assert torch.equal(trace.expert_ids, cut_trace.expert_ids)
    assert max((a - b).abs().max() for a, b in zip(whole, cut)) < 1e-6


def test_gradients_flow_through_a_replayed_pass(model):
    _, trace = hf.forward(model, SEQUENCES)
    logprobs, _ = hf.forward(model, SEQUENCES, random_routes(trace))
    router = hf.routers_of(model)[0].weight
    assert torch.autograd.grad(torch.cat(logprobs).sum(), router)[0].abs().max() > 0


@torch.no_grad()
def test_a_dense_model_has_no_routes(tiny_dense_dir):
    dense = hf.load_model(tiny_dense_dir)
    own, trace = hf.forward(dense, SEQUENCES)
    assert trace.expert_ids.shape == (15, 0, 0)
    again, _ = hf.forward(dense, SEQUENCES, trace)
    assert all(torch.equal(a, b) for a, b in zip(own, again))


@torch.no_grad()
def test_routes_that_do_not_fit_are_refused(model, tmp_path):
    _, trace = hf.forward(model, SEQUENCES)
    with pytest.raises(ValueError, match="routes of 3 sequences, 15 tokens, for 2 sequences, 7 tokens"):
        hf.forward(model, SEQUENCES[:2], trace)
    half = RoutingTrace(trace.expert_ids[:, :2], None, None, 8, trace.cu_seqlens)
    with pytest.raises(ValueError, match="routes of 2 layers for a model with 4 routers"):
        hf.forward(model, SEQUENCES, half)
    with pytest.raises(ValueError, match="config.json"):
        hf.load_model(tmp_path)


@torch.no_grad()
def test_samples_follow_the_model_whatever_the_padding(model):
    """Logits times 1000: sampling is taking the best token, and the best token is known from a plain pass."""
    prompts = [(3, 5, 7), (2,), (6, 1, 9, 9)]
    weight = model.lm_head.weight
    weight.mul_(1000)
    try:
        answers = hf.sample(model, prompts, num_answers=2, max_new_tokens=5, seed=0, batch=4)
        for prompt, pair in zip(prompts, answers):
            assert pair[0] == pair[1] and 1 <= len(pair[0]) <= 5
            tokens = torch.tensor([prompt + pair[0]])
            best = model(input_ids=tokens).logits[0].argmax(-1)
            assert tuple(best[len(prompt) - 1 : -1].tolist()) == pair[0]
    finally:
        weight.div_(1000)
    assert hf.sample(model, prompts, 1, 4, seed=1) != hf.sample(model, prompts, 1, 4, seed=2)


@torch.no_grad()
def test_a_sigmoid_router_is_compared_by_what_it_chooses_by(tmp_path):
    """Sigmoids and bias decide, the sigmoids alone weigh; with groups there is no one margin."""
    model = built("deepseek_v3")
    _, trace, scores = hf.forward_with_logits(model, SEQUENCES)
    assert torch.equal(trace.expert_ids.sort(-1).values, scores.topk(2, dim=-1).indices.sort(-1).values)
    best = scores.topk(3, dim=-1).values
    torch.testing.assert_close(trace.margins, best[..., 1] - best[..., 2])
    bias = torch.stack([router.e_score_correction_bias for router in hf.routers_of(model)])
    logits = (scores - bias).logit()
    assert not torch.equal(logits.topk(2, dim=-1).indices.sort(-1).values, trace.expert_ids.sort(-1).values)
    routes = random_routes(trace)
    chosen = (scores - bias).gather(-1, routes.expert_ids)
    _, used = hf.forward(model, SEQUENCES, routes)
    expected = model.config.routed_scaling_factor * chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(used.gates[:, 0], expected[:, 0].to(used.gates.dtype))  # later layers saw other inputs
    with pytest.raises(ValueError, match="first chooses 2 of 4 groups"):
        hf.load_model(save_tiny_hf(tmp_path, family="deepseek_v3"))
