"""New weights for a child engine that is in the middle of its responses, against Hugging Face in fp32."""

import time

import pytest
import torch
from rollout_reference import ONE_RANK, CheckpointExporter, hf_logits, load_hf, make_prompts

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.engine import RolloutError
from mcore_rl.rollout.threads import in_thread
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.types import SamplingParams

LONG = SamplingParams(n=4, max_tokens=150)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine(rollout_dirs):
    rollout = RolloutConfig(placement="child", kv_cache_gb=0.1, max_model_len=200)
    engine = open_engine(rollout, WeightSyncConfig(), str(rollout_dirs[0]), "float32", 50, 1, 0)
    yield engine
    engine.close()


def token_errors(models, trajectory):
    """[version, T_resp] how far the engine's log-probs are from those of each model."""
    said, ids = torch.from_numpy(trajectory.rollout_logprobs), torch.from_numpy(trajectory.response_ids).long()[:, None]
    return torch.stack([(hf_logits(m, trajectory).log_softmax(-1).gather(1, ids)[:, 0] - said).abs() for m in models])


def test_every_token_is_of_the_weights_that_it_says(engine, rollout_dirs):
    """Prefixes are the old weights', continuations the new ones' with keys and values computed again."""
    models = [load_hf(folder) for folder in rollout_dirs]
    exporters = [CheckpointExporter(folder) for folder in rollout_dirs]
    prompts = make_prompts([5, 9, 20, 31, 12, 40])
    before = engine.generate(prompts, LONG, seed=2)
    assert all(set(t.versions.tolist()) == {0} for g in before for t in g.trajectories)
    current = CheckpointExporter(rollout_dirs[0])
    transfer = connect(engine, current, WeightSyncConfig(), ONE_RANK)
    pending = in_thread(lambda: engine.generate(prompts, LONG, seed=2))
    for version in (1, 2, 3):
        time.sleep(0.15)
        current.tensors = exporters[version % 2].tensors
        transfer.send(version)
        # somebody else may ask meanwhile, and is answered by the new weights
        (probe,) = engine.generate(make_prompts([7]), SamplingParams(max_tokens=8), seed=0)
        assert set(probe.trajectories[0].versions.tolist()) == {version}
        assert token_errors(models, probe.trajectories[0])[version % 2].max() < TOLERANCE
    after = [t for g in pending.result(60) for t in g.trajectories]
    mixed = [t for t in after if len(set(t.versions.tolist())) > 1]
    assert len(mixed) > len(after) / 2, "weights changed too late or too early"
    for t in after:
        versions = torch.from_numpy(t.versions)
        assert t.policy_version == versions[0] and (versions.diff() >= 0).all()
        errors = token_errors(models, t)
        assert errors.gather(0, (versions % 2)[None]).max() < TOLERANCE
        for version in versions.unique():  # the other weights would show: versions that are off by a token are caught
            assert errors[(version + 1) % 2][versions == version].max() > 1e-2
    # until the first change the samples are those of the undisturbed call: generators outlive the pause
    undisturbed = [t for g in before for t in g.trajectories]
    for t, whole in zip(after, undisturbed, strict=True):
        kept = int((t.versions == 0).sum())
        assert kept > 0 and (t.response_ids[:kept] == whole.response_ids[:kept]).all()
    transfer.close()


def test_closing_does_not_wait_for_what_is_in_flight(engine):
    pending = in_thread(lambda: engine.generate(make_prompts([5] * 40), LONG, seed=0))
    time.sleep(0.3)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 10  # vLLM gives its process five
    with pytest.raises(RolloutError, match="closed"):
        pending.result(5)
