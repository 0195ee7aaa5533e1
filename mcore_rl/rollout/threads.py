"""Calls that wait for somebody else, in threads that the end of the process does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.pool import ThreadPool
from typing import TypeVar

T = TypeVar("T")


def in_threads(calls: Sequence[Callable[[], T]], at_once: int | None = None) -> list[T]:
    """The results of all calls, made at the same time.

    The first failure is raised without waiting for the other calls, which may be waiting for what failed.

    Args:
        at_once: at most so many; None: all.
    """
    results: list = [None] * len(calls)
    pool = ThreadPool(max(1, min(at_once or len(calls), len(calls))))
    try:
        for i, result in pool.imap_unordered(lambda i: (i, calls[i]()), range(len(calls))):
            results[i] = result
    finally:
        pool.terminate()  # forgets what has not begun; what has goes on
    return results


def in_thread(call: Callable[[], T]) -> Future[T]:
    """One call that begins now."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
