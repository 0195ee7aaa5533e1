"""The routers of a training run: ok, watch or unstable, why, and which knob to turn. Pure functions of its metrics.

Every threshold says where it comes from. They are alarms to look at, not proofs: a run can go wrong with all of them
quiet, and a healthy one can raise some.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class Level(IntEnum):
    OK = 0
    WATCH = 1
    UNSTABLE = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Threshold:
    """When a metric is worth a look.

    Attributes:
        metric: its name in metrics.jsonl.
        watch, unstable: values from which it is (with `below`, down to which); None: never.
        source: where the values come from. knob: what to change.
    """

    metric: str
    watch: float | None
    unstable: float | None
    meaning: str
    source: str
    knob: str
    below: bool = False

    def level(self, value: float) -> Level:
        """NaN, which no threshold can be compared with, is unstable."""
        if math.isnan(value):
            return Level.UNSTABLE
        sign = -1 if self.below else 1
        for level, bound in ((Level.UNSTABLE, self.unstable), (Level.WATCH, self.watch)):
            if bound is not None and sign * value >= sign * bound:
                return level
        return Level.OK


REPLAY = "moe.routing_replay=rollout (R3), or rollout.dtype of the trainer"
THRESHOLDS = (
    Threshold(
        "mismatch/k3", 1e-2, 1e-1, "divergence of trainer and rollout engine",
        "1.5e-3 is usual for a 30B MoE (arXiv 2510.11370); verl calls above 0.1 trouble", REPLAY,
    ),
    Threshold(
        "mismatch/abs_max", 5.0, 20.0, "largest log-prob difference of trainer and engine, nats",
        "climbs to about 26 before a collapse (arXiv 2510.18855)",
        REPLAY + "; algorithm.correction=icepop_token",
    ),
    Threshold(
        "mismatch/flip_any", 0.5, None, "share of tokens whose routes differ between engine and trainer",
        "94% at 48 layers without a collapse by itself (arXiv 2510.11370): only to be watched", REPLAY,
    ),
    Threshold(
        "moe/flip_expert", 0.1, 0.3, "share of chosen experts replaced by one training step",
        "about 10% an update is reported as harmful to token ratios (arXiv 2507.18071); 30% is this project's choice",
        "a lower optimizer.lr, fewer batch.mini_batches, or moe.routing_replay=old (R2)",
    ),
    Threshold(
        "moe/chi", 1.0, None, "variance of the flips' part of log-ratios over that of the weights' part",
        "above 1 the sequence ratio is nearer to the weights' own: an identity (moe/measure/decompose.py)",
        "algorithm.name=gspo, or moe.routing_replay=old (R2)",
    ),
    Threshold(
        "moe/dead_experts_frac", 0.1, 0.5, "share of experts without a token in the watched batch",
        "this project's choice; small batches leave experts empty by chance",
        "model.freeze_router=true, or a lower optimizer.lr",
    ),
    Threshold(
        "moe/load_max_over_mean", 4.0, None, "tokens of the fullest expert over the mean",
        "this project's choice: the fullest expert-parallel rank sets the pace",
        "model.moe_aux_loss_coef (biases the policy), or another expert placement",
    ),
    Threshold(
        "moe/gamma_below_0.7", 0.01, 0.1, "share of tokens whose router moved by more than exp(-0.7)",
        "0.7 is where RSPO masks a token (arXiv 2510.23027); the shares are this project's choice",
        "moe.router_shift=true, or model.freeze_router=true",
    ),
    Threshold(
        "policy/entropy", 0.02, 0.002, "entropy of the policy, nats a token",
        "this project's choice: near 0 every answer to a prompt is the same and nothing is learned",
        "algorithm.entropy_coef, or DAPO's clip_high=0.28", below=True,
    ),
)  # fmt: skip
FELL = 0.5  # accuracy below this share of its best so far is a collapse


@dataclass(frozen=True)
class Alarm:
    """One metric at one step that passed its threshold."""

    level: Level
    step: int
    metric: str
    value: float
    reason: str
    knob: str

    def __str__(self) -> str:
        return f"{self.level}: step {self.step}: {self.reason}. Try {self.knob}"


def alarms_of(row: Mapping[str, Any], step: int) -> list[Alarm]:
    """What one step's metrics raise, the worst first. A metric logged as null is NaN."""
    found = []
    for t in THRESHOLDS:
        if t.metric in row:
            value = math.nan if row[t.metric] is None else float(row[t.metric])
            if (level := t.level(value)) > Level.OK:
                bound = t.unstable if level is Level.UNSTABLE and t.unstable is not None else t.watch
                side = "at most" if t.below else "at least"
                reason = f"{t.metric} = {value:.3g} ({t.meaning}) is {side} {bound:g}"
                found.append(Alarm(level, step, t.metric, value, reason, t.knob))
    return sorted(found, key=lambda alarm: -alarm.level)


def collapse(rows: Sequence[Mapping[str, Any]], metric: str = "eval/accuracy") -> Alarm | None:
    """The last value of accuracy has fallen below half of its best: whatever the routers say, the run is lost."""
    seen = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    if len(seen) < 2:
        return None
    best, (step, last) = max(value for _, value in seen), seen[-1]
    if last >= FELL * best:
        return None
    reason = f"{metric} = {last:.3g} has fallen below {FELL:g} of its best, {best:.3g}"
    return Alarm(Level.UNSTABLE, step, metric, last, reason, "an earlier checkpoint and a lower optimizer.lr")


def judge_run(rows: Sequence[Mapping[str, Any]], recent: int = 5) -> tuple[Level, list[Alarm]]:
    """A run's level now, from the last `recent` logged values of every metric, and all alarms of the run by step.

    A metric counts once it is beyond its threshold in most of its recent values: one step can be chance.
    """
    alarms = [alarm for row in rows for alarm in alarms_of(row, row["step"])]
    level = Level.OK
    for t in THRESHOLDS:
        last = [row for row in rows if t.metric in row][-recent:]
        levels = sorted(t.level(math.nan if row[t.metric] is None else row[t.metric]) for row in last)
        if levels:
            level = max(level, levels[(len(levels) - 1) // 2])
    if (fell := collapse(rows)) is not None:
        alarms.append(fell)
        level = Level.UNSTABLE
    return Level(level), alarms


def first_of_each(alarms: Iterable[Alarm]) -> list[Alarm]:
    """The first alarm of each metric and level: what a person reads."""
    found: dict[tuple[str, Level], Alarm] = {}
    for alarm in alarms:
        found.setdefault((alarm.metric, alarm.level), alarm)
    return sorted(found.values(), key=lambda a: (-a.level, a.step))
