"""Figures of the routers: health by layer, and a training run over its steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe.show.plots import BLUE, ORANGE, RED, All, Panel, curve, has, png
from moe.studies.study import Replicate

HEALTH = {
    "load_cv": "load\nstd / mean",
    "load_max_over_mean": "fullest\n/ mean",
    "load_dead": "share\nunused",
    "load_entropy": "evenness\nof load",
    "ep2_max_over_mean": "fullest\nEP 2 rank",
    "entropy": "router\nentropy",
    "kl": "KL from\nold router",
    "z_loss": "mean\nlogsumexp²",
    "balance_loss": "balance\nloss",
}


def router_health(axes: Any, everything: All) -> None:
    e = next(e for e in everything if has([e], "router/"))
    names = [name for name in HEALTH if has([e], f"router/{name}/layer_")]
    table = np.array([curve(e, f"router/{name}/layer_")[1][:, 0] for name in names]).T  # [L, metrics]
    span = table.max(0) - table.min(0)
    shade = (table - table.min(0)) / np.where(span > 0, span, 1)
    axes.imshow(shade, aspect="auto", cmap="Blues", vmin=0, vmax=1.6)
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8.5)
    axes.set_title("New router by layer (darker: the column's highest)")
    axes.set_xticks(range(len(names)), [HEALTH[name] for name in names], fontsize=8)
    axes.set_yticks(range(len(table)), [f"layer {i}" for i in range(len(table))])
    axes.grid(False)


def heat_map(replicate: Replicate, metric: str, title: str) -> bytes | None:
    """A training run: MoE layers down, steps across."""
    series = replicate.studies["watch"].series
    names = sorted(name for name in series if name.startswith("moe/layer_") and name.endswith("/" + metric))
    if not names:
        return None
    steps = [step for step, _ in series[names[0]]]
    table = np.array([[value for _, value in series[name]] for name in names])

    def panel(axes: Any, _: All) -> None:
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        axes.set_title(title)
        shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 12)).astype(int))
        axes.set_xticks(shown, [steps[i] for i in shown])
        axes.set_yticks(range(len(names)), [f"layer {int(name.split('/')[1][6:])}" for name in names])
        axes.set_xlabel("step")
        axes.grid(False)
        axes.figure.colorbar(image, ax=axes)

    return png([panel], [{}], 7.5, 0.6 + 0.35 * max(len(names), 5))


def over_time(replicate: Replicate, thresholds: dict[str, tuple[float | None, float | None]]) -> bytes | None:
    """A training run: the metrics that have thresholds, and those."""
    series = replicate.studies["watch"].series
    names = [name for name in thresholds if series.get(name)]

    def of(name: str) -> Panel:
        def panel(axes: Any, _: All) -> None:
            steps, values = zip(*series[name])
            axes.plot(steps, values, "o-", color=BLUE, markersize=3)
            for bound, color in zip(thresholds[name], (ORANGE, RED)):
                if bound is not None:
                    axes.axhline(bound, color=color, linewidth=1.2, linestyle="--")
            axes.set_title(name)
            axes.set_xlabel("step")
            if min(values) > 0 and max(values) > 30 * min(values):
                axes.set_yscale("log")

        return panel

    return png([of(name) for name in names], [{}], 3.4, 2.5, columns=3) if names else None
