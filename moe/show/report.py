"""One self-contained HTML report, read top to bottom: verdicts, the argument step by step, routers, all numbers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.judge.claims import CLAIMS, DO_NOT_SAY, NEED_SCALE, STEPS
from moe.judge.verdict import Verdict, judge, number
from moe.judge.watch import THRESHOLDS, first_of_each, judge_run
from moe.measure.compare import Estimates
from moe.show import plots, plots_routers
from moe.show.figures import FIGURES, ROUTERS, SUMMARY, Spec
from moe.studies.study import Replicate, pooled, write

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Figure:
    name: str
    data: str  # base64 of the PNG
    caption: str


def verdicts_of(replicates: Sequence[Replicate]) -> list[Verdict]:
    """Every claim, on all replicates that measured anything but a training run."""
    everything = {r.name: r.estimates for r in replicates}
    return [judge(claim, everything) for claim in CLAIMS]


def write_report(folders: Sequence[str | Path], out: str | Path) -> tuple[Path, list[Verdict]]:
    """Draw OUT/report.html, its plots as files, OUT/verdicts.json and OUT/ledger.md, from the studies in `folders`.

    Raises:
        ValueError: a folder without studies.
    """
    from jinja2 import Environment, StrictUndefined

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    replicates = _named_apart(pooled(folders))
    verdicts = verdicts_of(replicates)
    everything = [r.estimates for r in replicates]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text()).render(
        title=", ".join(r.name for r in replicates),
        replicates=replicates,
        verdicts=verdicts,
        sections=[_section(i, everything, verdicts, out) for i in range(1, len(STEPS) + 1)],
        routers=_figure(ROUTERS, everything, out, 9.5),
        runs=[_run(r, out) for r in replicates if "watch" in r.studies],
        need_scale=NEED_SCALE,
        do_not_say=DO_NOT_SAY,
        number=number,
        thresholds=THRESHOLDS,
    )
    _write_verdicts(out, verdicts)
    write(out / "ledger.md", ledger(verdicts))
    return write(out / "report.html", html), verdicts


def _named_apart(replicates: Sequence[Replicate]) -> list[Replicate]:
    """Folders of the same name in different places get a number."""
    names = [r.name for r in replicates]
    return [
        Replicate(f"{r.name} ({i})" if names.count(r.name) > 1 else r.name, r.studies)
        for i, r in enumerate(replicates, 1)
    ]


def _section(step: int, everything: Sequence[Estimates], verdicts: Sequence[Verdict], out: Path) -> dict[str, Any]:
    mine = [v for v in verdicts if v.claim.step == step]
    figures = [_figure(spec, everything, out) for spec in FIGURES[step]]
    rows = [(name, [e.get(name) for e in everything]) for name in SUMMARY[step]]
    return {
        "number": step,
        "step": STEPS[step - 1],
        "verdicts": mine,
        "figures": [f for f in figures if f is not None],
        "rows": [(name, values) for name, values in rows if any(v is not None for v in values)],
    }


def _figure(spec: Spec, everything: Sequence[Estimates], out: Path, width: float = 5.0) -> Figure | None:
    measured = [e for e in everything if plots.has([e], *spec.needs)]
    return _embedded(spec.name, plots.png(spec.panels, measured, width), spec.caption, out) if measured else None


def _embedded(name: str, image: bytes, caption: str, out: Path) -> Figure:
    (out / "plots").mkdir(exist_ok=True)
    write(out / "plots" / f"{name}.png", image)
    return Figure(name, base64.b64encode(image).decode(), caption)


def _run(replicate: Replicate, out: Path) -> dict[str, Any]:
    """A training run's section: level, alarms, metrics over time, heat maps by layer."""
    study = replicate.studies["watch"]
    level, alarms = judge_run(rows_of(study.series))
    bounds = {t.metric: (t.watch, t.unstable) for t in THRESHOLDS}
    images = {
        "metrics": (
            plots_routers.over_time(replicate, bounds),
            "Dashed: where watch (orange) and unstable (red) begin.",
        ),
        "flips by layer": (plots_routers.heat_map(replicate, "flip_set", "Sets changed by a training step"), ""),
        "load by layer": (plots_routers.heat_map(replicate, "load_cv", "Load of the experts, std / mean"), ""),
    }
    figures = [
        _embedded(f"{replicate.name} {name}".replace(" ", "_"), image, caption, out)
        for name, (image, caption) in images.items()
        if image is not None
    ]
    return {"replicate": replicate, "level": str(level), "alarms": first_of_each(alarms), "figures": figures}


def rows_of(series: Any) -> list[dict[str, Any]]:
    """Series by name as rows by step, as metrics.jsonl had them."""
    by_step: dict[int, dict[str, Any]] = {}
    for name, pairs in series.items():
        for step, value in pairs:
            by_step.setdefault(step, {"step": step})[name] = value
    return [by_step[step] for step in sorted(by_step)]


def _write_verdicts(out: Path, verdicts: Sequence[Verdict]) -> None:
    import json

    rows = [
        {
            "claim": v.claim.key,
            "text": v.claim.text,
            "standing": str(v.standing),
            "reason": v.reason,
            "proved": v.claim.proved,
            "findings": dict(v.findings),
        }
        for v in verdicts
    ]
    write(out / "verdicts.json", json.dumps(rows, indent=1) + "\n")


def ledger(verdicts: Sequence[Verdict]) -> str:
    """The claims as a Markdown table: what is theorem, what held, what did not; replicates in their order."""
    lines = ["| step | claim | kind | verdict | numbers |", "|---|---|---|---|---|"]
    for v in verdicts:
        texts = [text for _, text in v.findings]
        names = {text.partition(" = ")[0] for text in texts if text.count(" = ") == 1}
        if len(names) == 1 and len(texts) > 1:
            (name,) = names
            texts = [f"{name} = " + "; ".join(text.removeprefix(f"{name} = ") for text in texts)]
        kind = "theorem" if v.claim.proved else "observation"
        lines.append(f"| {v.claim.step} | {v.claim.text} | {kind} | {v.standing} | {'; '.join(texts) or v.reason} |")
    return "\n".join(lines) + "\n"
