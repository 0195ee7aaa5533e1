"""The same training whatever the layout: loss, metrics and gradients of one step of every algorithm and of a critic,
and a trajectory.

Everything is compared with one rank in fp32. Gradients are gathered to HF names. Adam runs with eps 1e-3: with a small
one its first steps turn rounding noise into steps of full size.
"""

import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import each_world, run_worlds, slug

ALGORITHMS_KL = 0.05  # every algorithm is run with KL and entropy terms, so that those are compared too
STEPS = 3
REFERENCE = dict(layout={}, budget=10_000)
CASES = {
    1: [
        REFERENCE,
        dict(layout={}, budget=40),
        dict(layout={}, budget=10_000, recompute="full"),
    ],
    2: [
        dict(layout=dict(dp=2), budget=60),
        dict(layout=dict(dp=2, ep=2), budget=60),
        dict(layout=dict(dp=2, ep=2), budget=60, distributed_optimizer=True),
        dict(layout=dict(tp=2), budget=60),
        dict(layout=dict(tp=2, ep=2), budget=60),
        dict(layout=dict(tp=2, ep=1, etp=2), budget=60),
        dict(layout=dict(pp=2), budget=60),
        dict(layout=dict(pp=2, vpp=2), budget=60),
    ],
}


def name_of(case: dict) -> str:
    return "-".join(
        [slug(case["layout"]), *(f"{k}_{v}" for k, v in case.items() if k not in ("layout", "out", "source"))]
    )


# ---------------------------------------------------------------------------------------------- one rank of one case


def run_case(case: dict, groups) -> None:
    from mcore_rl import algorithms
    from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
    from mcore_rl.data.packing import pack_mini_batch, pad
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.forward import Policy, forward_backward, forward_only
    from mcore_rl.model.optimizer import build_training
    from mcore_rl.parallel.collectives import sum_over_ranks
    from mcore_rl.weights.hf_io import load_hf
    from mcore_rl.weights.shards import megatron_shards
    from mcore_rl.weights.sync import WeightExporter

    hf_config = read_hf_config(case["source"])
    model = ModelConfig(path=case["source"], recompute=case.get("recompute", "none"))
    chunks = build_model(hf_config, model, groups)
    shards = megatron_shards(chunks, hf_config, groups)
    parallel = ParallelConfig(distributed_optimizer=case.get("distributed_optimizer", False))
    load_hf(case["source"], shards)
    training = build_training(chunks, OptimizerConfig(lr=1e-3, eps=1e-3, clip_grad=0.5), parallel, total_steps=100)
    exporter = WeightExporter(chunks, hf_config, groups)
    policy = Policy(training.chunks, groups, hf_config.vocab_size, temperature=0.8, chunk_tokens=7)
    contributes = groups.is_pipeline_last and groups.coords.tp == 0

    def weights() -> dict:
        return {name: tensor.clone() for name, tensor in exporter if tensor is not None}

    def batches(algorithm) -> list:
        unit = 2 if "pairs" in algorithm.needs else 1
        packed = pack_mini_batch(
            make_samples(), algorithm, rank=groups.coords.dp, num_ranks=groups.layout.dp, budget=case["budget"],
            max_response=16, multiple=groups.layout.tp, rounds=groups.layout.pp if groups.layout.vpp > 1 else 1,
            unit=unit,
        )  # fmt: skip
        longest = max(b.token_ids.numel() for b in packed) if groups.layout.pp > 1 else 1
        packed = [pad(b, longest) for b in packed]
        return [replace(b, old_logprobs=b.rollout_logprobs, ref_logprobs=b.rollout_logprobs + 0.1) for b in packed]

    def accumulate(algorithm, training=training, model=policy, loss=None) -> dict[str, float]:
        training.zero_grad()
        sums = {"loss": 0.0}
        for result in forward_backward(model, batches(algorithm), loss or algorithm.loss):
            sums["loss"] += result.loss.item()
            for key, value in result.metrics.items():
                sums[key] = sums.get(key, 0.0) + value.item()
        return sum_over_ranks(groups, sums, contributes=contributes)

    results: dict = {
        "logprobs": gather_logprobs(policy, batches(algorithms.load("grpo")), forward_only, groups, contributes)
    }
    start = [p.data.clone() for c in chunks for p in c.parameters()]
    for name in algorithms.available():
        has_extras = "pairs" not in algorithms.load(name).needs
        algorithm = algorithms.load(name, **(dict(kl_coef=ALGORITHMS_KL, entropy_coef=0.01) if has_extras else {}))
        results[name] = {"sums": accumulate(algorithm)}
        if not parallel.distributed_optimizer:  # there each rank holds the reduced gradient of its own part only
            results[name]["grads"] = gradients(chunks, exporter)
            for p, w in zip((p for c in chunks for p in c.parameters()), start):
                p.data.copy_(w)
    critic_chunks, critic_exporter, critic_training, critic = make_critic(hf_config, model, groups, parallel)
    ppo = algorithms.load("ppo")

    def value_loss(batch, out):
        return ppo.value_loss(replace(batch, values=batch.advantages, returns=batch.old_logprobs), out.values)

    results["critic"] = {"sums": accumulate(ppo, critic_training, critic, value_loss)}
    if not parallel.distributed_optimizer:
        results["critic"]["grads"] = gradients(critic_chunks, critic_exporter)
    algorithm = algorithms.load("grpo", kl_coef=ALGORITHMS_KL)
    results["trajectory"] = []
    for _ in range(STEPS):
        sums = accumulate(algorithm)
        results["trajectory"].append((sums["loss"], training.step()[0]))
    results["weights"] = weights()
    if groups.rank == 0:
        torch.save(results, case["out"])


