"""A GRPO update of packed sequences against the same update of sequences padded to the longest.

python -m tools.bench.packing --model 10M --json

Padding can cost at most what it adds in tokens: that ratio is reported as the bound.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mcore_rl.model.build import read_hf_config
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.layout import ParallelLayout
from tools.bench.models import Json, Model, PromptTokens, Repeats, ResponseTokens, Seed, Sequences, asked_model
from tools.bench.side_by_side import check_equal, environment, interleave, show, throughput
from tools.bench.train_step import megatron_side, random_samples, relative_differences


def measure(
    folder: Path, num_sequences: int, prompt_tokens: int, response_tokens: int, budget: int, repeats: int, seed: int
) -> dict:
    """Check, then time; see docs/benchmarks.md for the keys."""
    started = environment()
    groups = process_groups.init(ParallelLayout(), timeout_s=60, seed=seed)
    try:
        vocab_size = read_hf_config(folder).vocab_size
        drawn = random_samples(num_sequences, prompt_tokens, response_tokens, vocab_size, seed)
        samples = [replace(s, rollout_logprobs=(-1.0,) * s.num_response) for s in drawn]
        longest = max(s.positions for s in samples)
        settings = {
            "packed": dict(budget=budget),
            "padded": dict(budget=budget, segment_multiple=longest, multiple=longest),
        }
        side = megatron_side(folder, groups, samples, response_tokens, settings)
        equal = check_equal(relative_differences(side))
        positions = {name: sum(b.token_ids.numel() for b in batches) for name, batches in side.settings.items()}
        timings = interleave(side.steps(), repeats)
    finally:
        process_groups.destroy()
    return {
        "benchmark": "packing",
        **throughput(timings, positions["packed"]),
        "equal": equal,
        "work": {
            "positions": positions,
            "micro_batches": {name: len(batches) for name, batches in side.settings.items()},
            "bound": positions["padded"] / positions["packed"],
        },
        "environment": started,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "10M",
    sequences: Sequences = 64,
    prompt_tokens: PromptTokens = 32,
    response_tokens: ResponseTokens = 128,
    budget: Annotated[int, typer.Option(min=1, help="positions of a micro-batch, padding included")] = 2048,
    repeats: Repeats = 5,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """A GRPO update of packed against padded sequences, in fp32 on one thread (OMP_NUM_THREADS changes it)."""
    work = dict(num_sequences=sequences, prompt_tokens=prompt_tokens, response_tokens=response_tokens, budget=budget)
    work |= dict(repeats=repeats, seed=seed)
    with asked_model(model, seed) as folder:
        result = measure(folder, **work)
    show(result | {"settings": dict(model=model) | work}, json)


if __name__ == "__main__":
    app()
