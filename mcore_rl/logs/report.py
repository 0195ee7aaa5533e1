"""A run at a glance: report.png drawn from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mcore_rl.logs.metrics import read_metrics

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db5", "#e07b39", "#3a9a5b", "#c0392b", "#8a8a8a"
PHASE_COLORS = (BLUE, ORANGE, GREEN, RED, "#8e6bb8", "#8c6d5a", "#d487b5", GREY)
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 9,
    "legend.frameon": False,
}
Rows = list[dict[str, Any]]
Panel = Callable[[Any, Rows], bool]  # draws into the axes; False if the run has none of its metrics


def write_report(run_dir: str | Path) -> Path:
    """Draw `run_dir`/report.png: reward, accuracy, entropy, time by phase, trainer against engine, throughput; with a
    discriminator also what the rule and it say.

    Panels whose metrics the run did not log are left out.

    Raises:
        ValueError: there is no metrics.jsonl, or nothing in it.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{str(run_dir / 'metrics.jsonl')!r} is empty: the run ended before its first step")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _figure(rows, run_dir.name)
        path = run_dir / "report.png"
        figure.savefig(path, dpi=130)
    return path


def _figure(rows: Rows, title: str) -> Any:
    """The panels that have data, three in a row, drawn without a display or pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [panel for panel in PANELS if panel(Figure().subplots(), rows)]
    columns = min(3, max(1, len(drawn)))
    lines = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(4.6 * columns, 3.1 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, axes in zip(drawn, grid):
        panel(axes, rows)
        axes.set_xlabel("step")
        axes.set_xlim(rows[0]["step"] - 0.6, rows[-1]["step"] + 0.6)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    figure.suptitle(f"{title}: {rows[-1]['step']} steps", fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that hold `key`; null is NaN, a gap in the curve."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    steps, values = zip(*found) if found else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _line(axes: Any, rows: Rows, key: str, color: str, label: str | None = None) -> bool:
    steps, values = _series(rows, key)
    if np.isfinite(values).any():
        marker = "o" if len(steps) < 25 else None
        axes.plot(steps, values, color=color, label=label, linewidth=1.8, marker=marker, markersize=3.5)
        return True
    return False


def _reward(axes: Any, rows: Rows) -> bool:
    axes.set_title("Reward of rollouts, mean ± std")
    both = [row for row in rows if "reward/std" in row]
    steps, mean = _series(both, "reward/mean")
    _, std = _series(both, "reward/std")
    axes.fill_between(steps, mean - std, mean + std, color=BLUE, alpha=0.15, linewidth=0)
    return _line(axes, rows, "reward/mean", BLUE)


def _audit(axes: Any, rows: Rows) -> bool:
    axes.set_title("Rule's reward of rollouts, an audit")
    return _line(axes, rows, "reward/audit_mean", BLUE)


def _discriminator(axes: Any, rows: Rows) -> bool:
    axes.set_title("Discriminator, right on unseen sequences")
    axes.set_ylim(0, 1.02)
    colors = {"real": GREEN, "rejected": ORANGE, "fake": RED}
    drawn = [_line(axes, rows, f"discriminator/{kind}_accuracy", color, kind) for kind, color in colors.items()]
    if any(drawn):
        axes.legend(fontsize=7.5)
    return any(drawn)


def _loss(axes: Any, rows: Rows) -> bool:
    axes.set_title("Training loss")
    return "reward/mean" not in rows[-1] and _line(axes, rows, "policy/loss", BLUE)


def _accuracy(axes: Any, rows: Rows) -> bool:
    axes.set_title("Accuracy on held-out prompts")
    axes.set_ylim(0, 1.02)
    steps, values = _series(rows, "eval/accuracy")
    if not _line(axes, rows, "eval/accuracy", GREEN):
        return False
    for which, offset, side in ((0, -13, "left"), (-1, 8, "right"))[: len(steps)]:
        place = dict(xytext=(0, offset), textcoords="offset points", ha=side)
        axes.annotate(f"{values[which]:.2f}", (steps[which], values[which]), **place)
    return True


def _entropy(axes: Any, rows: Rows) -> bool:
    axes.set_title("Policy entropy, nats a token")
    return _line(axes, rows, "policy/entropy", ORANGE) and _from_zero(axes)


def _time(axes: Any, rows: Rows) -> bool:
    axes.set_title("Seconds a step, by phase")
    keys = sorted({key for row in rows for key in row if key.startswith("time/") and key != "time/step_s"})
    timed = [row for row in rows if any(key in row for key in keys)]
    if not timed:
        return False
    seconds = np.array([[row.get(key) or 0.0 for row in timed] for key in keys])  # [phases, steps]
    order = np.argsort(-seconds.sum(axis=1))
    steps = np.array([row["step"] for row in timed])
    bottom = np.zeros(len(timed))
    for color, which in zip(PHASE_COLORS * len(keys), order):
        share = seconds[which].sum() / max(seconds.sum(), 1e-12)
        label = f"{keys[which][5:-2]} {share:.0%}"
        axes.bar(steps, seconds[which], width=1.0, bottom=bottom, color=color, label=label, linewidth=0)
        bottom = bottom + seconds[which]
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, bottom.max() * 1.35)  # room for the legend above the bars
    axes.legend(fontsize=7.5, ncols=3, loc="upper left", handlelength=1, columnspacing=1)
    return True


def _difference(axes: Any, rows: Rows) -> bool:
    axes.set_title("Engine against trainer")
    drawn = [
        _log_line(axes, rows, "weight_sync/logprob_max_diff", RED, "max |Δ log-prob| after sync"),
        _log_line(axes, rows, "mismatch/k3", GREY, "mismatch k3"),
    ]
    if any(drawn):
        axes.set_yscale("log")
        axes.legend(fontsize=7.5)
    return any(drawn)


def _log_line(axes: Any, rows: Rows, key: str, color: str, label: str) -> bool:
    """As `_line`, without the zeros that a logarithmic axis cannot show."""
    return _line(axes, [row for row in rows if (row.get(key) or 0) > 0], key, color, label)


def _throughput(axes: Any, rows: Rows) -> bool:
    axes.set_title("Tokens a second")
    drawn = [
        _line(axes, rows, "rollout/tokens_per_s", BLUE, "rollout"),
        _line(axes, rows, "train/tokens_per_s", ORANGE, "training"),
    ]
    if any(drawn):
        axes.legend(fontsize=7.5, loc="lower left")
    return any(drawn) and _from_zero(axes)


def _from_zero(axes: Any) -> bool:
    axes.set_ylim(0, axes.dataLim.y1 * 1.1 or 1)
    return True


PANELS: tuple[Panel, ...] = (
    _reward, _audit, _loss, _accuracy, _discriminator, _entropy, _time, _difference, _throughput
)  # fmt: skip
