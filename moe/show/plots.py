"""How the report draws, and the figures of steps 1 to 4.

A panel draws the estimates of all replicates into axes: as separate thin lines or points of one colour, never averaged.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe.measure.compare import Estimates

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db5", "#d9722e", "#3a9a5b", "#c0392b", "#7d5ba6", "#8a8a8a"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
VAGUE = 0.1  # share of its value below which the interval of a point that says little reaches
NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")
All = Sequence[Estimates]
Panel = Callable[[Any, All], None]


def png(panels: Sequence[Panel], everything: All, width: float = 5.0, height: float = 3.4, columns: int = 2) -> bytes:
    """The panels, `columns` in a row, drawn without a display or pyplot's global state; sizes in inches a panel."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, axes in zip(panels, places):
            panel(axes, everything)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        out = io.BytesIO()
        figure.savefig(out, dpi=140)
    return out.getvalue()


def has(everything: All, *prefixes: str) -> bool:
    """Whether any replicate measured something under each of the prefixes."""
    return all(any(name.startswith(prefix) for e in everything for name in e) for prefix in prefixes)


def curve(e: Estimates, prefix: str, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """x [n] and (value, low, high) [n, 3] of the names prefix + number + suffix, by the number."""
    found = {}
    for name, estimate in e.items():
        if name.startswith(prefix) and name.endswith(suffix):
            middle = name[len(prefix) : len(name) - len(suffix)]
            if NUMBER.fullmatch(middle):
                found[float(middle)] = (estimate.value, estimate.low, estimate.high)
    x = sorted(found)
    return np.array(x), np.array([found[i] for i in x]).reshape(-1, 3)


def draw(axes: Any, everything: All, prefix: str, suffix: str, color: str, label: str, scale: float = 1.0) -> None:
    """A line a replicate, with the interval as a band where there is one replicate only.

    Points whose interval reaches below a tenth of their value are hollow, and the line to them is thin.
    """
    for i, e in enumerate(everything):
        x, y = curve(e, prefix, suffix)
        if len(x):
            text = None if i else label
            vague = ~(y[:, 1] >= VAGUE * y[:, 0])
            firm = np.where(vague, np.nan, scale * y[:, 0])
            axes.plot(
                x, scale * y[:, 0], color=color, marker="o", markersize=3.5, linewidth=0.6, markerfacecolor="white"
            )
            axes.plot(x, firm, color=color, marker="o", markersize=3.5, linewidth=1.5, label=text)
            if len(everything) == 1:
                axes.fill_between(x, scale * y[:, 1], scale * y[:, 2], color=color, alpha=0.15, linewidth=0)


def guide(axes: Any, x: np.ndarray, y: np.ndarray, label: str) -> None:
    axes.plot(x, y, color=GREY, linestyle="--", linewidth=1, label=label, zorder=1)


# ---------------------------------------------------------------- step 1


def flips_by_layer(axes: Any, everything: All) -> None:
    axes.set_title("Changed sets of experts, by MoE layer")
    for i, e in enumerate(everything):
        x, y = curve(e, "flips/set/layer_")
        offset = 0.12 * (i - (len(everything) - 1) / 2)
        error = np.abs(y[:, 1:] - y[:, :1]).T * 100
        axes.errorbar(x + offset, 100 * y[:, 0], yerr=error, fmt="o", color=BLUE, markersize=4, capsize=2, linewidth=1)
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("% of tokens")
    axes.set_ylim(0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def flips_by_margin(axes: Any, everything: All) -> None:
    axes.set_title("Flips by tenth of the margins")
    draw(axes, everything, "margins/flips_in_decile/", "", BLUE, "flips", 100)
    axes.set_xlabel("tenth of the margins (1: nearest ties)")
    axes.set_ylabel("% of (token, layer)")
    axes.set_ylim(0)
    axes.set_xticks(range(1, 11))


def flips_by_update(axes: Any, everything: All) -> None:
    axes.set_title("Flips by update")
    for suffix, color, label in (
        ("/flips/expert", GREEN, "experts replaced"),
        ("/flips/set", BLUE, "sets changed"),
        ("/flips/token_any", ORANGE, "tokens with any change"),
    ):
        draw(axes, everything, "update/", suffix, color, label, 100)
    axes.set_xlabel("policy after OLD, in the order given")
    axes.set_ylabel("%")
    axes.set_ylim(0)
    axes.legend()
    axes.xaxis.get_major_locator().set_params(integer=True)


def parts_by_update(axes: Any, everything: All) -> None:
    axes.set_title("Variance of both parts of z, by update")
    draw(axes, everything, "update/", "/var_w", BLUE, "weights, z_w")
    draw(axes, everything, "update/", "/var_r", ORANGE, "routing, z_r")
    axes.set_xlabel("policy after OLD, in the order given")
    axes.set_yscale("log")
    axes.set_ylabel("nats squared")
    axes.legend()
    axes.xaxis.get_major_locator().set_params(integer=True)


def chi_by_update(axes: Any, everything: All) -> None:
    axes.set_title("chi, by update")
    draw(axes, everything, "update/", "/chi", PURPLE, "chi")
    axes.axhline(1, color=RED, linewidth=1.2)
    axes.set_xlabel("policy after OLD, in the order given")
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)


# ---------------------------------------------------------------- steps 2 and 3


def _alpha_axis(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("step a in old + a (new - old)")


def _log_axes(axes: Any, label: str) -> None:
    _alpha_axis(axes)
    axes.set_yscale("log")
    axes.set_ylabel(label)


def sweep_variances(axes: Any, everything: All) -> None:
    axes.set_title("Variance of both parts of z")
    draw(axes, everything, "sweep/", "/var_w", BLUE, "weights, z_w")
    draw(axes, everything, "sweep/", "/var_r", ORANGE, "routing, z_r")
    x, y = curve(everything[0], "sweep/", "/var_w")
    guide(axes, x, y[-1, 0] * (x / x[-1]) ** 2, "slope 2")
    x, y = curve(everything[0], "sweep/", "/var_r")
    axes.plot(x, y[-1, 0] * (x / x[-1]), color=GREY, linestyle=":", linewidth=1.2, label="slope 1", zorder=1)
    _log_axes(axes, "nats squared")
    axes.legend()


def sweep_flips(axes: Any, everything: All) -> None:
    axes.set_title("Flips")
    draw(axes, everything, "sweep/", "/token_any", ORANGE, "tokens with any change")
    draw(axes, everything, "sweep/", "/set", BLUE, "sets changed")
    x, y = curve(everything[0], "sweep/", "/set")
    guide(axes, x, y[-1, 0] * (x / x[-1]), "slope 1")
    _log_axes(axes, "share")
    axes.legend()


def sweep_jump(axes: Any, everything: All) -> None:
    axes.set_title("Size of a jump, given a flip")
    draw(axes, everything, "sweep/", "/jump", ORANGE, "root mean square of z_r")
    _log_axes(axes, "nats")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high / 30), high * 2)  # a flat line should look flat


