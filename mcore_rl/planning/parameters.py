"""Exact numbers of parameters, from the table of shards that also loads and saves the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod
from typing import Any

from mcore_rl.parallel.layout import EXPERT_FIELDS, ParallelLayout
from mcore_rl.weights.shards import hf_regions, megatron_boxes

# Elements to which Megatron's distributed optimizer aligns parameters and ends of its buffers
# (megatron/core/distributed/param_and_grad_buffer.py:646,665, version 0.16.1).
_PARAM_ALIGNMENT, _BUFFER_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class ChunkParameters:
    """Sizes of the parameters of one model chunk on one rank, in elements; dense ones and experts' apart.

    They are apart because each kind is averaged over, and by the distributed optimizer sharded over, ranks of its own.
    """

    dense: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.dense) + sum(self.experts)


def held_parameters(hf_config: Any, layout: ParallelLayout, stage: int) -> tuple[ChunkParameters, ...]:
    """What every rank of pipeline stage `stage` holds, one entry a model chunk (virtual stage).

    All ranks of a stage hold equally many: the others differ in which elements they hold only.
    """
    dense: list[dict[str, int]] = [{} for _ in range(layout.vpp)]
    experts: list[dict[str, int]] = [{} for _ in range(layout.vpp)]
    for box in megatron_boxes(hf_config, layout, stage * layout.stage_size):
        name = box.params[0]
        if not name.endswith("router.expert_bias"):  # a buffer: no gradient, no optimizer
            (experts if ".experts." in name else dense)[box.chunk][name] = prod(box.param_shape)
    return tuple(ChunkParameters(tuple(d.values()), tuple(e.values())) for d, e in zip(dense, experts, strict=True))


def buffer_numel(sizes: tuple[int, ...], shards: int, padded: bool) -> int:
    """Elements of one of Megatron's contiguous buffers.

    Args:
        padded: as the distributed optimizer does, for `shards` ranks.

    Example:
        >>> buffer_numel((100, 10), 3, padded=False), buffer_numel((100, 10), 3, padded=True)
        (110, 384)
    """
    if not padded or not sizes:
        return sum(sizes)
    *others, last = reversed(sizes)
    used = sum(_up(size, _PARAM_ALIGNMENT) for size in others) + last
    return _up(used, lcm(shards, _BUFFER_ALIGNMENT))


def model_parameters(hf_config: Any) -> tuple[int, int]:
    """(all parameters, those that one token passes through) of a model, embedding and output matrix included."""
    total = active = 0
    experts = next((n for field in EXPERT_FIELDS if (n := getattr(hf_config, field, None))), 1)
    chosen = getattr(hf_config, "num_experts_per_tok", None) or 1
    for region in hf_regions(hf_config):
        numel = prod(region.shape)
        total += numel
        active += numel * chosen if ".experts." in region.hf_name else numel * experts
    return total, active // experts


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
