"""The few collectives the loop needs beside Megatron's: run on rank 0, tell everyone, add up numbers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
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


def on_rank_0_only(groups: Groups, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0, whose result it stays; None elsewhere. Raises as `on_rank_0`."""
    made: list[T] = []
    on_rank_0(groups, lambda: made.append(work()))
    return made[0] if made else None


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


def on_every_rank(groups: Groups, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank; the (picklable) results of all, on every rank.

    Raises:
        Exception: whatever `work` raised, on the first rank where it did.
        RunFailure: on the other ranks, so that none waits for one that has failed.
    """
    failure = None
    try:
        outcome = (True, work())
    except Exception as error:  # noqa: BLE001  raised again below
        failure, outcome = error, (False, _sendable(error))
    everyone = gather_objects(groups, outcome)
    failed = next((i for i, (ok, _) in enumerate(everyone) if not ok), None)
    if failed is None:
        return [value for _, value in everyone]
    if failed == groups.rank:
        raise failure
    raise RunFailure(exit_code(everyone[failed][1])) from everyone[failed][1]


def send_flat(
    groups: Groups,
    given: Callable[[int], Mapping[str, NDArray]],
    sizes: Sequence[Mapping[str, int]],
    into: Mapping[str, NDArray],
    asked_by: Sequence[int],
) -> None:
    """Flat arrays from the ranks that have them to the ranks that want them, over the hosts' memory. Collective.

    One rank is served after the other, so that an owner holds one copy at a time; what a rank receives lies in its
    arrays in the order of the owners' ranks.

    Args:
        given: what this rank sends to a rank, by the name of an array.
        sizes: [owner] entries that this rank receives from each owner, by the name of an array.
        into: the arrays that are filled.
        asked_by: ranks to which this rank has something to send.
    """
    ends = dict.fromkeys(into, 0)
    places: dict[int, dict[str, NDArray]] = {}
    for owner, counts in enumerate(sizes):
        places[owner] = {name: into[name][ends[name] : ends[name] + counts[name]] for name in into}
        ends = {name: ends[name] + counts[name] for name in into}
    waiting = [
        dist.irecv(_bytes(view), owner, group=groups.host, tag=tag)
        for owner, views in places.items()
        if owner != groups.rank
        for tag, view in enumerate(views.values())
        if view.size
    ]
    for rank in asked_by:
        arrays = given(rank)
        if rank == groups.rank:
            for name, view in places[rank].items():
                view[...] = arrays[name]
            continue
        sent = [
            dist.isend(_bytes(np.ascontiguousarray(arrays[name])), rank, group=groups.host, tag=tag)
            for tag, name in enumerate(into)
            if arrays[name].size
        ]
        for work in sent:
            work.wait()
    for work in waiting:
        work.wait()


def _bytes(array: NDArray) -> Tensor:
    """Its memory."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def sum_arrays(groups: Groups, array: NDArray[np.float64], *, contributes: bool = True) -> NDArray[np.float64]:
    """The sum over the ranks that contribute of arrays of one shape, on every rank."""
    total = torch.from_numpy(array if contributes else np.zeros_like(array)).clone()
    if groups.world_size > 1:
        dist.all_reduce(total, group=groups.host)
    return total.numpy()
