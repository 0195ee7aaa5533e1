"""Options that several benchmarks have, and the model that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tools.bench.models import SIZES, model_folder
from tools.bench.side_by_side import quiet_stdout

Model = Annotated[str, typer.Option(help=f"HF folder, or one of {', '.join(SIZES)} (random weights)")]
Sequences = Annotated[int, typer.Option(min=1, help="of one update")]
PromptTokens = Annotated[int, typer.Option(min=1)]
ResponseTokens = Annotated[int, typer.Option(min=1, help="of the longest; the shortest has a quarter")]
Repeats = Annotated[int, typer.Option(min=1, help="measured rounds")]
Seed = Annotated[int, typer.Option(min=0)]
Json = Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")]


@contextmanager
def asked_model(model: str, seed: int) -> Iterator[Path]:
    """Its folder while it is measured: libraries print to stderr then, and a mistake of the user ends the program."""
    try:
        with quiet_stdout(), model_folder(model, seed) as folder:
            yield folder
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
