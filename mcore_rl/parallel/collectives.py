"""The few collectives the loop needs beside Megatron's: run on rank 0, tell everyone, add up numbers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.launch import RunFailure, exit_code
from mcore_rl.parallel.groups import Groups

T = TypeVar("T")


def on_rank_0(groups: Groups, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its (picklable) result on every rank.

    Raises:
        Exception: on rank 0 whatever `work` raised.
        RunFailure: on the other ranks, from the same failure, so that none waits for one that has already failed.
    """
    if groups.world_size == 1:
        return work()
    if groups.rank == 0:
        try:
            value = work()
        except Exception as error:
            dist.broadcast_object_list([(False, _sendable(error))], src=0)
            raise
        dist.broadcast_object_list([(True, value)], src=0)
        return value
    outcome: list = [None]
    dist.broadcast_object_list(outcome, src=0)
    ok, value = outcome[0]
    if not ok:
        raise RunFailure(exit_code(value)) from value
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


def max_abs_over_ranks(groups: Groups, tensors: Sequence[Tensor], *, contributes: bool = True) -> float:
    """The largest absolute value in any rank's tensors: NaN if one holds a NaN, 0 if there are no elements."""
    parts = [torch.zeros(1), *(x.detach().flatten().cpu().float().abs() for x in tensors if contributes)]
    return max_over_ranks(groups, torch.cat(parts).max().item())


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
