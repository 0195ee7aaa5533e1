"""Sequences to train on or to score, as arrays: what a rank holds of a step, and what crosses a rank's border."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.types import RolloutGroup


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence: n tokens of which the last `num_response` are its response. Sequences of numbers become arrays.

    Example:
        >>> Sample(token_ids=(5, 6, 7, 1), num_response=2, advantage=0.5, rollout_logprobs=(-0.1, -0.2)).positions
        3
    """

    token_ids: NDArray[np.int32]  # [n]
    num_response: int
    advantage: float = 0.0
    rollout_logprobs: NDArray[np.float32] | None = None  # [num_response]; None: no engine sampled it, 0
    group_length: float | None = None  # mean number of loss tokens of its group; None: it has no group
    expert_ids: NDArray[np.integer] | None = None  # [n-1, L, K] of the rollout engine
    lags: NDArray[np.int32] | None = None  # [num_response] weight updates since each token was sampled
    loss_mask: NDArray[np.bool_] | None = None  # [num_response]; None: all are trained on
    label: int = 0  # what a discriminator has to tell

    def __post_init__(self) -> None:
        n = self.num_response
        given = {
            "token_ids": (self.token_ids, np.int32),
            "rollout_logprobs": (np.zeros(n) if self.rollout_logprobs is None else self.rollout_logprobs, np.float32),
            "loss_mask": (np.ones(n, bool) if self.loss_mask is None else self.loss_mask, np.bool_),
        }
        for name, (values, dtype) in given.items():
            object.__setattr__(self, name, np.asarray(values, dtype))
        assert len(self.rollout_logprobs) == len(self.loss_mask) == n < len(self.token_ids)

    @property
    def positions(self) -> int:
        return len(self.token_ids) - 1


@dataclass(frozen=True, eq=False)
class Columns:
    """What planning needs of N sequences, a number each; every rank knows it of all. 36 bytes a sequence."""

    lengths: NDArray[np.int32]  # [N], tokens
    num_response: NDArray[np.int32]  # [N]
    num_loss: NDArray[np.int32]  # [N], response tokens with a loss
    advantages: NDArray[np.float64]  # [N]
    group_lengths: NDArray[np.float64]  # [N], mean number of loss tokens of its group
    labels: NDArray[np.int64]  # [N]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def positions(self) -> NDArray[np.int64]:
        """[N], places that each takes in a batch."""
        return self.lengths.astype(np.int64) - 1

    def take(self, numbers: NDArray[np.integer]) -> Columns:
        return Columns(*(getattr(self, f.name)[numbers] for f in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Columns]) -> Columns:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


