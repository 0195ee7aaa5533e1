"""Small packed batches in fp64 on which the losses are checked."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.functional.reduce import sequence_weights
from mcore_rl.types import PolicyOutput, Prompt, RolloutGroup, Trajectory, WeightedBatch

F64 = torch.float64
LENGTHS = (5, 3, 4, 6)  # positions of each segment; the first position of each is prompt
PER_TOKEN = ("weights", "advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "returns")


def make_batch(seed=0, aggregation="sequence_mean", lengths=LENGTHS, advantages=(1.5, -0.5, -1.0, 0.7)):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.cat([torch.arange(n) >= 1 for n in lengths])
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    weights = sequence_weights(torch.tensor(lengths) - 1, aggregation, max_length=8)[segments] * mask

    def logprobs() -> torch.Tensor:
        return -torch.rand(total, generator=g, dtype=F64) - 0.1

    old = logprobs()
    return WeightedBatch(
        labels=torch.zeros(len(lengths), dtype=torch.long),
        token_ids=torch.zeros(total, dtype=torch.long),
        targets=torch.zeros(total, dtype=torch.long),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        segment_ids=segments,
        loss_mask=mask,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        weights=weights,
        advantages=torch.tensor(advantages, dtype=F64)[segments],
        old_logprobs=old,
        rollout_logprobs=old + 0.2 * torch.randn(total, generator=g, dtype=F64),
        ref_logprobs=logprobs(),
        values=torch.randn(total, generator=g, dtype=F64),
        returns=torch.randn(total, generator=g, dtype=F64),
    )


def make_output(batch: WeightedBatch, scale=0.3, seed=1) -> PolicyOutput:
    g = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(batch.old_logprobs.numel(), generator=g, dtype=F64)
    logprobs = (batch.old_logprobs + noise).requires_grad_()
    return PolicyOutput(logprobs, torch.rand(logprobs.numel(), generator=g, dtype=F64).requires_grad_())


def gradient(algorithm: Algorithm, batch: WeightedBatch, out: PolicyOutput) -> torch.Tensor:
    """[T] of the loss by each log-prob."""
    return torch.autograd.grad(algorithm.loss(batch, out).loss, out.logprobs)[0]


def cut(batch: WeightedBatch, out: PolicyOutput, segments_each: int = 1):
    """The batch in micro-batches of `segments_each` segments, weights as they are."""
    bounds = batch.cu_seqlens.tolist()
    for first in range(0, len(bounds) - 1, segments_each):
        a, b = bounds[first], bounds[first + segments_each]
        rows = {
            f.name: getattr(batch, f.name)[a:b]
            for f in fields(batch)
            if f.name not in ("cu_seqlens", "labels") and getattr(batch, f.name) is not None
        }
        rows["segment_ids"] = rows["segment_ids"] - first
        starts = batch.cu_seqlens[first : first + segments_each + 1] - a
        labels = batch.labels[first : first + segments_each]
        part = replace(batch, **rows, cu_seqlens=starts, labels=labels)
        yield part, PolicyOutput(out.logprobs[a:b], out.entropy[a:b])


def poisoned(batch: WeightedBatch, poison: float) -> WeightedBatch:
    """`poison` wherever nothing was sampled."""
    bad = {f: torch.where(batch.loss_mask, getattr(batch, f), poison) for f in PER_TOKEN}
    return replace(batch, **bad)


def make_trajectory(reward: float | None = None, length: int = 2, finish_reason: str = "stop", **fields) -> Trajectory:
    return Trajectory((1, 2), (3,) * length, (-0.1,) * length, finish_reason, 0, reward=reward, **fields)


def make_group(*rewards: float, id: str = "0") -> RolloutGroup:
    return RolloutGroup(Prompt(id, (1, 2), "x"), tuple(make_trajectory(r) for r in rewards))
