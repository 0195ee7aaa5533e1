"""Two models on disk, bit by bit, by the names of their HF tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mcore_rl.weights.progress import byte_progress
from mcore_rl.weights.stored import StoredWeights

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Difference(NamedTuple):
    name: str
    what: str


def compare(a: StoredWeights, b: StoredWeights) -> list[Difference]:
    """Every tensor that is not the same, bit for bit and in dtype, in both; and every one that is not finite.

    Raises:
        ValueError: the models are of different families, or a file cannot be read; names the tensors.
    """
    if a.hf_config.model_type != b.hf_config.model_type:
        raise ValueError(f"{a.folder} is a {a.hf_config.model_type} model, {b.folder} a {b.hf_config.model_type}")
    found = [Difference(n, f"{what} [{side.folder}]") for side in (a, b) for n, what in side.problems.items()]
    known = {difference.name for difference in found}
    for one, other in ((a, b), (b, a)):
        only = [name for name in one.specs if name not in other.specs and name not in known]
        found += [Difference(name, f"is in {one.folder} only") for name in only]
    common = [name for name in a.specs if name in b.specs]
    digests: dict[str, tuple[bytes, bytes]] = {}
    with byte_progress("verify", sum(a.specs[name].nbytes for name in common)) as advance:
        for (name, x), (_, y) in zip(_tensors(a, common), _tensors(b, common), strict=True):
            for what in _not_finite(x, a) + _not_finite(y, b):
                found.append(Difference(name, what))
            if what := _difference(x, y):
                found.append(Difference(name, what))
                digests[name] = _digest(x), _digest(y)
            advance(a.specs[name].nbytes)
    return [_with_source(difference, digests) for difference in found]


def _tensors(weights: StoredWeights, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    wanted = set(names)
    for shards in weights.read(wanted):
        for shard in shards:
            if shard.hf_name in wanted:
                yield shard.hf_name, shard.view.reshape(shard.shape)


def _not_finite(x: Tensor, weights: StoredWeights) -> list[str]:
    if bool(torch.stack(torch.aminmax(x)).isfinite().all()):
        return []
    return [f"has {x.numel() - int(x.isfinite().sum())} values that are NaN or infinite [{weights.folder}]"]


def _difference(x: Tensor, y: Tensor) -> str:
    if x.shape != y.shape:
        return f"has shape {tuple(x.shape)} and {tuple(y.shape)}"
    if x.dtype != y.dtype:
        narrow = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
        same = torch.equal(x.to(narrow), y.to(narrow))
        return f"is {x.dtype} and {y.dtype}" + (", the values are the same when rounded" if same else "")
    bits = _BITS[x.element_size()]
    if torch.equal(x.view(bits), y.view(bits)):
        return ""
    if x.dim() == 2 and x.shape[0] == x.shape[1] and torch.equal(x, y.T):
        return "is transposed"
    unequal = x.view(bits) != y.view(bits)
    count = int(unequal.sum())
    first = tuple(unequal.nonzero()[0].tolist())
    largest = (x.double() - y.double()).abs().max().item()
    return f"differs in {count} of {x.numel()} values, by up to {largest:.3g}, first at {first}"


def _digest(x: Tensor) -> bytes:
    return hashlib.blake2b(x.contiguous().view(-1).view(torch.uint8).numpy()).digest()


def _with_source(difference: Difference, digests: dict[str, tuple[bytes, bytes]]) -> Difference:
    """Add whose values they are where two tensors have changed places."""
    if difference.name not in digests:
        return difference
    _, mine = digests[difference.name]
    origin = next((n for n, (theirs, _) in digests.items() if theirs == mine and n != difference.name), None)
    return difference._replace(what=f"{difference.what}; it holds the values of {origin!r}") if origin else difference
