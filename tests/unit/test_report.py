import json

import numpy as np
import pytest
from PIL import Image

from mcore_rl.logs.report import PANELS, _figure, write_report


def full_row(step: int) -> dict:
    return {
        "step": step,
        "phase": "grpo",
        "reward/mean": 0.3 + step / 100,
        "reward/std": 0.4,
        "policy/entropy": 0.5,
        "policy/loss": 0.0,
        "weight_sync/logprob_max_diff": 1e-6,
        "mismatch/k3": 0.0,
        "rollout/tokens_per_s": 9000.0,
        "train/tokens_per_s": 4000.0,
        "time/collect_s": 1.0,
        "time/update_s": 2.0,
    } | ({"eval/accuracy": 0.5, "time/evaluate_s": 0.3} if step % 5 == 0 else {})


def titles(rows: list[dict]) -> list[str]:
    return [axes.get_title() for axes in _figure(rows, "x").axes if axes.axison]


def write(run_dir, rows):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_picture_has_every_panel_the_run_has_metrics_for(tmp_path):
    rows = [full_row(step) for step in range(20)]
    write(tmp_path, rows)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.png"
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[1] > 1500
    assert 0.001 < (pixels < 128).mean() < 0.5  # drawn, on a light ground
    assert titles(rows) == [
        "Reward of rollouts, mean ± std",
        "Accuracy on held-out prompts",
        "Policy entropy, nats a token",
        "Seconds a step, by phase",
        "Engine against trainer",
        "Tokens a second",
    ]


def test_a_discriminator_has_its_panels():
    kinds = {f"discriminator/{kind}_accuracy": 0.7 for kind in ("real", "rejected", "fake")}
    rows = [full_row(step) | kinds | {"reward/audit_mean": step / 10} for step in range(3)]
    assert {"Rule's reward of rollouts, an audit", "Discriminator, right on unseen sequences"} < set(titles(rows))


def test_the_curves_are_the_metrics():
    rows = [full_row(step) for step in range(11)]
    reward, accuracy, _, seconds, *_ = _figure(rows, "x").axes
    np.testing.assert_allclose(reward.lines[0].get_xydata(), [(s, 0.3 + s / 100) for s in range(11)])
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [(0, 0.5), (5, 0.5), (10, 0.5)])
    tops = {round(bar.get_y() + bar.get_height(), 6) for bar in seconds.patches}
    assert max(tops) == 3.3  # collect + update + evaluate, on top of each other
    labels = [text.get_text() for text in seconds.get_legend().get_texts()]
    assert labels == ["update 65%", "collect 32%", "evaluate 3%"]  # of 22 + 11 + 0.9 seconds


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([full_row(1)], 5),
        ([{"step": 0, "phase": "grpo", "eval/accuracy": 0.3}], 1),
        ([{"step": 0, "phase": "sft", "policy/loss": 2.0}, {"step": 1, "phase": "sft", "policy/loss": None}], 1),
        ([{"step": 0, "phase": "grpo"}], 0),
        ([{"step": s, "phase": "grpo", "reward/mean": None} for s in range(3)], 0),
    ],
)
def test_short_runs_and_missing_metrics(tmp_path, rows, expected):
    write(tmp_path, rows)
    assert write_report(tmp_path).stat().st_size > 1000
    assert len(titles(rows)) == expected <= len(PANELS)


def test_no_metrics(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path)
    write(tmp_path, [])
    with pytest.raises(ValueError, match="is empty"):
        write_report(tmp_path)