def sweep_chi(axes: Any, everything: All) -> None:
    axes.set_title("chi: flips over weights, within an answer")
    draw(axes, everything, "sweep/", "/chi", PURPLE, "chi")
    axes.axhline(1, color=RED, linewidth=1.2)
    _log_axes(axes, "chi")
    low, high = axes.get_ylim()
    axes.set_ylim(min(max(low, 1e-3), 0.1), max(high, 10))
    axes.text(0.98, 0.96, "above 1: sequence ratio nearer", transform=axes.transAxes, ha="right", va="top", color=RED)
    axes.text(0.02, 0.04, "below 1: token ratio nearer", transform=axes.transAxes, ha="left", va="bottom", color=RED)


def sweep_k_star(axes: Any, everything: All) -> None:
    axes.set_title("k*: the best mixture of both ratios")
    draw(axes, everything, "sweep/", "/k_star", PURPLE, "k*")
    for y, text in ((1, "token ratio"), (0, "sequence ratio")):
        axes.axhline(y, color=GREY, linewidth=1, linestyle="--")
        axes.text(0.98, y + 0.02, text, transform=axes.get_yaxis_transform(), ha="right", color=GREY)
    _alpha_axis(axes)


def sweep_tails(axes: Any, everything: All) -> None:
    axes.set_title("Excess kurtosis of z")
    draw(axes, everything, "sweep/", "/kurtosis_z", RED, "kurtosis")
    _alpha_axis(axes)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(min(0, axes.dataLim.y0))
    axes.set_ylabel("0 for a normal distribution")


# ---------------------------------------------------------------- step 4


def averaging(axes: Any, everything: All) -> None:
    axes.set_title("I_n: what a mean of n tokens keeps")
    for name, color, label in (("z_w", BLUE, "weights, z_w"), ("z_r", ORANGE, "routing, z_r"), ("z", GREEN, "z")):
        draw(axes, everything, f"inflation/{name}/", "", color, label)
    x = curve(everything[0], "inflation/z/")[0]
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":", label="independent tokens")
    guide(axes, x, x, "all tokens alike")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("n")
    axes.legend()


def length_law(axes: Any, everything: All) -> None:
    axes.set_title("Router noise in the gradient: GSPO / token")
    draw(axes, everything, "length/", "", PURPLE, "measured")
    x = curve(everything[0], "length/")[0]
    guide(axes, x, x**-0.5, "n to the power -1/2")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens n of an answer that count")
    axes.legend()
