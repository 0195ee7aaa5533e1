"""What vLLM samples and reports, against Hugging Face in fp32."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from rollout_reference import EOS, hf_logits, load_hf, make_prompts, max_error, responses

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.engine import RolloutError, request_seeds
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.types import Prompt, SamplingParams

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def hf(rollout_dirs):
    return load_hf(rollout_dirs[0])


def test_sampled_logprobs_are_those_of_hf(rollout_engine, hf):
    groups = rollout_engine.generate(make_prompts([1, 7, 40, 150]), SamplingParams(n=4, max_tokens=24), seed=0)
    assert [len(g.trajectories) for g in groups] == [4] * 4
    assert max_error(hf, groups) < TOLERANCE


def test_greedy_takes_the_argmax(rollout_engine, hf):
    groups = rollout_engine.generate(make_prompts([5, 33]), SamplingParams(temperature=0.0, max_tokens=20), seed=0)
    for (trajectory,) in (g.trajectories for g in groups):
        assert hf_logits(hf, trajectory).argmax(-1).tolist() == trajectory.response_ids.tolist()
    assert max_error(hf, groups) < TOLERANCE


def test_logprobs_are_of_the_distribution_that_was_sampled_from(rollout_engine, hf):
    prompts = make_prompts([9, 12])
    warm = rollout_engine.generate(prompts, SamplingParams(n=3, temperature=0.6, max_tokens=12), seed=0)
    assert max_error(hf, warm, temperature=0.6) < TOLERANCE
    params = SamplingParams(n=3, temperature=0.8, top_k=5, top_p=0.9, max_tokens=12)
    for trajectory in (t for g in rollout_engine.generate(prompts, params, seed=0) for t in g.trajectories):
        top = (hf_logits(hf, trajectory) / 0.8).topk(5)
        probs = top.values.softmax(-1)
        probs = probs * (probs.cumsum(-1) - probs < 0.9)  # the smallest set of tokens that holds 0.9
        logprobs = (probs / probs.sum(-1, keepdim=True)).log()
        for position, (token, logprob) in enumerate(
            zip(trajectory.response_ids, trajectory.rollout_logprobs, strict=True)
        ):
            place = top.indices[position].tolist().index(token)
            assert logprob == pytest.approx(logprobs[position, place].item(), abs=TOLERANCE)


def test_samples_follow_the_distribution(rollout_engine, hf):
    """Responses get consecutive seeds; were their first draws correlated, these frequencies would be off."""
    prompt = make_prompts([6])[0]
    (group,) = rollout_engine.generate([prompt], SamplingParams(n=2000, max_tokens=1), seed=4)
    tokens = torch.tensor([t.response_ids[0] for t in group.trajectories])
    expected = hf_logits(hf, group.trajectories[0])[0].softmax(-1) * len(tokens)
    common = expected >= 5
    observed = tokens.bincount(minlength=97).double()
    chi2 = ((observed - expected) ** 2 / expected)[common].sum().item()
    freedom = int(common.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_same_call_same_samples_bit_for_bit(rollout_engine):
    prompts, params = make_prompts([5, 9, 20, 130]), SamplingParams(n=3, max_tokens=24)
    first = rollout_engine.generate(prompts, params, seed=7)
    assert rollout_engine.generate(prompts, params, seed=7) == first
    assert responses(rollout_engine.generate(prompts, params, seed=8)) != responses(first)


def test_samples_do_not_depend_on_the_rest_of_the_batch(rollout_engine):
    prompts, params = make_prompts([5, 9, 20, 31, 12]), SamplingParams(n=3, max_tokens=24)
    alone = rollout_engine.generate(prompts[:2], params, seed=7)
    assert rollout_engine.generate(prompts, params, seed=7)[:2] == alone


def test_equal_prompts_get_different_samples(rollout_engine):
    prompts = [Prompt(str(i), (5, 6, 7), "") for i in range(8)]
    groups = rollout_engine.generate(prompts, SamplingParams(n=4, max_tokens=20), seed=0)
    drawn = [r for group in responses(groups) for r in group]
    assert len(set(drawn)) == len(drawn) == 32


def test_seeds_of_a_call_are_distinct_where_torch_keeps_32_bits():
    for seed in range(200):
        seeds = [s + j for s in request_seeds(seed, 64, 8) for j in range(8)]
        assert len({s % 2**32 for s in seeds}) == 512


def test_the_trainers_generators_are_left_alone(rollout_engine):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rollout_engine.generate(make_prompts([5]), SamplingParams(n=2, max_tokens=5), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_finish_reasons(rollout_engine):
    prompt = make_prompts([10])
    (group,) = rollout_engine.generate(prompt, SamplingParams(n=64, max_tokens=40), seed=0)
    for t in group.trajectories:
        assert EOS not in t.response_ids[:-1]
        assert t.finish_reason == ("stop" if t.response_ids[-1] == EOS else "length")
        assert t.finish_reason == "stop" or len(t.response_ids) == 40
    assert {t.finish_reason for t in group.trajectories} == {"stop", "length"}


def test_stop_tokens_end_a_response_and_belong_to_it(rollout_engine):
    params = SamplingParams(n=16, max_tokens=40, stop_token_ids=tuple(range(2, 40)))
    (group,) = rollout_engine.generate(make_prompts([10]), params, seed=0)
    for t in group.trajectories:
        assert not set(t.response_ids[:-1]) & set(params.stop_token_ids)
    stopped = [t for t in group.trajectories if t.finish_reason == "stop"]
    assert stopped and all(t.response_ids[-1] in (*params.stop_token_ids, EOS) for t in stopped)


def test_stop_strings_and_text(rollout_engine):
    params = SamplingParams(n=16, max_tokens=60, stop=("a", "7", "Zq"))
    (group,) = rollout_engine.generate(make_prompts([10]), params, seed=0)
    assert any(t.text.endswith(("a", "7")) for t in group.trajectories)
    for t in group.trajectories:
        assert not any(s in t.text[:-1] for s in ("a", "7"))
        assert len(t.text) == len(t.response_ids) - (t.response_ids[-1] == EOS) - (t.response_ids == 0).sum()


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_sampled(rollout_engine):
    prompts = make_prompts([5, 200])
    with pytest.raises(ValueError, match=r"'test/1' has 200 tokens.*199.*max_model_len 200"):
        rollout_engine.generate(prompts, SamplingParams(), seed=0)
    with pytest.raises(ValueError, match="'empty' has no tokens"):
        rollout_engine.generate([Prompt("empty", (), "")], SamplingParams(), seed=0)
    rollout_engine.check_alive()


def test_an_engine_goes_on_after_a_call_that_failed_half_way(rollout_engine):
    prompts, params = make_prompts([5, 9]), SamplingParams(n=2, max_tokens=8)
    expected = rollout_engine.generate(prompts, params, seed=0)
    with pytest.raises(RolloutError, match="failed during generation.*out of vocabulary"):
        rollout_engine.generate([*prompts, Prompt("unknown token", (5, 500), "")], params, seed=0)
    assert rollout_engine.generate(prompts, params, seed=0) == expected


def test_placement_mistakes():
    def attempt(world_size=1, backend="auto", **rollout):
        open_engine(RolloutConfig(**rollout), WeightSyncConfig(backend=backend), "unused", "float32", 8, world_size, 0)

    with pytest.raises(ValueError, match="needs one trainer rank, got 2; use 'child'"):
        attempt(world_size=2, placement="in_process")
    with pytest.raises(ValueError, match="tensor_parallel_size=1, got 2"):
        attempt(placement="in_process", tensor_parallel_size=2)
    with pytest.raises(ValueError, match="needs rollout.server_url"):
        attempt(placement="server")
    with pytest.raises(ValueError, match="weight_sync.backend='ipc' does not work for .*use 'auto', 'shm' or 'gloo'"):
        attempt(backend="ipc")


def test_one_in_process_engine_at_a_time(rollout_engine, rollout_dirs):
    with pytest.raises(ValueError, match="has an in-process engine already"):
        open_engine(RolloutConfig(), WeightSyncConfig(), str(rollout_dirs[0]), "float32", 8, 1, 0)


def test_a_child_that_cannot_start(tmp_path, rollout_dirs):
    (tmp_path / "config.json").write_text((rollout_dirs[0] / "config.json").read_text())
    rollout = RolloutConfig(placement="child", kv_cache_gb=0.1, max_response_tokens=8)
    with pytest.raises(RolloutError, match=r"rollout engine \(child\) did not start"):
        open_engine(rollout, WeightSyncConfig(), str(tmp_path), "float32", 8, 1, 0)
    assert not [c for c in multiprocessing.active_children() if "Engine" in c.name]


def test_a_killed_child_is_reported_with_its_cause(rollout_dirs):
    rollout = RolloutConfig(placement="child", kv_cache_gb=0.1, max_response_tokens=200)
    engine = open_engine(rollout, WeightSyncConfig(), str(rollout_dirs[0]), "float32", 20, 2, 0)
    (pid,) = engine.child_pids
    params = SamplingParams(n=64, max_tokens=200)
    first = engine.generate(make_prompts([5, 6]), SamplingParams(n=2, max_tokens=4), seed=0)
    assert first == engine.generate(make_prompts([5, 6]), SamplingParams(n=2, max_tokens=4), seed=0)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(RolloutError, match=f"process {pid} died during generation: killed by SIGKILL"):
        for _ in range(100):
            engine.generate(make_prompts([5] * 8), params, seed=0)
    with pytest.raises(RolloutError, match=f"process {pid} is dead: killed by SIGKILL"):
        engine.check_alive()
    started = time.monotonic()
    with pytest.raises(RolloutError, match="SIGKILL"):
        engine.call_workers("rollout_facts")
    engine.close()
    engine.close()
    assert time.monotonic() - started < 10
    with pytest.raises(RolloutError, match="closed"):
        engine.generate(make_prompts([5]), params, seed=0)
