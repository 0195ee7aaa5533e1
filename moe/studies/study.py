"""What one command found, as files: KIND.json for programs, KIND.csv for spreadsheets.

A folder is one replicate: the studies of one pair of policies, of one seed. `pooled` reads several folders, and a claim
that must not hang on one seed is judged on all of them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.measure.compare import Estimates
from moe.measure.stats import Estimate

KINDS = ("record", "compare", "sweep", "objectives", "mismatch", "exact", "watch")


@dataclass(frozen=True)
class Study:
    """One command's findings.

    Attributes:
        kind: one of KINDS.
        command: what was typed, so that it can be typed again.
        facts: what was looked at (models, numbers of prompts, answers and tokens, seed, versions), plain JSON values.
        estimates: numbers by name with their 95% intervals.
        series: name -> (step, value) pairs, of a training run.
    """

    kind: str
    command: str
    facts: Mapping[str, Any]
    estimates: Estimates
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write KIND.json and KIND.csv into the folder, which is made; returns the former's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = {name: [_plain(x) for x in (e.value, e.low, e.high)] for name, e in self.estimates.items()}
        content = {"kind": self.kind, "command": self.command, "facts": self.facts, "estimates": rows}
        if self.series:
            content["series"] = {k: [[s, _plain(x)] for s, x in pairs] for k, pairs in self.series.items()}
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["name", "value", "low", "high"])
        writer.writerows([name, *("" if x is None else x for x in values)] for name, values in rows.items())
        write(folder / f"{self.kind}.csv", table.getvalue())
        return write(folder / f"{self.kind}.json", json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Raises ValueError where the file is not what `save` wrote."""
        try:
            content = json.loads(Path(path).read_text())
            found = {name: Estimate(*map(_number, row)) for name, row in content["estimates"].items()}
            series = {k: [(s, _number(x)) for s, x in pairs] for k, pairs in content.get("series", {}).items()}
            return cls(content["kind"], content["command"], content["facts"], found, series)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(path)!r} is no study of moe-stability: {error!r}") from error


@dataclass(frozen=True)
class Replicate:
    """All studies of one folder."""

    name: str
    studies: Mapping[str, Study]  # by kind

    @property
    def estimates(self) -> Estimates:
        """Of all of them; names of different kinds differ."""
        return {name: e for study in self.studies.values() for name, e in study.estimates.items()}


def pooled(folders: Sequence[str | Path]) -> list[Replicate]:
    """The studies of every folder.

    Raises:
        ValueError: a folder without studies.
    """
    found = []
    for folder in map(Path, folders):
        studies = {kind: Study.load(folder / f"{kind}.json") for kind in KINDS if (folder / f"{kind}.json").is_file()}
        if not studies:
            names = ", ".join(f"{kind}.json" for kind in KINDS)
            raise ValueError(f"{str(folder)!r} holds no study: one of {names}; pass what --out of a command was")
        found.append(Replicate(folder.name, studies))
    return found


def write(path: Path, content: str | bytes) -> Path:
    """Write a file in one move: a reader sees the old content or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)
    return path


def _plain(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _number(x: float | None) -> float:
    return math.nan if x is None else float(x)
