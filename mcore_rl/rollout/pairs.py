"""Preference pairs from scored rollouts: the best and the worst response to a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mcore_rl.types import RolloutGroup


def pairs_of(groups: Iterable[RolloutGroup]) -> list[dict[str, Any]]:
    """Rows for `data.task=file` with `chosen` and `rejected`; a group whose rewards are all equal gives none.

    Only responses that ended by themselves take part: one cut off at the length limit has no end to learn.

    Args:
        groups: scored.
    """
    rows = []
    for group in groups:
        ended = [t for t in group.trajectories if t.finish_reason == "stop"]
        if not ended:
            continue
        best, worst = max(ended, key=lambda t: t.reward), min(ended, key=lambda t: t.reward)
        if best.reward > worst.reward:
            row = {"prompt": group.prompt.text, "chosen": best.text, "rejected": worst.text}
            if group.prompt.answer is not None:
                row["answer"] = group.prompt.answer
            rows.append({**row, "chosen_reward": best.reward, "rejected_reward": worst.reward})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines, written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial.rename(path)
