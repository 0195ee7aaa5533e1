"""tools.summarise reads what a run has logged."""

import json

import pytest

from tools.summarise import summary


def test_start_and_end(tmp_path):
    rows = [
        {"step": 0, "phase": "grpo", "eval/accuracy": 0.25},
        {"step": 1, "phase": "grpo", "reward/mean": 0.3, "weight_sync/logprob_max_diff": 2e-6, "time/update_s": 1.5},
        {"step": 2, "phase": "grpo", "reward/mean": 0.4, "weight_sync/logprob_max_diff": 1e-6, "time/update_s": 0.5},
        {"step": 3, "phase": "grpo", "reward/mean": 0.5, "eval/accuracy": 0.75, "time/collect_s": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert summary(tmp_path) == {
        "run": str(tmp_path),
        "phase": "grpo",
        "steps": 3,
        "accuracy_start": 0.25,
        "accuracy_end": 0.75,
        "reward_first": 0.3,
        "reward_last": 0.5,
        "sync_worst_diff": 2e-6,
        "seconds": 4.0,
    }
    with pytest.raises(ValueError, match="does not exist"):
        summary(tmp_path / "nothing")
