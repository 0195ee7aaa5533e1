"""A rollout that never changes, and what ranks of any layout say of it, by the tokens of its sequences."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch


def make_samples() -> list:
    """Uneven lengths, advantages of both signs, old log-probs off the policy's."""
    from mcore_rl.data.sequences import Sample

    rng = random.Random(0)
    samples = []
    for i in range(10):
        prompt, response = rng.randint(2, 9), rng.randint(1, 12)
        tokens = tuple(rng.randrange(97) for _ in range(prompt + response))
        logprobs = tuple(-4.5 + rng.gauss(0, 0.5) for _ in range(response))
        samples.append(Sample(tokens, response, (-1.0, 0.5, 1.5)[i % 3], logprobs))
    return samples


def sequences(batch) -> Iterator[tuple[tuple[int, ...], slice]]:
    """(targets, places in the batch) of every sequence with a response, without what fills it up."""
    for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()):
        places = batch.loss_mask[a:b].nonzero()[:, 0]
        if len(places):
            where = slice(a, a + int(places[-1]) + 1)
            yield tuple(batch.targets[where].tolist()), where


def from_all_ranks(mine: dict) -> dict:
    """The ranks' findings in one dictionary, on every rank."""
    import torch.distributed as dist

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {key: value for part in everyone for key, value in part.items()}


def make_labelled() -> list:
    """Sequences for a discriminator: real ones, each before a generated or a rejected one."""
    from mcore_rl.data.real_fake import FAKE, REAL, REJECTED, Labelled

    kinds = (REAL, FAKE, REAL, REJECTED)
    return [Labelled(tuple(sample.token_ids.tolist()), kinds[i % 4]) for i, sample in enumerate(make_samples())]


def gather_logprobs(policy, batches, groups) -> dict[tuple, list[float]]:
    """Log-probs by the tokens of their sequence, from all ranks."""
    from mcore_rl.model.forward import forward_only

    outputs, mine = forward_only(policy, batches), {}
    if groups.reports:
        for batch, out in zip(batches, outputs, strict=True):
            mine |= {targets: out.logprobs[where].tolist() for targets, where in sequences(batch)}
    return from_all_ranks(mine)


def gradients(chunks: list, exporter) -> dict:
    """Gathered to HF names, by way of the parameters, which get their values back."""
    params = [p for chunk in chunks for p in chunk.parameters()]
    kept = [p.data.clone() for p in params]
    for p in params:
        p.data.copy_(p.main_grad)
    found = {name: tensor.clone() for name, tensor in exporter if tensor is not None}
    for p, value in zip(params, kept):
        p.data.copy_(value)
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
