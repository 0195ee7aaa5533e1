"""A folder is complete or not there: it is written beside its place and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(out: Path, needed_bytes: int) -> Iterator[Path]:
    """An empty folder `<out>.partial`, renamed to `out` at the end; after an error it is gone and `out` as before.

    Raises:
        ValueError: the disk is full or cannot be written (names path, needed and free bytes).
    """
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < needed_bytes:
            raise ValueError(
                f"disk full: {str(out)!r} needs {needed_bytes} bytes and {free} are free; free space or choose "
                "another path"
            )
        yield partial
        _swap(partial, out)
    except OSError as error:
        free = shutil.disk_usage(next(p for p in out.resolve().parents if p.is_dir())).free
        raise ValueError(
            f"cannot write {str(out)!r}: {error.strerror or error} (the weights need {needed_bytes} bytes, {free} are "
            "free)"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_disk(file: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _swap(partial: Path, out: Path) -> None:
    """Put the complete folder at its name; an old one is moved away first and removed last."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
