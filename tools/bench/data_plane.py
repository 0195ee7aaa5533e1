"""From "generated" to "packed": a step's rollouts from rank 0 to every rank's micro-batches, without a model.

python -m tools.bench.data_plane --tokens 8000000 --ranks 4 --json

Side by side in one run: arrays, each rank its own share, as training does it; and `objects`, tuples of Python numbers
that every rank receives whole, as the loop did before. What comes out is compared first: every rank's sequences and
weights are the same.
"""

from __future__ import annotations

import json as json_
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch.distributed as dist
import typer

from mcore_rl import algorithms
from mcore_rl.config import parse_config
from mcore_rl.data.scores import Scores
from mcore_rl.data.sequences import Sample, Sequences, sequences_of
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.collectives import gather_objects
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.plan import world_size
from mcore_rl.step.batches import Share, share_of_step
from mcore_rl.step.scoring import MiniBatches, mini_batches_of
from mcore_rl.types import Prompt, RolloutGroup, Trajectory, WeightedBatch
from tools.bench.models import Json, Seed
from tools.bench.side_by_side import environment

GROUP, PROMPT_TOKENS, LONGEST = 8, 64, 1024
ROOT = Path(__file__).resolve().parents[2]


def generated(tokens: int, seed: int) -> list[RolloutGroup]:
    """Groups of responses of 1 to `LONGEST` tokens, about as many tokens as asked for, with mixed rewards."""
    rng = np.random.default_rng(seed)
    groups, total = [], 0
    while total < tokens:
        prompt = rng.integers(0, 50_000, PROMPT_TOKENS, dtype=np.int32)
        lengths = rng.integers(1, LONGEST + 1, GROUP)
        rewards = rng.integers(0, 2, GROUP)
        rewards[:2] = 0, 1  # no group whose responses teach nothing and stay at home
        trajectories = tuple(
            Trajectory(prompt, rng.integers(0, 50_000, n, dtype=np.int32), -rng.random(n, dtype=np.float32), "stop", 0,
                       reward=float(r))
            for n, r in zip(lengths, rewards)
        )  # fmt: skip
        groups.append(RolloutGroup(Prompt(str(len(groups)), (), ""), trajectories))
        total += int(lengths.sum())
    return groups


def by_arrays(plan: Any, groups: Groups, rollouts: list[RolloutGroup]) -> tuple[Share, MiniBatches]:
    share = share_of_step(plan, groups, sequences_of(rollouts, plan.algorithm), step=0)
    return share, mini_batches_of(groups, share, Scores.of(share.mine))


def bytes_of(batch: WeightedBatch) -> int:
    return sum(x.nbytes for x in vars(batch).values() if x is not None)


def by_objects(plan: Any, groups: Groups, rollouts: list[RolloutGroup]) -> tuple[Share, MiniBatches]:
    """Every rank unpickles the whole rollout; what follows is the same."""
    owned = sequences_of(rollouts, plan.algorithm)
    columns = (owned.columns.num_response.tolist(), owned.columns.advantages.tolist())
    flat = ([x.tolist() for x in owned.split(name)] for name in ("token_ids", "rollout_logprobs"))
    tokens, logprobs = flat
    told: list = [list(zip(tokens, *columns, logprobs))]
    dist.broadcast_object_list(told, src=0)
    everything = [Sample(*sample) for sample in told[0]]
    share = share_of_step(plan, groups, Sequences.of(everything if groups.rank == 0 else []), step=0)
    return share, mini_batches_of(groups, share, Scores.of(share.mine))


WAYS: dict[str, Callable] = {"arrays": by_arrays, "objects": by_objects}


def peak_growth(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` gives, and by how many bytes the process was larger meanwhile than before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    result = work()
    return result, _status("VmHWM") - before


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def one_rank(tokens: int, ways: list[str], repeats: int, seed: int) -> None:
    """A rank of the benchmark; rank 0 prints what all have measured."""
    world = world_size()
    groups = process_groups.init(ParallelLayout(dp=world), timeout_s=600, seed=seed)
    config = parse_config(
        {
            "name": "data_plane",
            "model": {"path": "none"},
            "batch": {"micro_batch_tokens": 16_384, "mini_batches": 4},
            "rollout": {"max_response_tokens": LONGEST},
        }
    )
    plan = SimpleNamespace(config=config, algorithm=algorithms.load("grpo"))
    rollouts = generated(tokens, seed) if groups.rank == 0 else []
    found: dict[str, Any] = {}
    digests = {}
    for way in ways:
        seconds, peaks = [], []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            (share, batches), peak = peak_growth(lambda way=way: WAYS[way](plan, groups, rollouts))
            dist.barrier()
            seconds.append(time.perf_counter() - start)
            peaks.append(peak)
            digests[way] = [float(b.weights.sum() + b.token_ids.sum()) for part in batches for b in part]
            own, packed = share.mine.num_bytes, sum(bytes_of(b) for part in batches for b in part)
            del share, batches
        everyone = gather_objects(groups, {"peak_bytes": max(peaks), "share_bytes": own, "packed_bytes": packed})
        found[way] = {"seconds": min(seconds), "ranks": everyone}
    same = gather_objects(groups, all(digest == digests[ways[0]] for digest in digests.values()))
    if groups.rank == 0:
        print(json_.dumps({"ways": found, "equal": all(same), "response_tokens": tokens}))
    process_groups.destroy()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=1, help="response tokens of the step, about")] = 1_000_000,
    ranks: Annotated[int, typer.Option(min=1)] = 4,
    objects: Annotated[bool, typer.Option(help="also as tuples of Python numbers that every rank receives")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="the fastest counts")] = 3,
    seed: Seed = 0,
    json: Json = False,
    rank: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Seconds and memory between a generated rollout and packed micro-batches on every rank."""
    ways = ["arrays", *(["objects"] if objects else [])]
    if rank:
        one_rank(tokens, ways, repeats, seed)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
               "tools.bench.data_plane", "--rank", f"--tokens={tokens}", f"--repeats={repeats}", f"--seed={seed}",
               "--objects" if objects else "--no-objects"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: a rank failed:\n{done.stderr[-3000:]}")
    result = json_.loads(done.stdout.strip().splitlines()[-1]) | {"environment": environment()}
    if json:
        print(json_.dumps(result | {"benchmark": "data_plane", "settings": {"tokens": tokens, "ranks": ranks}}))
        return
    print(f"{tokens:,} response tokens, {ranks} ranks; equal: {result['equal']}")
    for way, figures in result["ways"].items():
        peak = max(r["peak_bytes"] for r in figures["ranks"][1:] or figures["ranks"])
        share = max(r["share_bytes"] for r in figures["ranks"])
        packed = max(r["packed_bytes"] for r in figures["ranks"])
        sizes = f"own share {share / 1e6:.0f} MB, packed {packed / 1e6:.0f} MB"
        print(f"{way:8} {figures['seconds']:.2f} s; a rank that owns nothing grows by {peak / 1e6:.0f} MB; {sizes}; "
              f"rank 0 by {figures['ranks'][0]['peak_bytes'] / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    app()
