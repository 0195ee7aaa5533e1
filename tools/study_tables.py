"""What tools.studies tabulates of its runs: columns, each a function of a run's metrics, and the Markdown table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mcore_rl.logs.metrics import read_metrics

ENDED_ITSELF = "ended_itself"  # beside the metrics of a run that failed before its last step
LENGTHS = (6, 13, 20)  # digits, of the held-out prompts on which a policy of mixed lengths is asked afterwards


@dataclass(frozen=True)
class Column:
    """One column of a table: `of` takes the rows of a finished run; None where the run has no such number."""

    title: str
    of: Callable[[list[dict]], float | None]
    form: str = "{:.2f}"
    over_seeds: str = "each"  # each: one number a seed; mean: one number

    def cell(self, runs: Sequence[list[dict]]) -> str:
        values = [self.of(rows) for rows in runs]
        known = [v for v in values if v is not None and not math.isnan(v)]
        if not known:
            return "-"
        if self.over_seeds == "mean":
            return self.form.format(statistics.fmean(known))
        return " ".join("-" if v is None else self.form.format(v) for v in values)


def first(key: str) -> Callable[[list[dict]], float | None]:
    return lambda rows: next((r[key] for r in rows if r.get(key) is not None), None)


def last(key: str) -> Callable[[list[dict]], float | None]:
    return lambda rows: next((r[key] for r in reversed(rows) if r.get(key) is not None), None)


def mean(*keys: str) -> Callable[[list[dict]], float | None]:
    """Over the steps that have all of `keys`, of their sum."""

    def of(rows: list[dict]) -> float | None:
        sums = [sum(r[k] for k in keys) for r in rows if all(r.get(k) is not None for k in keys)]
        return statistics.fmean(sums) if sums else None

    return of


def median(key: str) -> Callable[[list[dict]], float | None]:
    def of(rows: list[dict]) -> float | None:
        values = [r[key] for r in rows if r.get(key) is not None]
        return statistics.median(values) if values else None

    return of


def entropy_at(step: int) -> Callable[[list[dict]], float | None]:
    return lambda rows: next((r.get("policy/entropy") for r in rows if r["step"] == step), None)


def collapsed(rows: list[dict]) -> float | None:
    """The first step whose reward is below half of the best so far, for good; None where there is none."""
    rewards = [(r["step"], r["reward/mean"]) for r in rows if r.get("reward/mean") is not None]
    best = 0.0
    fallen = None
    for step, reward in rewards:
        best = max(best, reward)
        fallen = (fallen or step) if reward < best / 2 else None
    return fallen


def reward_of_last(count: int) -> Callable[[list[dict]], float | None]:
    """Mean over the last `count` rollouts."""
    return lambda rows: statistics.fmean([r["reward/mean"] for r in rows if "reward/mean" in r][-count:])


def held(rows: list[dict]) -> list[float]:
    """Parameters of every model in the trainer's memory, the policy among them."""
    return [n for key, n in rows[0].items() if key.startswith("memory/") and key.endswith("_parameters")]


