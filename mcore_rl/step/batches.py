"""From sequences to this rank's micro-batches."""

from __future__ import annotations

from dataclasses import replace

from mcore_rl.config import RunConfig
from mcore_rl.data.packing import Sample, pack_mini_batch, pad, split_mini_batches
from mcore_rl.data.preferences import PairIds
from mcore_rl.model.checkpoint import Progress
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.types import PackedBatch

Metrics = dict[str, float]
MiniBatches = list[list[PackedBatch]]


def read_examples(plan: Plan, done: Progress) -> tuple[list[Sample], Progress, Metrics]:
    """This step's given responses: one an example (SFT), or chosen and rejected after each other (preference pairs)."""
    task, count = plan.task, plan.config.batch.prompts_per_step
    numbers = range(done.prompts_seen, done.prompts_seen + count)
    if "pairs" in plan.algorithm.needs:
        samples = [s for i in numbers for s in pair_samples(task.pair_example(i))]
    else:
        samples = [given_sample(*task.sft_example(i)) for i in numbers]
    metrics = {"response/length_mean": sum(s.num_response for s in samples) / len(samples)}
    return samples, replace(done, prompts_seen=done.prompts_seen + count), metrics


def given_sample(prompt: tuple[int, ...], response: tuple[int, ...]) -> Sample:
    """A response that no engine sampled."""
    return Sample((*prompt, *response), len(response), 0.0, (0.0,) * len(response))


def pair_samples(pair: PairIds) -> list[Sample]:
    """[chosen, rejected] of one preference pair."""
    prompt, chosen, rejected = pair
    return [given_sample(prompt, chosen), given_sample(prompt, rejected)]


def pack(plan: Plan, groups: Groups, samples: list[Sample], step: int, mini_batches: int, unit: int) -> MiniBatches:
    """[mini_batch][micro_batch] of this rank, with the loss weights of each global mini-batch.

    Args:
        unit: this many consecutive samples stay in one micro-batch.
    """
    parts = split_mini_batches(len(samples), mini_batches, step_seed(plan.config, step), unit)
    return pack_parts(plan, groups, [[samples[i] for i in part] for part in parts], unit)


def pack_parts(plan: Plan, groups: Groups, parts: list[list[Sample]], unit: int = 1) -> MiniBatches:
    """`pack` of mini-batches that are given, in the given order."""
    config, layout = plan.config, groups.layout
    packed = [
        pack_mini_batch(
            part,
            plan.algorithm,
            rank=groups.coords.dp,
            num_ranks=layout.dp,
            budget=config.batch.micro_batch_tokens,
            max_response=config.rollout.max_response_tokens,
            multiple=layout.batch_multiple,
            segment_multiple=layout.segment_multiple,
            rounds=layout.pp if layout.vpp > 1 else 1,
            unit=unit,
        )
        for part in parts
    ]
    # pipeline stages exchange tensors of one shape
    longest = max(b.token_ids.numel() for part in packed for b in part) if layout.pp > 1 else 1
    return [[pad(b, longest).to(groups.device) for b in part] for part in packed]


def step_seed(config: RunConfig, step: int) -> int:
    """A seed for everything random in one step, far from every other step's and run's."""
    return (config.seed * 1_000_003 + step) * 1_000
