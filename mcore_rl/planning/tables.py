"""A plan for people and for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcore_rl.planning.advice import Change
from mcore_rl.planning.estimate import Estimate, Place
from mcore_rl.planning.grid import TRAFFIC, AxisGroups, group_grid, spell
from mcore_rl.planning.memory import GIB
from mcore_rl.planning.needs import ASSUMED_PROMPT_TOKENS

WHATS = ("weights", "gradients", "optimizer", "activations", "logits", "KV cache", "workspace", "weight transfer")


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in (self.columns, *self.rows)
        ]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in lines)])


def as_json(planned: Estimate, changes: Sequence[Change]) -> dict[str, Any]:
    """Everything in elements and bytes."""
    grid = group_grid(planned.layout, planned.hardware.gpus_per_node)
    return {
        "fits": not planned.problems,
        "problems": planned.problems,
        "changes": [vars(change) for change in changes],
        "layout": vars(planned.layout),
        "parameters": planned.models.parameters,
        "active_parameters": planned.models.active_parameters,
        "schedule": vars(planned.schedule),
        "groups": {g.axis: {"ranks": g.groups, "crossing_nodes": g.crossing} for g in grid},
        "places": [
            {
                "ranks": [place.ranks.start, place.ranks.stop - 1],
                "parameters": dict(place.parameters),
                "uses": [vars(use) for use in place.uses],
                "peak_bytes": planned.peak_bytes(place),
            }
            for place in planned.places
        ],
        "engine": planned.engine and vars(planned.engine) | {"sequences": planned.engine.sequences},
        "host_bytes": dict(planned.host_bytes),
        "prompt_tokens": planned.prompt_tokens,
    }


def show(planned: Estimate, changes: Sequence[Change]) -> None:
    """Print to standard output: rich tables on a terminal, plain text elsewhere."""
    grid = group_grid(planned.layout, planned.hardware.gpus_per_node)
    parts: list[Table | str] = [_headline(planned), _groups(grid), *_remarks(grid), _memory(planned)]
    parts += [_engine(planned), _schedule(planned), *_host(planned), _assumptions(planned), _verdict(planned, changes)]
    if not sys.stdout.isatty():
        print("\n".join(str(part) for part in parts))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False)
            continue
        table = RichTable(title=part.title, title_justify="left", box=box.SIMPLE)
        for i, column in enumerate(part.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in part.rows:
            table.add_row(*row)
        console.print(table)


def _headline(planned: Estimate) -> str:
    layout, nodes = planned.layout, -(-planned.layout.world_size // planned.hardware.gpus_per_node)
    sizes = " ".join(f"{axis}={size}" for axis, size in vars(layout).items() if size > 1 or axis == "dp")
    total, active = (_count(n) for n in (planned.models.parameters, planned.models.active_parameters))
    return (
        f"{planned.config.name}: {layout.world_size} ranks, {nodes} nodes; {sizes}\n"
        f"model: {total} parameters, {active} used by a token"
    )


def _groups(grid: Sequence[AxisGroups]) -> Table:
    rows = []
    for g in grid:
        examples = "{" + spell(g.groups[0]) + "}"
        if len(g.groups) > 1:
            examples += (" .. " if len(g.groups) > 2 else " ") + "{" + spell(g.groups[-1]) + "}"
        rows.append((g.axis, str(g.size), str(len(g.groups)), str(g.crossing), examples, TRAFFIC[g.axis]))
    columns = ("axis", "ranks a group", "groups", "across nodes", "first and last", "carries")
    return Table("process groups of more than one rank", columns, tuple(rows))


def _remarks(grid: Sequence[AxisGroups]) -> list[str]:
    return [
        f"slow: {g.crossing} {g.axis} groups cross nodes, and carry {TRAFFIC[g.axis]}; make tp, cp and ep*etp smaller, "
        "so that a group stays on a node"
        for g in grid
        if g.is_slow
    ]


def _memory(planned: Estimate) -> Table:
    rows = []
    for place in planned.places:
        free = planned.hardware.gpu_bytes - planned.peak_bytes(place)
        rows.append((place.name, "", *[""] * len(WHATS), _gb(planned.peak_bytes(place)), _gb(free)))
        for role in dict.fromkeys(use.role for use in place.uses):
            rows.append(_role(place, role))
    columns = ("GPU", "parameters", *WHATS, "sum", "free")
    return Table(f"memory in GB of 2**30 bytes, of {planned.hardware.gpu_memory_gb:g} a GPU", columns, tuple(rows))


def _role(place: Place, role: str) -> tuple[str, ...]:
    uses = [use for use in place.uses if use.role == role]
    cells = [sum(use.bytes for use in uses if use.what == what) for what in WHATS]
    parameters = f"{place.parameters[role]:,}" if role in place.parameters else ""
    name = "reserve" if role == "other" else role
    return f"  {name}", parameters, *(_gb(c) if c else "" for c in cells), _gb(sum(use.bytes for use in uses)), ""


def _engine(planned: Estimate) -> str:
    engine = planned.engine
    if engine is None:
        return "engine: none, nothing is sampled"
    where = f"{engine.placement}, on GPUs of its own" if not engine.gpus else f"{engine.placement}, beside rank 0"
    return (
        f"engine ({where}): {_gb(engine.weights)} GB of weights and {_gb(engine.kv_cache)} GB of KV cache a GPU, for "
        f"{engine.sequences:,} sequences of {engine.max_model_len:,} tokens at once"
    )


def _schedule(planned: Estimate) -> str:
    s = planned.schedule
    return (
        f"a mini-batch: {s.micro_batches} micro-batches of {s.positions:,} tokens a rank, were all responses as long "
        f"as they may be; pipeline bubble {s.bubble:.1%}"
    )


def _host(planned: Estimate) -> list[str]:
    return [f"main memory of the first node: {_gb(size)} GB for {what}" for what, size in planned.host_bytes.items()]


def _assumptions(planned: Estimate) -> str:
    prompt = f"prompts of {planned.prompt_tokens:,} tokens"
    if planned.config.data.max_prompt_tokens is None:
        prompt += f" (data.max_prompt_tokens is not set: at most {ASSUMED_PROMPT_TOKENS:,} assumed)"
    return f"assumed: {prompt}; tokens spread evenly over experts"


def _verdict(planned: Estimate, changes: Sequence[Change]) -> str:
    if not planned.problems:
        return "it fits"
    lines = ["it does not fit:", *(f"  {problem}" for problem in planned.problems)]
    if changes:
        enough = changes[-1].missing_bytes <= 0
        lines.append("this would fit:" if enough else "these help, and are not enough:")
        lines += [f"  {c.words:<40} still missing {_gb(max(0, c.missing_bytes))} GB" for c in changes]
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _gb(size: float) -> str:
    return f"{size / GIB:.2f}" if abs(size) < 10 * GIB else f"{size / GIB:.1f}"
