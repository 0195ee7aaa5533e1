"""The routes vLLM returns with its responses are those of Hugging Face in fp32, 0 differences, however they came about:
several responses of one prompt, blocks out of the prefix cache, preempted requests, new weights, a child process.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, make_prompts, tokens_of
from tiny_models import save_tiny_hf

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.rollout.vllm.server import check_facts, decode_array
from mcore_rl.types import SamplingParams
from moe.record.vllm import RequestRoutes


@torch.no_grad()
def differences(model: torch.nn.Module, groups) -> tuple[int, int]:
    """(token-layers that differ, all of them)."""
    logits, wrong, total = [], 0, 0
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [
        g.register_forward_hook(lambda g, args, out: logits.append(args[0].flatten(0, -2) @ g.weight.T)) for g in gates
    ]
    for trajectory in (t for group in groups for t in group.trajectories):
        logits.clear()
        model(tokens_of(trajectory)[None, :-1])
        expected = torch.stack(logits, dim=1).topk(2).indices.sort(-1).values
        found = torch.from_numpy(trajectory.expert_ids).long().sort(-1).values
        assert found.shape == expected.shape
        wrong += int((found != expected).any(-1).sum())
        total += expected[..., 0].numel()
    for hook in hooks:
        hook.remove()
    return wrong, total


def test_routes_are_those_of_hugging_face(rollout_engine, rollout_dirs):
    """150 tokens are more than a block of the prefix cache, which the responses after the first take from it."""
    prompts = make_prompts([1, 7, 40, 150, 150])
    groups = rollout_engine.generate(prompts, SamplingParams(n=3, max_tokens=24), seed=0)
    stopped = rollout_engine.generate(prompts[:3], SamplingParams(n=8, max_tokens=24, stop=("a", "b")), seed=1)
    assert any(t.finish_reason == "stop" for t in stopped[0].trajectories)
    wrong, total = differences(load_hf(rollout_dirs[0]), [*groups, *stopped])
    assert wrong == 0 and total > 4 * 3 * 300
    assert groups[0].trajectories[0].expert_ids.dtype == np.uint8
    assert differences(load_hf(rollout_dirs[1]), groups)[0] > total / 10  # the comparison can fail


def test_routes_after_a_weight_update_are_of_the_new_weights(rollout_engine, rollout_dirs):
    prompts, params = make_prompts([150, 5]), SamplingParams(n=2, max_tokens=8)
    rollout_engine.generate(prompts, params, seed=0)
    exporter = CheckpointExporter(rollout_dirs[1])
    transfer = connect(rollout_engine, exporter, WeightSyncConfig(backend="shm"), ONE_RANK)
    try:
        transfer.send(1)
        assert differences(load_hf(rollout_dirs[1]), rollout_engine.generate(prompts, params, seed=0))[0] == 0
    finally:
        exporter.tensors = CheckpointExporter(rollout_dirs[0]).tensors
        transfer.send(0)
        transfer.close()


def test_a_child_with_too_little_cache_and_a_dense_layer(tmp_path):
    """Seven blocks hold the keys and values of three or four of the twenty responses: the others are preempted when
    they outgrow a block."""
    source = save_tiny_hf(tmp_path, mlp_only_layers=[1], moe_intermediate_size=64)
    rollout = RolloutConfig(placement="child", kv_cache_gb=0.0018, max_model_len=200)
    engine = open_engine(rollout, WeightSyncConfig(), str(source), "float32", 150, 1, 0, return_routes=True)
    try:
        groups = engine.generate(make_prompts([5, 40, 110, 120, 150]), SamplingParams(n=4, max_tokens=40), seed=3)
    finally:
        engine.close()
    assert groups[0].trajectories[0].expert_ids.shape[1:] == (3, 2)
    assert differences(load_hf(source), groups)[0] == 0


def test_routes_of_a_server():
    """Read as its responses are encoded (vllm/utils/serial_utils.py:67); asked for where it returns none."""
    routes = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
    buffer = io.BytesIO()
    np.save(buffer, routes, allow_pickle=False)
    assert (decode_array(base64.b64encode(buffer.getbuffer()).decode("ascii")) == routes).all()
    facts = {"routes": {"returned": False}, "device": "cuda"}
    with pytest.raises(ValueError, match="does not return: start it with --enable-return-routed-experts"):
        check_facts(facts, return_routes=True)
    with pytest.raises(ValueError, match="a server on CPU cannot; use rollout.placement=child or in_process"):
        check_facts(facts | {"device": "cpu"}, return_routes=True)


def test_corrupted_routes_are_refused():
    routes = RequestRoutes((0, 2), 8)
    good = np.array([[[1, 2], [0, 0], [7, 3]]] * 4, dtype=np.uint8)
    assert routes.read(good, 5, "response 0 of 'p'").tolist()[0] == [[1, 2], [7, 3]]
    with pytest.raises(ValueError, match=r"response 0 of 'p': vLLM returned routes of shape \(4, 3, 2\) for 6 tokens"):
        routes.read(good, 6, "response 0 of 'p'")
    with pytest.raises(ValueError, match="shape None"):
        routes.read(None, 5, "response 0 of 'p'")
    for value, message in ((8, "expert 8; experts are 0..7"), (3, "names an expert twice")):
        bad = good.copy()
        bad[2, 2, 0] = value
        with pytest.raises(ValueError, match=f"response 0 of 'p': .*token 2 in MoE layer 1 .*{message}"):
            routes.read(bad, 5, "response 0 of 'p'")
