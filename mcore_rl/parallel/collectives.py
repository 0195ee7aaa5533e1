"""The few collectives the loop needs beside Megatron's: run on rank 0, tell everyone, add up numbers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

import torch.distributed as dist

from mcore_rl.parallel.groups import Groups

T = TypeVar("T")


def on_rank_0(groups: Groups, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its (picklable) result on every rank.

    Raises:
        Exception: whatever `work` raised, on every rank, so that no rank waits for one that has already failed.
    """
    if groups.world_size == 1:
        return work()
    outcome: list = [None]
    if groups.rank == 0:
        try:
            outcome = [(True, work())]
        except Exception as error:  # noqa: BLE001  raised again below, here and on every other rank
            outcome = [(False, _sendable(error))]
    dist.broadcast_object_list(outcome, src=0)
    ok, value = outcome[0]
    if not ok:
        value.told = groups.rank != 0  # rank 0 tells it to the user, once (mcore_rl.launch.tell)
        raise value
    return value


def _sendable(error: Exception) -> Exception:
    """The error itself where it survives pickling, else a RuntimeError that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def sum_over_ranks(groups: Groups, values: dict[str, float], *, contributes: bool = True) -> dict[str, float]:
    """Add up each number over the ranks that contribute; the result is the same on every rank."""
    totals: dict[str, float] = {}
    for part in gather_objects(groups, values if contributes else {}):
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def max_over_ranks(groups: Groups, value: float) -> float:
    """The largest of every rank's number; NaN if any is NaN."""
    values = gather_objects(groups, value)
    return max(values, key=lambda x: (math.isnan(x), x))


def require_equal(groups: Groups, what: str, text: str) -> None:
    """Raises ValueError on every rank where a text is not the same on all, with the first line that differs."""
    texts = gather_objects(groups, text)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            pairs = zip_longest(texts[0].splitlines(), other.splitlines())
            here, there = next((a, b) for a, b in pairs if a != b)
            raise ValueError(f"{what} differs between ranks: {here!r} on rank 0, {there!r} on rank {rank}")


def gather_objects(groups: Groups, value: T) -> list[T]:
    """Every rank's (picklable) value, on every rank."""
    if groups.world_size == 1:
        return [value]
    everyone: list = [None] * groups.world_size
    dist.all_gather_object(everyone, value)
    return everyone
