"""From sequences to packed micro-batches, the same number on every data-parallel rank.

Every rank plans the whole global batch from the same columns and builds only its own share, so that nothing has to be
agreed on by communication. Loss weights are fixed here, over the global mini-batch: packing cannot change the loss.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.data.sequences import Columns, Sequences
from mcore_rl.functional.reduce import sequence_weights
from mcore_rl.types import PackedBatch

Numbers = NDArray[np.int64]


def split_mini_batches(count: int, mini_batches: int, seed: int, unit: int = 1) -> list[Numbers]:
    """A seeded shuffle of range(count) cut into `mini_batches` parts of about equal size.

    Args:
        unit: this many consecutive samples stay together and in order (2 for preference pairs).

    Raises:
        ValueError: fewer samples than mini-batches.
    """
    units = count // unit
    if units < mini_batches:
        raise ValueError(
            f"{units} samples cannot fill batch.mini_batches={mini_batches}; lower it or raise prompts_per_step"
        )
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed)).numpy()
    bounds = [units * i // mini_batches for i in range(mini_batches + 1)]
    return [of_units(order[a:b], unit) for a, b in zip(bounds, bounds[1:])]


def of_units(units: NDArray[np.integer], unit: int) -> Numbers:
    """The samples of some units, in their order.

    Example:
        >>> of_units(np.array([2, 0]), 2).tolist()
        [4, 5, 0, 1]
    """
    return (unit * units[:, None] + np.arange(unit)).reshape(-1).astype(np.int64)


def loss_weights(columns: Columns, algorithm: Algorithm, max_response: int) -> NDArray[np.float64]:
    """[N], the weight of each loss token of every sequence of one global mini-batch.

    Args:
        max_response: longest response allowed, the constant of `aggregation="constant"`.
    """
    lengths, of_groups = torch.from_numpy(columns.num_loss), torch.from_numpy(columns.group_lengths)
    aggregation = algorithm.aggregation
    return sequence_weights(lengths, aggregation, max_length=max_response, group_lengths=of_groups).numpy()


def balance(
    lengths: Sequence[int], num_ranks: int, budget: int, rounds: int = 1, least: int = 1
) -> list[list[list[int]]]:
    """Spread sequences over ranks and micro-batches: longest first, each into the emptiest bin.

    Args:
        lengths: positions of each sequence.
        num_ranks: data-parallel ranks.
        budget: positions of one micro-batch; a longer sequence has a micro-batch of its own.
        rounds: the number of micro-batches is a multiple of this.
        least: micro-batches a rank, at least.

    Returns:
        [rank][micro_batch] -> indices into `lengths`; every rank has as many micro-batches, some of them empty
        where there are fewer sequences than bins.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.lexsort((np.arange(len(sizes)), -sizes)).tolist()
    per_rank = max(least, -(-int(np.minimum(sizes, budget).sum()) // (budget * num_ranks)))
    while True:
        per_rank = -(-per_rank // rounds) * rounds
        if (bins := _filled(sizes.tolist(), order, per_rank * num_ranks, budget)) is not None:
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        per_rank += 1


def _filled(sizes: list[int], order: list[int], count: int, budget: int) -> list[list[int]] | None:
    """The bins, or None where one with several sequences is over the budget."""
    bins: list[list[int]] = [[] for _ in range(count)]
    fullness = [(0, i) for i in range(count)]  # a heap: the emptiest first, of equals the first
    for number in order:
        fill, emptiest = fullness[0]
        if fill and fill + sizes[number] > budget:
            return None
        bins[emptiest].append(number)
        heapq.heapreplace(fullness, (fill + sizes[number], emptiest))
    return bins


@dataclass(frozen=True, eq=False)
class Packed:
    """A micro-batch, and where its positions stand in the flat arrays of the sequences it was made of.

    Attributes:
        is_real: [T] bool, False where a position only fills up.
        response_at: [T] int64, place among the response tokens; 0 where `batch.loss_mask` is False.
        position_at: [T] int64, place among the positions; what fills up repeats places of its own sequence or batch.
        sequence_at: [T] int64, place among the sequences; 0 in a segment that fills the batch up.
    """

    batch: PackedBatch
    is_real: Tensor
    response_at: Tensor
    position_at: Tensor
    sequence_at: Tensor

    def of_responses(self, flat: Tensor) -> Tensor:
        """[T] of one number a response token, 0 where nothing is trained on."""
        return self._masked(flat, self.response_at)

    def of_sequences(self, flat: Tensor) -> Tensor:
        """[T] of one number a sequence, 0 where nothing is trained on."""
        return self._masked(flat, self.sequence_at)

    def of_positions(self, flat: Tensor) -> Tensor:
        """[T, L, K] of an entry a position; a batch of no sequence takes the first experts."""
        if not len(flat):
            return torch.arange(flat.shape[-1]).to(flat).expand(len(self.position_at), *flat.shape[1:])
        return flat[self.position_at]

    def _masked(self, flat: Tensor, at: Tensor) -> Tensor:
        if not len(flat):
            return flat.new_zeros(at.shape)
        return torch.where(self.batch.loss_mask, flat[at], flat.new_zeros(()))

    def to(self, device: torch.device) -> Packed:
        return Packed(*(getattr(self, f.name).to(device) for f in fields(self)))


def packed_length(columns: Columns, numbers: NDArray[np.integer], segment_multiple: int = 1, multiple: int = 1) -> int:
    """Positions of the batch that `pack` makes."""
    used = int(_filled_up(columns.positions[numbers], segment_multiple).sum())
    return int(_filled_up(max(used, 1), multiple))


def pack(
    sequences: Sequences, numbers: NDArray[np.integer], segment_multiple: int = 1, multiple: int = 1
) -> Packed:
    """Lay some sequences end to end; without any, a batch of tokens that nobody sampled.

    A rank without sequences still takes part in every collective.

    Args:
        segment_multiple: sequences are filled up to a multiple of this by tokens behind their end, where causal
            attention hides them (context parallelism cuts each into 2*cp parts).
        multiple: the batch is filled up to a multiple of this by one more segment (sequence parallelism cuts it into
            tp parts; pipeline stages exchange tensors of one length).
    """
    numbers = np.asarray(numbers, np.int64)
    columns = sequences.columns.take(numbers)
    lengths, filled = columns.positions, _filled_up(columns.positions, segment_multiple)
    used = int(filled.sum())
    missing = packed_length(sequences.columns, numbers, segment_multiple, multiple) - used
    filled = np.append(filled, missing) if missing else filled
    lengths = np.append(lengths, 0) if missing else lengths
    segment_ids = np.repeat(np.arange(len(filled)), filled)
    positions = np.arange(used + missing) - np.repeat(np.cumsum(filled) - filled, filled)
    real = positions < lengths[segment_ids]

    def starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """[T], where the entries of each position's sequence begin in a flat array."""
        own = (np.cumsum(counts) - counts)[numbers]
        return (np.append(own, 0) if missing else own)[segment_ids]

    token_at = np.where(real, starts(sequences.counts("token_ids")) + positions, 0)
    responses = np.append(columns.num_response, 0) if missing else columns.num_response
    into = positions - (lengths - responses)[segment_ids]  # how far into its response the target of a position is
    response_at = np.where(real & (into >= 0), starts(sequences.counts("loss_mask")) + into, 0)
    mask = real & (into >= 0)
    mask[mask] = sequences.loss_mask[response_at[mask]]
    wrapped = positions % np.maximum(lengths, 1)[segment_ids]
    position_at = starts(sequences.columns.positions) + wrapped
    if missing and used:
        position_at[used:] = position_at[np.arange(missing) % used]
    batch = PackedBatch(
        token_ids=_chosen(sequences.token_ids, token_at, real),
        targets=_chosen(sequences.token_ids, token_at + 1, real),
        positions=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(segment_ids),
        loss_mask=torch.from_numpy(mask),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(filled)]).astype(np.int32)),
        labels=torch.from_numpy(np.append(columns.labels, 0) if missing else columns.labels),
    )
    sequence_at = (np.append(numbers, 0) if missing else numbers)[segment_ids]
    places = (real, np.where(mask, response_at, 0), position_at, sequence_at)
    return Packed(batch, *map(torch.from_numpy, places))


def _chosen(flat: NDArray[np.int32], at: NDArray[np.int64], real: NDArray[np.bool_]) -> Tensor:
    """[T] int64, 0 where there is no token."""
    out = np.zeros(len(at), np.int64)
    out[real] = flat[at[real]]
    return torch.from_numpy(out)


def _filled_up(length, multiple: int):
    return -(-length // multiple) * multiple
