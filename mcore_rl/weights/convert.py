"""Hugging Face folder <-> Megatron checkpoint, and between Megatron layouts: one process, one parameter at a time.

No process group, no GPU and no model are made, so a layout of a thousand ranks is written on a laptop. All directions
are the same two steps: `StoredWeights.read` gives a parameter's HF tensors as views, the plan copies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.atomic import to_disk, written_beside
from mcore_rl.weights.hf_read import check_finite
from mcore_rl.weights.hf_write import copy_description, main_dtype, save_hf
from mcore_rl.weights.megatron_io import Param, ParamsWriter, params_of
from mcore_rl.weights.progress import byte_progress
from mcore_rl.weights.shards import Shard, TensorSpec
from mcore_rl.weights.stored import StoredWeights, open_weights


def to_hf(
    source: str | Path, out: str | Path, dtype: torch.dtype | None = None, config_dir: str | Path | None = None
) -> Path:
    """Write weights of either kind as a Hugging Face folder.

    Args:
        source: as `open_weights`.
        dtype: of the files (tensors of fixed dtype keep it); None: every tensor keeps its own.
        config_dir: as `open_weights`; its files are carried along.

    Raises:
        ValueError: `out` exists; a tensor of the source is missing, unknown, misshapen, cut off or not finite (names
            it); the disk is full.
    """
    weights, target = _checked(source, out, config_dir)
    dtypes = {name: spec.dtype for name, spec in _in_dtype(weights, dtype).items()}
    return save_hf(target, weights.hf_config, weights.described, _tensors(weights, "to HF"), dtypes)


@torch.no_grad()
def to_megatron(
    source: str | Path,
    out: str | Path,
    layout: ParallelLayout,
    dtype: torch.dtype | None = None,
    config_dir: str | Path | None = None,
) -> Path:
    """Write weights of either kind as a torch_dist checkpoint, cut as the ranks of `layout` hold them.

    Config, tokenizer and generation files lie beside the weights, so that the folder can be a `model.path`.

    Args:
        source, dtype, config_dir: as `to_hf`.

    Raises:
        ValueError: as `to_hf`; the layout does not divide the model; the tensors of one parameter differ in dtype.
    """
    weights, target = _checked(source, out, config_dir)
    layout.validate_model(weights.hf_config)
    specs = _in_dtype(weights, dtype)
    with written_beside(target, sum(spec.nbytes for spec in specs.values())) as partial:
        writer = ParamsWriter(partial, weights.hf_config, layout)
        with byte_progress("to Megatron", sum(spec.nbytes for spec in weights.specs.values())) as advance:
            for param, shards in _by_param(weights):
                for shard in shards:
                    check_finite(shard.hf_name, shard.view)
                writer.write(param, shards, _common_dtype(param, specs))
                advance(sum(shard.view.nbytes for shard in shards))
        writer.finish()
        copy_description(weights.described, partial, main_dtype(specs))
        for file in partial.iterdir():
            to_disk(file)
    return target


def _checked(source: str | Path, out: str | Path, config_dir: str | Path | None) -> tuple[StoredWeights, Path]:
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(target)!r} exists and is not empty, so it is not written to; choose another path")
    weights = open_weights(source, config_dir)
    weights.check()
    return weights, target


def _in_dtype(weights: StoredWeights, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    fixed = {name: p.fixed_dtype for p in params_of(weights.hf_config) for name in p.names}
    return {name: TensorSpec(s.shape, fixed[name] or dtype or s.dtype) for name, s in weights.specs.items()}


def _tensors(weights: StoredWeights, what: str) -> Iterator[tuple[str, Tensor]]:
    with byte_progress(what, sum(spec.nbytes for spec in weights.specs.values())) as advance:
        for shards in weights.read():
            for shard in shards:
                check_finite(shard.hf_name, shard.view)
                yield shard.hf_name, shard.view.reshape(shard.shape)
                advance(shard.view.nbytes)


def _by_param(weights: StoredWeights) -> Iterator[tuple[Param, list[Shard]]]:
    """Every parameter with its HF tensors; both sides follow the order of the model's table."""
    tensors = (shard for shards in weights.read() for shard in shards)
    for param in params_of(weights.hf_config):
        shards = [next(tensors) for _ in param.names]
        assert tuple(shard.hf_name for shard in shards) == param.names
        yield param, shards


def _common_dtype(param: Param, specs: dict[str, TensorSpec]) -> torch.dtype:
    dtypes = {name: specs[name].dtype for name in param.names}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{found}: they are one parameter in Megatron; choose one with --dtype")
    return next(iter(dtypes.values()))