def gradients(chunks: list, exporter) -> dict:
    """Gathered to HF names, by way of the parameters, which are overwritten."""
    for p in (p for c in chunks for p in c.parameters()):
        p.data.copy_(p.main_grad)
    return {name: tensor.clone() for name, tensor in exporter if tensor is not None}


def make_critic(hf_config, model, groups, parallel) -> tuple:
    from mcore_rl.config import OptimizerConfig
    from mcore_rl.model.build import build_model
    from mcore_rl.model.forward import Scorer
    from mcore_rl.model.heads import as_scorer
    from mcore_rl.model.optimizer import build_training
    from mcore_rl.weights.hf_io import load_hf
    from mcore_rl.weights.shards import megatron_shards
    from mcore_rl.weights.sync import WeightExporter

    config = as_scorer(hf_config)
    chunks = build_model(config, model, groups)
    shards = megatron_shards(chunks, config, groups)
    load_hf(model.path, [s for s in shards if s.hf_name != "score.weight"])
    for shard in (s for s in shards if s.hf_name == "score.weight"):
        shard.view.copy_(torch.arange(shard.view.numel()).sin().view_as(shard.view))
    training = build_training(chunks, OptimizerConfig(), parallel, total_steps=100)
    return chunks, WeightExporter(chunks, config, groups), training, Scorer(training.chunks, groups)


def make_samples() -> list:
    """A frozen rollout: uneven lengths, advantages of both signs, old log-probs off the policy's."""
    from mcore_rl.data.packing import Sample

    rng = random.Random(0)
    samples = []
    for i in range(10):
        prompt, response = rng.randint(2, 9), rng.randint(1, 12)
        tokens = tuple(rng.randrange(97) for _ in range(prompt + response))
        logprobs = tuple(-4.5 + rng.gauss(0, 0.5) for _ in range(response))
        samples.append(Sample(tokens, response, (-1.0, 0.5, 1.5)[i % 3], logprobs))
    return samples


def gather_logprobs(policy, batches, forward_only, groups, contributes) -> dict[tuple, list[float]]:
    """Log-probs by the tokens of their sequence, from all ranks."""
    import torch.distributed as dist

    mine = {}
    if contributes:
        for batch, out in zip(batches, forward_only(policy, batches), strict=True):
            for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()):
                if batch.loss_mask[a:b].any():
                    mine[tuple(batch.targets[a:b].tolist())] = out.logprobs[a:b].tolist()
    else:
        forward_only(policy, batches)
    everyone = [None] * groups.world_size
    dist.all_gather_object(everyone, mine)
    return {k: v for part in everyone for k, v in part.items()}


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def outcomes(tiny_moe_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training_layouts")
    for ranks, cases in CASES.items():
        run_worlds(
            __file__,
            [c | dict(source=str(tiny_moe_dir), out=str(folder / name_of(c))) for c in cases],
            ranks,
            timeout_s=400,
        )
    return {name_of(c): torch.load(folder / name_of(c), weights_only=False) for cases in CASES.values() for c in cases}


ALL = [c for cases in CASES.values() for c in cases if c is not REFERENCE]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_same_training(case, outcomes):
    got, want = outcomes[name_of(case)], outcomes[name_of(REFERENCE)]
    assert got["logprobs"].keys() == want["logprobs"].keys()
    for key, values in want["logprobs"].items():
        assert got["logprobs"][key] == pytest.approx(values, abs=2e-5)
    for name, expected in want.items():
        if name in ("logprobs", "trajectory", "weights"):
            continue
        assert got[name]["sums"] == pytest.approx(expected["sums"], rel=1e-5, abs=1e-5), name
        for tensor, grad in got[name].get("grads", {}).items():
            assert relative(grad, expected["grads"][tensor]) < 1e-5, (name, tensor)
    for (loss, norm), (loss_, norm_) in zip(got["trajectory"], want["trajectory"], strict=True):
        assert loss == pytest.approx(loss_, rel=1e-5, abs=1e-6) and norm == pytest.approx(norm_, rel=1e-5)
    for tensor, weight in want["weights"].items():
        assert relative(got["weights"][tensor], weight) < 1e-6, tensor


def test_the_reference_is_not_trivial(outcomes):
    """The comparison can fail: gradients of different algorithms differ, all parameters get one, the steps move."""
    want = outcomes[name_of(REFERENCE)]
    grads = want["grpo"]["grads"]
    assert all(g.abs().max() > 0 for g in grads.values())
    assert relative(want["sapo"]["grads"]["lm_head.weight"], grads["lm_head.weight"]) > 1e-2
    losses = [loss for loss, _ in want["trajectory"]]
    assert len(set(losses)) == STEPS and all(map(math.isfinite, losses))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    each_world(sys.argv[1], run_case)
