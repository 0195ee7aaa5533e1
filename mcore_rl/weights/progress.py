"""How far a long copy is: a bar on a terminal, else a line every tenth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def byte_progress(what: str, total: int, stream: TextIO | None = None) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told the bytes that were done since its last call.

    Args:
        stream: where to write; standard error if None.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _lines(what, total, stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=stream)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)


def _lines(what: str, total: int, stream: TextIO) -> Callable[[int], None]:
    done, told = 0, 0

    def advance(size: int) -> None:
        nonlocal done, told
        done += size
        tenths = 10 * done // max(1, total)
        if tenths > told:
            told = tenths
            print(f"{what}: {10 * tenths}% of {total / 1e6:,.1f} MB", file=stream, flush=True)

    return advance