LEARNING = (
    Column("accuracy before", first("eval/accuracy")),
    Column("after", last("eval/accuracy")),
    Column("pairs right, before", first("eval/pairs_accuracy")),
    Column("after", last("eval/pairs_accuracy")),
    Column("entropy, first step", first("policy/entropy"), "{:.3f}", "mean"),
    Column("step 20", entropy_at(20), "{:.3f}", "mean"),
    Column("last step", last("policy/entropy"), "{:.3f}", "mean"),
    Column("tokens clipped", mean("policy/clip_frac"), "{:.2%}", "mean"),
    Column("mean gate", mean("policy/gate_mean"), "{:.3f}", "mean"),
    Column("groups of one reward", mean("reward/equal_groups_frac"), "{:.2f}", "mean"),
    Column("groups kept", mean("rollout/kept_frac"), "{:.2f}", "mean"),
)
ROUTING = (
    Column("half of the best reward lost at step", collapsed, "{:.0f}"),
    Column("chi, first", first("moe/chi"), "{:.2f}"),
    Column("last", last("moe/chi"), "{:.2f}"),
    Column("flipped tokens, last", last("moe/flip_any"), "{:.2f}", "mean"),
)
FALL = (
    Column("reward of the first rollout", first("reward/mean")),
    Column("of the last five", reward_of_last(5)),
    Column("of all seeds, the last five", reward_of_last(5), "{:.3f}", "mean"),
    Column("ended itself after step", last("ended_at"), "{:.0f}"),
    Column("chi, first", first("moe/chi"), "{:.2f}"),
    Column("median", median("moe/chi"), "{:.2f}", "mean"),
    Column("flipped tokens, first", first("moe/flip_any"), "{:.2f}", "mean"),
)
CUT_OFF = (
    Column("responses cut off, first step", first("response/truncated_frac"), "{:.2f}", "mean"),
    Column("last step", last("response/truncated_frac"), "{:.2f}", "mean"),
)
DISCRIMINATOR = (
    *(
        Column(f"{kind}, {when}", of(f"discriminator/{name}"))
        for kind, name in (
            ("right on real", "real_accuracy"),
            ("on rejected", "rejected_accuracy"),
            ("on generated", "fake_accuracy"),
            ("AUC for the audit", "audit_auc"),
            ("AUC of length alone", "length_auc"),
        )
        for when, of in (("first", first), ("last", last))
    ),
    Column("KL to the reference, last", last("policy/kl_ref")),
)
BY_LENGTH = tuple(Column(f"{n} digits", last(f"accuracy_{n}")) for n in LENGTHS)
COST = (
    Column("models", lambda rows: float(len(held(rows))), "{:.0f}", "mean"),
    Column("their parameters, 1e6", lambda rows: sum(held(rows)) / 1e6, "{:.2f}", "mean"),
    Column("peak GB of the trainer", last("memory/trainer_peak_gb"), "{:.2f}", "mean"),
    Column("collect, s", median("time/collect_s"), "{:.2f}", "mean"),
    Column("score, s", median("time/score_s"), "{:.2f}", "mean"),
    Column("update, s", median("time/update_s"), "{:.2f}", "mean"),
    Column("discriminator, s", median("time/discriminator_s"), "{:.2f}", "mean"),
    Column("sync, s", median("time/sync_s"), "{:.3f}", "mean"),
)


def table(folder: Path, arms: Iterable[str], seeds: Sequence[int], columns: Sequence[Column]) -> str:
    """Markdown, one line an arm, of the runs that are finished."""
    lines = ["| | seeds | " + " | ".join(c.title for c in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm in arms:
        done = [seed for seed in seeds if is_done(folder / f"seed{seed}" / arm)]
        runs = [rows_of(folder / f"seed{seed}" / arm) for seed in done]
        if runs:
            cells = (column.cell(runs) for column in columns)
            lines.append(f"| {arm} | {' '.join(map(str, done))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_first(folder: Path, arms: Sequence[str], seeds: Sequence[int], count: int = 5) -> str:
    """Markdown: the reward of the last `count` rollouts of each arm less that of the first arm with the same seed.

    p is that of an exact two-sided sign-flip test of the mean of these differences: 2**-9 is the least of 10 seeds.
    """
    of = reward_of_last(count)
    rewards = {arm: [of(rows_of(folder / f"seed{seed}" / arm)) for seed in seeds] for arm in arms}
    lines = ["| | mean | below 0.05 | mean difference | p |", "|---|---|---|---|---|"]
    for arm, values in rewards.items():
        low = f"{sum(v < 0.05 for v in values)} of {len(values)}"
        differences = [v - other for v, other in zip(values, rewards[arms[0]], strict=True)]
        compared = f"{statistics.fmean(differences):+.3f} | {sign_flip(differences):.3g}" if any(differences) else " | "
        lines.append(f"| {arm} | {statistics.fmean(values):.3f} | {low} | {compared} |")
    return "\n".join(lines)


def sign_flip(differences: Sequence[float]) -> float:
    """Share of all 2**n choices of signs whose mean is at least as far from 0."""
    far = abs(sum(differences)) * (1 - 1e-12)
    sums = [abs(sum(s * d for s, d in zip(signs, differences))) for signs in product((1, -1), repeat=len(differences))]
    return sum(total >= far for total in sums) / len(sums)


def is_done(run_dir: Path) -> bool:
    """Whether a run has come to its end, or to one of its own before that."""
    return any((run_dir / last).exists() for last in ("report.png", ENDED_ITSELF))


def rows_of(run_dir: Path) -> list[dict]:
    """Metrics of a run, with the accuracies that were asked for afterwards: in its last row, "before" in its first."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    if (run_dir / ENDED_ITSELF).exists():
        rows[-1]["ended_at"] = float(rows[-1]["step"])
    for path in run_dir.glob("accuracy_*.json"):
        accuracy = json.loads(path.read_text())["eval/accuracy"]
        key = "eval/accuracy" if path.stem in ("accuracy_before", "accuracy_after") else path.stem
        rows[0 if path.stem == "accuracy_before" else -1][key] = accuracy
    return rows
