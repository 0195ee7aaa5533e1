"""What is known of sequences before a step, and the micro-batches that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mcore_rl.data.packing import Packed, pack
from mcore_rl.data.sequences import Sample, Sequences
from mcore_rl.types import PackedBatch, ScoredBatch, WeightedBatch


@dataclass(frozen=True)
class Scores:
    """What is known of sequences, flat: a number a sequence [n] or response token [R], an entry a position [P, L, K].

    None: this run has no such model, or (`old`) the update itself says it.
    """

    of_sequences: Tensor  # [n], advantages
    rollout: Tensor  # [R], log-probs of the engine
    lags: Tensor | None = None  # [R]
    old: Tensor | None = None  # [R]
    ref: Tensor | None = None  # [R]
    values: Tensor | None = None  # [R]
    advantages: Tensor | None = None  # [R]; None: those of the sequences
    returns: Tensor | None = None  # [R]
    rollout_routes: Tensor | None = None  # [P, L, K]
    routes: Tensor | None = None  # [P, L, K], that every pass of the step takes
    observed: Tensor | None = None  # [P, L, K]
    observed_logprobs: Tensor | None = None  # [P, L, K]

    @classmethod
    def of(cls, sequences: Sequences, device: torch.device | str = "cpu") -> Scores:
        """What sequences come with."""
        given = {"rollout": sequences.rollout_logprobs, "lags": sequences.lags, "rollout_routes": sequences.expert_ids}
        given["of_sequences"] = sequences.columns.advantages.astype(np.float32)
        return cls(**{name: torch.from_numpy(x).to(device) for name, x in given.items() if x is not None})


def routed(packed_: Packed, scores: Scores) -> PackedBatch:
    """The batch with the routes that the step's passes take."""
    return packed_.batch if scores.routes is None else replace(
        packed_.batch, expert_ids=packed_.of_positions(scores.routes)
    )


def scored(packed_: Packed, scores: Scores) -> ScoredBatch:
    """A micro-batch with what is known of its tokens."""

    def tokens(flat: Tensor | None) -> Tensor | None:
        return None if flat is None else packed_.of_responses(flat)

    def positions(flat: Tensor | None) -> Tensor | None:
        return None if flat is None else packed_.of_positions(flat)

    rollout, old = packed_.of_responses(scores.rollout), tokens(scores.old)
    by_token = tokens(scores.advantages)
    return ScoredBatch(
        **vars(replace(packed_.batch, expert_ids=positions(scores.routes), observed_ids=positions(scores.observed))),
        advantages=packed_.of_sequences(scores.of_sequences) if by_token is None else by_token,
        old_logprobs=torch.zeros_like(rollout) if old is None else old,
        rollout_logprobs=rollout,
        lags=tokens(scores.lags),
        ref_logprobs=tokens(scores.ref),
        values=tokens(scores.values),
        returns=tokens(scores.returns),
        rollout_expert_ids=positions(scores.rollout_routes),
        observed_logprobs=positions(scores.observed_logprobs),
    )


def weighted(packed_: Packed, scores: Scores, weights: Tensor) -> WeightedBatch:
    """A micro-batch as an update takes it.

    Args:
        weights: [n], of each loss token of a sequence.
    """
    return WeightedBatch(**vars(scored(packed_, scores)), weights=packed_.of_sequences(weights))


def batch_of(samples: Sequence[Sample], weights: Sequence[float], **multiples: int) -> WeightedBatch:
    """All samples in one micro-batch.

    Args:
        weights: the loss weight of a response token of each. multiples: of `data.packing.pack`.
    """
    sequences = Sequences.of(samples)
    packed = pack(sequences, np.arange(len(samples)), **multiples)
    return weighted(packed, Scores.of(sequences), torch.tensor(weights))