# what a sequence has entries of in each flat array: tokens, positions or response tokens
PER_SEQUENCE = {
    "token_ids": "tokens",
    "loss_mask": "response",
    "rollout_logprobs": "response",
    "lags": "response",
    "expert_ids": "positions",
}


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences laid end to end.

    Example:
        >>> s = Sequences.of([Sample((5, 6, 7, 1), 2), Sample((8, 9, 1), 1)])
        >>> s.token_ids.tolist(), s.columns.num_response.tolist(), s.take(np.array([1])).token_ids.tolist()
        ([5, 6, 7, 1, 8, 9, 1], [2, 1], [8, 9, 1])
    """

    columns: Columns
    token_ids: NDArray[np.int32]  # [sum of lengths]
    loss_mask: NDArray[np.bool_]  # [sum of num_response]
    rollout_logprobs: NDArray[np.float32]  # [sum of num_response]
    lags: NDArray[np.int32] | None = None  # [sum of num_response]
    expert_ids: NDArray[np.integer] | None = None  # [sum of positions, L, K]

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def num_bytes(self) -> int:
        """Of its arrays: 9 a response token, 4 a prompt token, and what lags and routes take."""
        arrays = [*self.arrays().values(), *(getattr(self.columns, f.name) for f in fields(Columns))]
        return sum(x.nbytes for x in arrays)

    def arrays(self) -> dict[str, NDArray]:
        """The flat arrays that there are."""
        return {name: x for name in PER_SEQUENCE if (x := getattr(self, name)) is not None}

    def counts(self, name: str) -> NDArray[np.int64]:
        """[N], entries of each sequence in a flat array."""
        return counts_of(self.columns, name)

    def take(self, numbers: NDArray[np.integer]) -> Sequences:
        """Some of them, in the order of `numbers`."""
        flat = {name: x[ragged(self.counts(name), numbers)] for name, x in self.arrays().items()}
        return Sequences(self.columns.take(numbers), **flat)

    def split(self, name: str) -> Iterator[NDArray]:
        """A view for each sequence of one flat array."""
        bounds = np.concatenate([[0], np.cumsum(self.counts(name))])
        return (getattr(self, name)[a:b] for a, b in zip(bounds[:-1], bounds[1:]))

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Sequences:
        """Raises AssertionError where some have routes or lags and others none."""
        columns = Columns(
            lengths=np.array([len(s.token_ids) for s in samples], np.int32),
            num_response=np.array([s.num_response for s in samples], np.int32),
            num_loss=np.array([s.loss_mask.sum() for s in samples], np.int32),
            advantages=np.array([s.advantage for s in samples], np.float64),
            group_lengths=np.array(
                [s.loss_mask.sum() if s.group_length is None else s.group_length for s in samples], np.float64
            ),
            labels=np.array([s.label for s in samples], np.int64),
        )
        dtypes = {"token_ids": np.int32, "loss_mask": np.bool_, "rollout_logprobs": np.float32, "lags": np.int32}
        flat = {}
        for name in PER_SEQUENCE:
            given = [x for s in samples if (x := getattr(s, name)) is not None]
            assert len(given) in (0, len(samples)), f"some sequences have {name}, others none"
            if given:
                flat[name] = np.concatenate(given, dtype=dtypes.get(name, given[0].dtype), casting="same_kind")
            elif name not in ("lags", "expert_ids"):
                flat[name] = np.empty(0, dtypes[name])
        return cls(columns, **flat)


def counts_of(columns: Columns, name: str) -> NDArray[np.int64]:
    """[N], entries of each sequence in the flat array `name` of `Sequences`."""
    by_kind = {"tokens": columns.lengths, "positions": columns.positions, "response": columns.num_response}
    return by_kind[PER_SEQUENCE[name]].astype(np.int64)


def ragged(counts: NDArray[np.integer], numbers: NDArray[np.integer]) -> NDArray[np.int64]:
    """Places in a flat array of the entries of some sequences, one after the other.

    Example:
        >>> ragged(np.array([2, 3, 1]), np.array([2, 0])).tolist()
        [5, 0, 1]
    """
    starts = np.cumsum(counts) - counts
    own = counts[numbers]
    return np.repeat(starts[numbers] - (np.cumsum(own) - own), own) + np.arange(own.sum())


def sequences_of(
    groups: Sequence[RolloutGroup], algorithm: Algorithm, policy_version: int | None = None
) -> Sequences:
    """Every trajectory of scored and shaped groups with its advantage; without loss tokens if it is not trained on.

    Args:
        policy_version: the trainer's, where tokens may be of older ones: sequences then say how old.
    """
    trajectories = [t for g in groups for t in g.trajectories]
    if not trajectories:
        return Sequences.of([])
    responses = np.array([len(t.response_ids) for t in trajectories], np.int32)
    trained = np.array([algorithm.trains_on(t) for t in trajectories])
    loss_mask = np.concatenate([t.loss_mask for t in trajectories]) & np.repeat(trained, responses)
    counted = np.concatenate([[0], np.cumsum(loss_mask)])
    ends = np.cumsum(responses)
    num_loss = (counted[ends] - counted[ends - responses]).astype(np.int32)
    members = np.array([len(g.trajectories) for g in groups])
    starts = np.cumsum(members) - members
    group_lengths = np.add.reduceat(num_loss, starts) / np.maximum(1, np.add.reduceat(num_loss > 0, starts))
    with_routes = trajectories[0].expert_ids is not None
    lags = None if policy_version is None else policy_version - np.concatenate([t.versions for t in trajectories])
    return Sequences(
        Columns(
            lengths=np.array([len(t.prompt_ids) for t in trajectories], np.int32) + responses,
            num_response=responses,
            num_loss=num_loss,
            advantages=torch.cat(algorithm.batch_advantages(groups)).double().numpy(),
            group_lengths=np.repeat(group_lengths, members),
            labels=np.zeros(len(trajectories), np.int64),
        ),
        token_ids=np.concatenate([part for t in trajectories for part in (t.prompt_ids, t.response_ids)]),
        loss_mask=loss_mask,
        rollout_logprobs=np.concatenate([t.rollout_logprobs for t in trajectories]),
        lags=lags,
        expert_ids=np.concatenate([t.expert_ids for t in trajectories]) if with_routes else None,
    )
