"""Print what runs started from, where they ended, and where their time went.

python -m tools.summarise RUN_DIR [RUN_DIR ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mcore_rl.logs.metrics import read_metrics


def summary(run_dir: Path) -> dict[str, float | int | str]:
    """Start and end of one run, from its metrics.jsonl."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    accuracy = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    reward = [r["reward/mean"] for r in rows if "reward/mean" in r]
    diffs = [r["weight_sync/logprob_max_diff"] for r in rows if "weight_sync/logprob_max_diff" in r]
    return {
        "run": str(run_dir),
        "phase": rows[-1]["phase"],
        "steps": rows[-1]["step"],
        "accuracy_start": accuracy[0],
        "accuracy_end": accuracy[-1],
        "reward_first": reward[0] if reward else float("nan"),
        "reward_last": reward[-1] if reward else float("nan"),
        "sync_worst_diff": max(diffs, default=float("nan")),
        "seconds": sum(v for r in rows for k, v in r.items() if k.startswith("time/")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object a run instead of a table")
    args = parser.parse_args()
    try:
        rows = [summary(d) for d in args.run_dirs]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(title="held-out accuracy, sampled", box=None, title_justify="left")
    for column in ("run", "steps", "accuracy", "reward", "sync diff", "minutes"):
        table.add_column(
            column, justify="left" if column == "run" else "right", no_wrap=column != "run", overflow="fold"
        )
    for r in rows:
        reward = "-" if r["reward_first"] != r["reward_first"] else f"{r['reward_first']:.2f} -> {r['reward_last']:.2f}"
        table.add_row(
            r["run"],
            str(r["steps"]),
            f"{r['accuracy_start']:.2f} -> {r['accuracy_end']:.2f}",
            reward,
            f"{r['sync_worst_diff']:.1e}",
            f"{r['seconds'] / 60:.1f}",
        )
    Console().print(table)
    for d in args.run_dirs:
        print(f"{d}: config.yaml metrics.jsonl report.png checkpoints/ hf/")


if __name__ == "__main__":
    main()
