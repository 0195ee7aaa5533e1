"""Routing replay: what is refused before a run, and routes on their way into packed batches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_hf

from mcore_rl.algorithms import load
from mcore_rl.config import parse_config
from mcore_rl.data.scores import batch_of
from mcore_rl.data.sequences import Sample, sequences_of
from mcore_rl.model.build import read_hf_config, transformer_config
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.check_models import check_routing
from mcore_rl.roles.policy import router_header
from mcore_rl.types import PolicyOutput, Prompt, RolloutGroup, Trajectory
from tools.bench.batches import pack_mini_batch

MOE = SimpleNamespace(num_experts=8, model_type="qwen3_moe")
DENSE = SimpleNamespace(model_type="qwen3")


def config(algorithm: str = "grpo", **sections):
    return parse_config({"name": "x", "model": {"path": "x"}, "algorithm": {"name": algorithm}} | sections)


def test_routing_replay_that_cannot_be_is_refused():
    for mode in ("old", "rollout"):
        replaying = config(moe={"routing_replay": mode})
        check_routing(replaying, load("grpo"), MOE)
        with pytest.raises(ValueError, match=f"moe.routing_replay='{mode}': qwen3 has no experts"):
            check_routing(replaying, load("grpo"), DENSE)
        with pytest.raises(ValueError, match="algorithm.name='dpo' samples no rollouts"):
            check_routing(config("dpo", moe={"routing_replay": mode}), load("dpo"), MOE)
    watched = config(moe={"log_every": 5}, model={"path": "x", "freeze_router": True})
    with pytest.raises(ValueError, match="moe.log_every=5, model.freeze_router=true: qwen3 has no experts"):
        check_routing(watched, load("grpo"), DENSE)
    with pytest.raises(ValueError, match="routing_replay='engine'.*'none', 'old' or 'rollout'"):
        config(moe={"routing_replay": "engine"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU engine returns routes whatever its tensor parallelism")
def test_an_engine_that_cannot_return_routes_is_refused():
    replaying = config(moe={"routing_replay": "rollout"}, rollout={"tensor_parallel_size": 2, "placement": "child"})
    with pytest.raises(ValueError, match="rollout.tensor_parallel_size=2: on a CPU"):
        check_routing(replaying, load("grpo"), MOE)


def routed(tokens: int, first: int) -> np.ndarray:
    """[tokens, 2, 2] over 8 experts: token t's layer l has experts first + t and first + t + l + 1."""
    t, layer = torch.arange(tokens)[:, None], torch.arange(2)[None]
    return torch.stack([(first + t + 0 * layer) % 8, (first + t + layer + 1) % 8], dim=-1).to(torch.uint8).numpy()


def test_routes_follow_their_tokens_and_fill_the_padding():
    samples = [
        Sample((5, 6, 7, 1), 2, 0.5, (-0.1, -0.2), expert_ids=routed(3, 0)),
        Sample((8, 9, 1), 1, -1.0, (-0.3,), expert_ids=routed(2, 5)),
    ]
    batch = batch_of(samples, [0.25, 0.5], multiple=8)
    assert batch.rollout_expert_ids.shape == (8, 2, 2) and batch.rollout_expert_ids.dtype == torch.uint8
    assert np.array_equal(batch.rollout_expert_ids[:3], routed(3, 0))
    assert np.array_equal(batch.rollout_expert_ids[3:5], routed(2, 5))
    assert torch.equal(batch.rollout_expert_ids[5:], batch.rollout_expert_ids[:3])
    assert batch.expert_ids is None  # nothing is replayed that was not asked for
    with pytest.raises(AssertionError, match="others none"):
        batch_of([samples[0], replace(samples[1], expert_ids=None)], [0.25, 0.5])


def test_routes_survive_sampling_balancing_and_idle_ranks():
    trajectory = Trajectory((1, 2), (3, 4), (-0.1, -0.2), "stop", 0, reward=1.0, expert_ids=routed(3, 1))
    group = RolloutGroup(Prompt("0", (1, 2), "x"), (trajectory, replace(trajectory, reward=0.0)))
    samples = sequences_of([group], load("grpo"))
    for rank in range(3):
        (batch,) = pack_mini_batch(samples, load("grpo"), rank=rank, num_ranks=3, budget=10, max_response=8, multiple=4)
        rows = routed(3, 1)[[0, 1, 2, 0] if batch.loss_mask.any() else [0] * 4]
        assert np.array_equal(batch.rollout_expert_ids, rows), "an idle rank takes routes that there are"


def test_what_happens_to_the_routers_is_told(tiny_moe_dir, tiny_dense_dir):
    """Off by default in RL: auxiliary losses and updates of the experts' biases; the router is in fp32."""

    def header(folder, **model) -> str:
        asked = config(model={"path": str(folder)} | model)
        return router_header(asked, transformer_config(read_hf_config(folder), asked.model, ParallelLayout()))

    assert header(tiny_dense_dir) == ""
    plain = "router weights trained, aux loss 0, z-loss 0, expert bias frozen, router in fp32, output head in"
    for model, head in (({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16"), ({"fp32_head": True}, "fp32")):
        assert header(tiny_moe_dir, **model) == f"routers: 8 experts, top-2, {plain} {head}, replay none"
    said = header(tiny_moe_dir, freeze_router=True, moe_aux_loss_coef=0.01)
    assert "router weights frozen, aux loss 0.01" in said


def test_the_bias_of_deepseeks_experts_is_frozen(tmp_path):
    folder = save_tiny_hf(tmp_path, family="deepseek_v3")
    transformer = transformer_config(
        read_hf_config(folder), config(model={"path": str(folder)}).model, ParallelLayout()
    )
    assert transformer.moe_router_enable_expert_bias and transformer.moe_router_bias_update_rate == 0
    assert "expert bias frozen" in router_header(config(), transformer)


def test_weights_of_the_router_scale_the_policy_term_only():
    """NaN where nothing was sampled changes nothing; KL and entropy are not weighed."""
    algorithm = load("grpo", kl_coef=0.5, entropy_coef=0.25)
    batch = replace(
        batch_of([Sample((5, 6, 7, 1), 2, 1.0, (-0.1, -0.2))], [0.5]),
        old_logprobs=torch.tensor([0.0, -0.1, -0.2]),
        ref_logprobs=torch.tensor([0.0, -0.3, -0.4]),
    )
    out = PolicyOutput(torch.tensor([0.0, -0.15, -0.1]), torch.tensor([0.0, 1.0, 2.0]))

    def loss(weights):
        return algorithm.loss(replace(batch, router_weights=weights), out)

    whole, none = loss(torch.ones(3)).loss, loss(torch.zeros(3)).loss
    half = loss(torch.tensor([torch.nan, 0.5, 0.5]))
    assert whole == algorithm.loss(batch, out).loss and half.loss.item() == pytest.approx((whole + none).item() / 2)
    assert none.item() != 0 and half.metrics["policy/router_shift_mean"] == 1  # a sum over two tokens
    assert loss(torch.tensor([1.0, 0.0, 1.0])).metrics["policy/router_shift_masked_frac"] == 1


def test_router_shift_that_cannot_be_is_refused():
    weighing = config(moe={"router_shift": True})
    check_routing(weighing, load("grpo"), MOE)
    with pytest.raises(ValueError, match="moe.router_shift=true: qwen3 has no experts"):
        check_routing(weighing, load("grpo"), DENSE)
    with pytest.raises(ValueError, match="algorithm.name='dpo' and its old_logprobs no pass of"):
        check_routing(config("dpo", moe={"router_shift": True}), load("dpo"), MOE)
