"""mcore-rl: train, plan, lint; generate, pairs, evaluate; convert, verify."""

from __future__ import annotations

import os

import typer

from mcore_rl.cli import runs, sampling, weights
from mcore_rl.launch import exit_code, tell
from mcore_rl.planning.threads import ASKED

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for group in (runs, sampling, weights):
    app.add_typer(group.app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; exit code 2 is a user's mistake, 1 a failure.

    Args:
        arguments: instead of those of the process.
    """
    if "OMP_NUM_THREADS" not in os.environ:  # as torchrun does: a run sets its threads when it knows its processes
        os.environ |= {"OMP_NUM_THREADS": "1", ASKED: "auto"}
    try:
        app(arguments)
    except Exception as error:  # noqa: BLE001  told in words or with its traceback
        tell(error)
        raise SystemExit(exit_code(error)) from None
