"""From sequences to packed micro-batches, the same number on every data-parallel rank.

Every rank plans the whole global batch from the same numbers and builds only its own share, so that nothing has to be
agreed on by communication. Loss weights are fixed here, over the global mini-batch: packing cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.functional.reduce import sequence_weights
from mcore_rl.types import PackedBatch, RolloutGroup


@dataclass(frozen=True)
class Sample:
    """One sequence to train on: n tokens of which the last `num_response` were sampled.

    Example:
        >>> Sample(token_ids=(5, 6, 7, 1), num_response=2, advantage=0.5, rollout_logprobs=(-0.1, -0.2)).positions
        3
    """

    token_ids: tuple[int, ...]
    num_response: int
    advantage: float
    rollout_logprobs: tuple[float, ...]  # [num_response]
    group_length: float | None = None  # mean number of loss tokens of its group; None: it has no group
    expert_ids: Tensor | None = field(default=None, compare=False)  # [n-1, L, K] of the rollout engine
    lags: tuple[int, ...] | None = None  # [num_response] weight updates since each token was sampled

    @property
    def positions(self) -> int:
        return len(self.token_ids) - 1


def samples_of(groups: Sequence[RolloutGroup], algorithm: Algorithm, policy_version: int | None = None) -> list[Sample]:
    """Every trajectory of scored and shaped groups with its advantage; without loss tokens if it is not trained on.

    Args:
        policy_version: the trainer's, where tokens may be of older ones: samples then say how old.
    """
    samples = []
    for group, advantages in zip(groups, algorithm.batch_advantages(groups), strict=True):
        lengths = [len(t.response_ids) for t in group.trajectories if algorithm.trains_on(t)]
        for trajectory, advantage in zip(group.trajectories, advantages.tolist(), strict=True):
            sample = Sample(
                token_ids=(*trajectory.prompt_ids, *trajectory.response_ids),
                num_response=len(trajectory.response_ids),
                advantage=advantage,
                rollout_logprobs=trajectory.rollout_logprobs,
                group_length=sum(lengths) / max(1, len(lengths)),
                expert_ids=trajectory.expert_ids,
                lags=None if policy_version is None else tuple(policy_version - v for v in trajectory.token_versions),
            )
            samples.append(sample if algorithm.trains_on(trajectory) else _untrained(sample))
    return samples


def split_mini_batches(count: int, mini_batches: int, seed: int, unit: int = 1) -> list[list[int]]:
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
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = [units * i // mini_batches for i in range(mini_batches + 1)]
    return [[unit * u + k for u in order[a:b] for k in range(unit)] for a, b in zip(bounds, bounds[1:])]


def balance(lengths: Sequence[int], num_ranks: int, budget: int, rounds: int = 1) -> list[list[list[int]]]:
    """Spread sequences over ranks and micro-batches: longest first, each into the emptiest bin.

    Args:
        lengths: positions of each sequence.
        num_ranks: data-parallel ranks.
        budget: positions of one micro-batch; a longer sequence has a micro-batch of its own.
        rounds: the number of micro-batches is a multiple of this.

    Returns:
        [rank][micro_batch] -> indices into `lengths`; every rank has as many micro-batches, some of them empty
        where there are fewer sequences than bins.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    limit = max(budget, max(lengths, default=0))
    per_rank = max(1, -(-sum(lengths) // (limit * num_ranks)))
    while True:
        per_rank = -(-per_rank // rounds) * rounds
        bins: list[list[int]] = [[] for _ in range(per_rank * num_ranks)]
        fill = [0] * len(bins)
        for i in order:
            emptiest = fill.index(min(fill))
            bins[emptiest].append(i)
            fill[emptiest] += lengths[i]
        if max(fill) <= limit:
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        per_rank += 1


def pack_mini_batch(
    samples: Sequence[Sample],
    algorithm: Algorithm,
    *,
    rank: int,
    num_ranks: int,
    budget: int,
    max_response: int,
    multiple: int = 1,
    segment_multiple: int = 1,
    rounds: int = 1,
    unit: int = 1,
) -> list[PackedBatch]:
    """This rank's micro-batches of one global mini-batch.

    Args:
        samples: the whole mini-batch, the same on every rank.
        rank, num_ranks: place in the data-parallel group.
        budget: positions of one micro-batch.
        max_response: longest response allowed, the constant of `aggregation="constant"`.
        multiple: micro-batches are filled up to a multiple of this (sequence parallelism cuts them into tp parts).
        segment_multiple: so is every sequence (context parallelism cuts each into 2*cp parts); `multiple` is one of it.
        rounds: their number is a multiple of this (the interleaved pipeline schedule works in rounds of pp).
        unit: this many consecutive samples share a micro-batch, next to each other.
    """
    lengths = torch.tensor([s.num_response for s in samples])
    of_groups = torch.tensor([float(s.num_response if s.group_length is None else s.group_length) for s in samples])
    weights = sequence_weights(
        lengths, algorithm.aggregation, max_length=max_response, group_lengths=of_groups
    ).tolist()
    units = [samples[i : i + unit] for i in range(0, len(samples), unit)]
    positions = [sum(_filled_up(s.positions, segment_multiple) for s in u) for u in units]
    mine = balance(positions, num_ranks, budget, rounds)[rank]
    # a bin without a sequence still takes part in every collective: the shortest ones, with weight 0
    idle = [_untrained(s) for s in units[positions.index(min(positions))]]
    return [
        pad(
            pack(
                [s for u in b for s in units[u]] or idle,
                [weights[unit * u + k] for u in b for k in range(unit)] or [0.0] * unit,
                segment_multiple,
            ),
            multiple,
        )
        for b in mine
    ]


def _filled_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _untrained(sample: Sample) -> Sample:
    return replace(sample, num_response=0, rollout_logprobs=(), lags=sample.lags and ())


def pad(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with one more segment, without loss tokens, that fills its positions up to a multiple of `multiple`."""
    total = batch.token_ids.numel()
    missing = _filled_up(total, multiple) - total
    if missing == 0:
        return batch
    routes = None if batch.rollout_expert_ids is None else _filler_routes(batch.rollout_expert_ids, missing)
    filler = pack(
        [Sample((0,) * (missing + 1), 0, 0.0, (), expert_ids=routes, lags=None if batch.lags is None else ())], [0.0]
    )
    joined = {
        f.name: torch.cat([getattr(batch, f.name), getattr(filler, f.name)])
        for f in fields(batch)
        if getattr(batch, f.name) is not None
    }
    joined["segment_ids"][total:] += batch.cu_seqlens.numel() - 1
    joined["cu_seqlens"] = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + missing])
    return PackedBatch(**joined)


def _filler_routes(routes: Tensor, count: int) -> Tensor:
    """Possible routes for tokens that mean nothing, as spread over the experts as the given ones [n, L, K]."""
    return routes[torch.arange(count) % len(routes)]


def pack(samples: Sequence[Sample], weights: Sequence[float], segment_multiple: int = 1) -> PackedBatch:
    """Lay sequences end to end.

    Args:
        weights: the loss weight of a response token of each.
        segment_multiple: sequences are filled up to a multiple of this by tokens behind their end, where causal
            attention hides them. The longest sequence gives a padded batch.
    """
    fillers = [_filled_up(s.positions, segment_multiple) - s.positions for s in samples]
    positions = [s.positions + filler for s, filler in zip(samples, fillers)]
    total = sum(positions)
    segment_ids = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(positions))
    loss_mask = torch.cat([_response_mask(s, filler) for s, filler in zip(samples, fillers)])

    def spread(values: Sequence[float]) -> Tensor:
        return torch.where(loss_mask, torch.tensor(values)[segment_ids], 0.0)

    rollout_logprobs = torch.zeros(total)
    rollout_logprobs[loss_mask] = torch.tensor([x for s in samples for x in s.rollout_logprobs])
    lags = None
    if any(s.lags is not None for s in samples):
        lags = torch.zeros(total, dtype=torch.int64)
        lags[loss_mask] = torch.tensor([x for s in samples for x in s.lags or ()], dtype=torch.int64)
    return PackedBatch(
        token_ids=torch.tensor([t for s, n in zip(samples, fillers) for t in (*s.token_ids[:-1], *(0,) * n)]),
        targets=torch.tensor([t for s, n in zip(samples, fillers) for t in (*s.token_ids[1:], *(0,) * n)]),
        positions=torch.cat([torch.arange(n) for n in positions]),
        segment_ids=segment_ids,
        loss_mask=loss_mask,
        cu_seqlens=torch.tensor([0, *positions]).cumsum(0).int(),
        weights=spread(weights),
        advantages=spread([s.advantage for s in samples]),
        old_logprobs=torch.zeros(total),
        rollout_logprobs=rollout_logprobs,
        rollout_expert_ids=_joined_routes(samples, fillers),
        lags=lags,
    )


def _response_mask(sample: Sample, filler: int) -> Tensor:
    place = torch.arange(sample.positions + filler)
    return (place >= sample.positions - sample.num_response) & (place < sample.positions)


def _joined_routes(samples: Sequence[Sample], fillers: Sequence[int]) -> Tensor | None:
    routes = [s.expert_ids for s in samples if s.expert_ids is not None]
    assert len(routes) in (0, len(samples)), "some sequences of a batch have routes, others none"
    filled = [r for own, count in zip(routes, fillers) for r in (own, _filler_routes(own, count))]
    return torch.cat(filled) if filled else None
