"""What recording, replaying and returning routes cost: in a training step, and in the rollout engine.

python -m tools.bench.routing --model 10M --json [--engine]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from mcore_rl.config import ModelConfig, ParallelConfig, RolloutConfig, WeightSyncConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Policy, forward_backward, forward_only, forward_recorded, routers_of
from mcore_rl.model.optimizer import build_training
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.types import Prompt, SamplingParams, WeightedBatch
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards
from tools.bench.batches import pack_mini_batch
from tools.bench.models import Json, Model, PromptTokens, Repeats, Seed, asked_model
from tools.bench.side_by_side import check_equal, environment, interleave, show, throughput
from tools.bench.train_step import ALGORITHM, OPTIMIZER, random_samples

MICRO_BATCH_TOKENS = 1024


def scored_before(policy: Policy, batches: list[WeightedBatch], mode: str) -> list[WeightedBatch]:
    """With the old log-probs, and the routes that a mode takes."""
    if mode == "rollout":
        batches = [replace(b, expert_ids=b.rollout_expert_ids) for b in batches]
    if mode == "old":
        outputs, taken = forward_recorded(policy, batches)
        batches = [replace(b, expert_ids=r.expert_ids) for b, r in zip(batches, taken)]
    else:
        outputs = forward_only(policy, batches)
    return [replace(b, old_logprobs=o.logprobs) for b, o in zip(batches, outputs)]


def measure(
    folder: Path, num_sequences: int, prompt_tokens: int, response_tokens: int, repeats: int, seed: int
) -> dict:
    """A step (log-probs before it, then one update) in every mode, and a look at the routers; first checked equal."""
    started = environment()
    groups = process_groups.init(ParallelLayout(), timeout_s=60, seed=seed)
    try:
        hf_config = read_hf_config(folder)
        chunks = build_model(hf_config, ModelConfig(path=str(folder)), groups)
        load_hf(folder, megatron_shards(chunks, hf_config, groups))
        training = build_training(chunks, OPTIMIZER, ParallelConfig(), total_steps=1)
        plain = Policy(training.chunks, groups, vocab_size=hf_config.vocab_size)
        samples = random_samples(num_sequences, prompt_tokens, response_tokens, hf_config.vocab_size, seed)
        shape = dict(rank=0, num_ranks=1, budget=MICRO_BATCH_TOKENS, max_response=response_tokens)
        packed = [b.to(groups.device) for b in pack_mini_batch(samples, ALGORITHM, **shape)]

        def gradients(policy: Policy, mode: str) -> list[WeightedBatch]:
            batches = scored_before(policy, batches_of_engine, mode)
            training.zero_grad()
            forward_backward(policy, batches, ALGORITHM.loss)
            return batches

        def step(policy: Policy, mode: str) -> None:
            gradients(policy, mode)
            training.step()

        def watch(policy: Policy) -> None:
            _, before = forward_recorded(policy, packed[:1], statistics=True)
            forward_recorded(policy, packed[:1], statistics=True)
            forward_only(policy, [replace(packed[0], expert_ids=before[0].expert_ids)])

        batches_of_engine = packed
        gradients(plain, "none")
        expected = [p.main_grad.clone() for chunk in training.chunks for p in chunk.parameters()]
        routed = replace(plain, routers=routers_of(training.chunks, groups))
        _, recorded = forward_recorded(routed, packed)
        batches_of_engine = [replace(b, rollout_expert_ids=r.expert_ids) for b, r in zip(packed, recorded)]
        worst = 0.0
        for mode in ("none", "old", "rollout"):
            gradients(routed, mode)
            found = [p.main_grad for chunk in training.chunks for p in chunk.parameters()]
            worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)))
        equal = check_equal({"grad_max_diff": (worst, 0.0)})
        modes = {mode: lambda mode=mode: step(routed, mode) for mode in ("none", "old", "rollout")}
        timings = interleave(modes | {"watch one micro-batch": lambda: watch(routed)}, repeats)
    finally:
        process_groups.destroy()
    positions = sum(s.positions for s in samples)
    work = {"positions": positions, "micro_batches": len(packed), "bytes_per_token": recorded[0].expert_ids[0].nbytes}
    return {
        "benchmark": "routing",
        **throughput(timings, positions),
        "equal": equal,
        "work": work,
        "environment": started,
    }


def measure_engine(folder: Path, num_prompts: int, prompt_tokens: int, response_tokens: int, repeats: int, seed: int):
    """Two engines in child processes, one of which returns routes; the same samples from both."""
    started = environment()
    generator = torch.Generator().manual_seed(seed)
    vocab_size = read_hf_config(folder).vocab_size
    tokens = torch.randint(2, vocab_size, (num_prompts, prompt_tokens), generator=generator).tolist()
    prompts = [Prompt(str(i), tuple(ids), "") for i, ids in enumerate(tokens)]
    params = SamplingParams(n=1, max_tokens=response_tokens)
    rollout = RolloutConfig(placement="child", max_model_len=prompt_tokens + response_tokens)
    opened = []
    try:
        for return_routes in (False, True):
            opened.append(
                open_engine(rollout, WeightSyncConfig(), str(folder), "float32", prompt_tokens, 1, seed, return_routes)
            )
        without, with_routes = (engine.generate(prompts, params, seed=seed) for engine in opened)
        bare = [replace(t, expert_ids=None) for group in with_routes for t in group.trajectories]
        plain = [t for group in without for t in group.trajectories]
        equal = check_equal({"samples_that_differ": (float(sum(a != b for a, b in zip(plain, bare))), 0.0)})
        contenders = {
            name: lambda engine=engine: engine.generate(prompts, params, seed=seed)
            for name, engine in zip(("without routes", "with routes"), opened)
        }
        timings = interleave(contenders, repeats)
    finally:
        for engine in opened:
            engine.close()
    sampled = sum(len(t.response_ids) for g in without for t in g.trajectories)
    figures = throughput(timings, sampled)
    for row in (*figures["contenders"].values(), *figures["ratios"].values()):
        del row["cpu_seconds"]  # the children's are not ours
    return {"benchmark": "routing", **figures, "equal": equal, "work": {"tokens": sampled}, "environment": started}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "10M",
    sequences: Annotated[int, typer.Option(min=1, help="of one update, or prompts of one rollout")] = 64,
    prompt_tokens: PromptTokens = 32,
    response_tokens: Annotated[int, typer.Option(min=1, help="of the longest")] = 128,
    repeats: Repeats = 5,
    seed: Seed = 0,
    engine: Annotated[
        bool, typer.Option("--engine", help="the rollout engine's share instead of the trainer's")
    ] = False,
    json: Json = False,
) -> None:
    """Routing replay, R2 and R3, against none, in fp32 on one thread (OMP_NUM_THREADS changes it)."""
    lengths: Sequence[int] = (sequences, prompt_tokens, response_tokens)
    with asked_model(model, seed) as folder:
        result = (measure_engine if engine else measure)(folder, *lengths, repeats, seed)
    names = ("sequences", "prompt_tokens", "response_tokens")
    settings = dict(model=model, engine=engine) | dict(zip(names, lengths)) | dict(repeats=repeats, seed=seed)
    show(result | {"settings": settings}, json)


if __name__ == "__main__":
    app()
