"""Micro-batches of samples that are at hand, without a run around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.data.packing import balance, loss_weights, of_units, pack
from mcore_rl.data.scores import Scores, weighted
from mcore_rl.data.sequences import Sample, Sequences
from mcore_rl.types import WeightedBatch


def pack_mini_batch(
    samples: Sequence[Sample] | Sequences,
    algorithm: Algorithm,
    *,
    budget: int,
    max_response: int,
    rank: int = 0,
    num_ranks: int = 1,
    multiple: int = 1,
    segment_multiple: int = 1,
    rounds: int = 1,
    unit: int = 1,
) -> list[WeightedBatch]:
    """The micro-batches that one data-parallel rank of several gets of a mini-batch; see `data.packing`."""
    sequences = samples if isinstance(samples, Sequences) else Sequences.of(samples)
    filled = -(-sequences.columns.positions // segment_multiple) * segment_multiple
    mine = balance(filled.reshape(-1, unit).sum(1), num_ranks, budget, rounds)[rank]
    weights = torch.from_numpy(loss_weights(sequences.columns, algorithm, max_response)).float()
    packed = (pack(sequences, of_units(np.array(units, np.int64), unit), segment_multiple, multiple) for units in mine)
    return [weighted(p, Scores.of(sequences), weights) for p in packed]
