"""Figures of steps 5 to 7: objectives on one batch, exact bias, and the mismatch of trainer and engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moe.measure.scoring import SIGMAS
from moe.show.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, All, curve, draw, has


def toggles(axes: Any, everything: All) -> None:
    axes.set_title("Decisions that flips turn round, at equal share")
    for kind, color in (("token", ORANGE), ("sequence", BLUE)):
        draw(axes, everything, "clip/matched_", f"/{kind}/toggled", color, f"{kind} clip", 100)
    axes.set_xlabel("share of tokens dropped")
    axes.set_ylabel("% of tokens")
    axes.set_ylim(0)
    axes.legend()


def _objectives(everything: All) -> list[str]:
    names = dict.fromkeys(n.split("/")[1] for e in everything for n in e if n.startswith("objectives/"))
    return [n for n in names if "published" not in n][::-1]


def _bars(
    axes: Any,
    everything: All,
    suffix: str,
    color: str,
    label: str,
    offset: float,
    finish: Callable[[float], float] = float,
) -> None:
    """A point a replicate for every objective, with its interval."""
    for y, name in enumerate(_objectives(everything)):
        for i, e in enumerate(everything):
            if (key := f"objectives/{name}/{suffix}") in e:
                value, low, high = (finish(x) for x in (e[key].value, e[key].low, e[key].high))
                place = y + offset + 0.09 * (i - (len(everything) - 1) / 2)
                axes.plot([low, high], [place, place], color=color, linewidth=1.2, alpha=0.6)
                text = label if y == 0 and i == 0 else None
                axes.plot(value, place, "o", color=color, markersize=4, label=text)
    axes.set_yticks(range(len(_objectives(everything))), _objectives(everything))
    axes.set_ylim(-0.6, len(_objectives(everything)) - 0.4)


def sensitivity(axes: Any, everything: All) -> None:
    axes.set_title("Change of the gradient by router noise")
    for sigma, color, offset in zip(SIGMAS, (BLUE, RED), (-0.15, 0.15)):
        _bars(axes, everything, f"noise/{sigma:g}", color, f"noise {sigma:g}", offset, lambda x: max(x, 1e-4))
    axes.set_xscale("log")
    axes.set_xlabel("|g noisy - g| / |g| (left edge: 0)")
    axes.legend(loc="center left")


def bias(axes: Any, everything: All) -> None:
    axes.set_title("Squared bias against fresh answers")
    _bars(axes, everything, "bias2", GREEN, "batch", 0.0)
    noise = [e["reference/noise2"].value for e in everything if "reference/noise2" in e]
    noise = [x for x in noise if math.isfinite(x)]
    if not noise:
        text = "the reference's gradient is lost in its noise:\ngive more prompts or answers"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=RED)
    else:
        axes.axvspan(0, max(noise), color=GREY, alpha=0.15, label="the reference's own noise")
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("|E g - E g*|² / |E g*|²")
    axes.legend(loc="upper left", frameon=True)


def used(axes: Any, everything: All) -> None:
    axes.set_title("Dropped, and effective sample size")
    _bars(axes, everything, "dropped", ORANGE, "tokens dropped", -0.15)
    _bars(axes, everything, "ess", PURPLE, "effective sample size", 0.15)
    axes.set_xlim(-0.03, 1.03)
    axes.legend(loc="center")


EXACT = {
    "no ratio": GREY,
    "token": BLUE,
    "token clip": RED,
    "SAPO": GREEN,
    "GSPO": PURPLE,
    "prefix": ORANGE,
}


def exact(axes: Any, everything: All) -> None:
    axes.set_title("Exact bias, all answers enumerated")
    e = next(e for e in everything if has([e], "exact/"))
    x = curve(e, "exact/", "/spread")[1][:, 0]
    for name, color in EXACT.items():
        axes.plot(x, curve(e, "exact/", f"/{name}/bias")[1][:, 0], "o-", color=color, markersize=3.5, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("standard deviation of the token log-ratio")
    axes.set_ylabel("|E g - g| / |g| (product: 0)")
    axes.legend(ncols=2)


# ---------------------------------------------------------------- step 7


def dtypes(everything: All) -> list[str]:
    return list(dict.fromkeys(n.split("/")[1] for e in everything for n in e if n.startswith("mismatch/")))


def mismatch(axes: Any, everything: All) -> None:
    axes.set_title("Trainer against engine: divergence k3")
    places = dtypes(everything)
    for kind, color, offset in (("free", RED, -0.12), ("replayed", GREEN, 0.12)):
        for x, dtype in enumerate(places):
            for i, e in enumerate(everything):
                if (key := f"mismatch/{dtype}/{kind}/k3") in e:
                    place = x + offset + 0.05 * (i - (len(everything) - 1) / 2)
                    axes.plot([place] * 2, [max(e[key].low, 1e-16), e[key].high], color=color, linewidth=1.2)
                    label = f"{'own routes' if kind == 'free' else 'on the engine’s routes'}"
                    axes.plot(place, e[key].value, "o", color=color, markersize=5, label=None if x or i else label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(places)), [f"{dtype} engine" for dtype in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.legend()


def mismatch_bins(axes: Any, everything: All) -> None:
    axes.set_title("Mean |d| by probability, bf16 engine")
    found = {n.split("/")[4] for e in everything for n in e if "/bin/" in n}
    edges = sorted(found, key=lambda edge: float(edge.split("-")[0]))
    for kind, color, label in (("free", RED, "own routes"), ("replayed", GREEN, "on the engine’s routes")):
        for i, e in enumerate(everything):
            points = [(x, e.get(f"mismatch/bfloat16/{kind}/bin/{edge}/abs_mean")) for x, edge in enumerate(edges)]
            points = [(x, y.value) for x, y in points if y is not None]
            if points:
                axes.plot(*zip(*points), "o-", color=color, markersize=4, label=None if i else label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(edges)), edges)
    axes.set_xlabel("the engine's probability of the token")
    axes.set_ylabel("nats")
    axes.legend()
