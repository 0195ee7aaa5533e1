"""The weights in a folder, Hugging Face files or a Megatron checkpoint, read in the same way: as whole HF tensors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mcore_rl.weights.families import family
from mcore_rl.weights.hf_read import (
    check_finite,
    check_hf,
    hf_files,
    is_redundant,
    load_hf,
    map_tensor,
    open_safetensors,
)
from mcore_rl.weights.megatron_io import METADATA, StoredParams, params_of
from mcore_rl.weights.plan import plan
from mcore_rl.weights.shards import Shard, TensorSpec, hf_regions

POLICY = "policy"  # what a training checkpoint calls the model that is trained
_MAPPED_BYTES = 2**27  # about as much of an HF folder is in memory at once


class StoredWeights(ABC):
    """A model in a folder.

    Attributes:
        described: the folder with its config.json and tokenizer files.
        specs: name on disk -> shape and dtype of every tensor that is there and fits the model, in the table's order.
        problems: name -> what is wrong with it, of all others: missing, unknown, misshapen, cut off.
    """

    def __init__(self, folder: Path, hf_config: Any) -> None:
        self.folder = self.described = folder
        self.hf_config = hf_config
        self.specs: dict[str, TensorSpec] = {}
        self.problems: dict[str, str] = {}

    @abstractmethod
    def read(self, names: Collection[str] | None = None) -> Iterator[list[Shard]]:
        """Whole tensors with their memory, those that are stored as one parameter together.

        Args:
            names: of the tensors wanted; a group with one of them comes whole. None: all in `specs`.
        """

    def check(self) -> None:
        """Raises ValueError if a tensor is missing, unknown, misshapen or cut off; names them."""
        if self.problems:
            lines = [f"{name!r} {problem}" for name, problem in self.problems.items()]
            more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise ValueError(
                f"{str(self.folder)!r} does not hold the model of its config.json: {'; '.join(lines[:5])}{more}"
            )


class HFWeights(StoredWeights):
    """Safetensors files, mapped into memory: a tensor is read when it is used."""

    kind = "Hugging Face folder"

    def __init__(self, folder: Path, hf_config: Any) -> None:
        super().__init__(folder, hf_config)
        self._files = hf_files(folder)
        self._regions = {region.hf_name: region for region in hf_regions(hf_config)}
        for name in self._files:
            if name not in self._regions and not is_redundant(name):
                self.problems[name] = "is in no row of the model's table"
        with ExitStack() as stack:
            opened = {file: open_safetensors(file, stack) for file in set(self._files.values())}
            for name, region in self._regions.items():
                if name not in self._files:
                    self.problems[name] = f"is missing; the model needs it with shape {region.shape}"
                    continue
                try:
                    view = map_tensor(opened[self._files[name]], self._files[name], region).view
                except ValueError as error:
                    self.problems[name] = str(error)
                else:
                    self.specs[name] = TensorSpec(region.shape, view.dtype)

    def read(self, names: Collection[str] | None = None) -> Iterator[list[Shard]]:
        wanted = self.specs if names is None else set(names)
        for batch in self._batches(name for name in self.specs if name in wanted):
            with ExitStack() as stack:  # pages stay in memory as long as their file is mapped
                opened: dict[Path, Any] = {}
                for name in batch:
                    file = self._files[name]
                    if file not in opened:
                        opened[file] = open_safetensors(file, stack)
                    yield [map_tensor(opened[file], file, self._regions[name])]

    def _batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        batch, size = [], 0
        for name in names:
            batch.append(name)
            size += self.specs[name].nbytes
            if size >= _MAPPED_BYTES:
                yield batch
                batch, size = [], 0
        yield batch


class MegatronWeights(StoredWeights):
    """A torch_dist checkpoint of any layout: of the converter, or a model's part of one that training saved."""

    kind = "Megatron checkpoint"

    def __init__(self, folder: Path, hf_config: Any) -> None:
        super().__init__(folder, hf_config)
        self._stored = StoredParams(folder)
        self._params = []
        regions = {region.hf_name: region for region in hf_regions(hf_config)}
        unused = set(self._stored.tensors)
        for param in params_of(hf_config):
            if found := self._stored.locate(param):
                unused.discard(found[0])
            if problem := self._stored.problem(param):
                self.problems |= dict.fromkeys(param.names, problem)
            else:
                self._params.append(param)
                dtype = self._stored.dtype(param)
                self.specs |= {name: TensorSpec(regions[name].shape, dtype) for name in param.names}
        self.problems |= dict.fromkeys(sorted(unused), "is in no row of the model's table")

    def read(self, names: Collection[str] | None = None) -> Iterator[list[Shard]]:
        wanted = None if names is None else set(names)
        for param in self._params:
            if wanted is None or wanted.intersection(param.names):
                yield self._stored.read(param)


def find_megatron(path: str | Path) -> Path | None:
    """The folder of the policy's (or the only) model if `path` is a Megatron checkpoint, else None.

    `path` can be that folder, one step of a run (checkpoints/step_000040), or a run's `checkpoints`: the newest step.
    """
    folder = Path(path)
    steps = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name)] if folder.is_dir() else []
    newest = max(steps, default=folder, key=lambda p: int(p.name.removeprefix("step_")) if p in steps else -1)
    return next((f for f in (newest, newest / POLICY) if (f / METADATA).is_file()), None)


def open_weights(path: str | Path, config_dir: str | Path | None = None) -> StoredWeights:
    """The weights at a path, of either kind; nothing but indices and headers is read.

    Args:
        config_dir: folder with config.json and tokenizer files, used where there are none beside the weights.

    Raises:
        ValueError: no weights there, an unreadable or cut off file, no config.json or one of an unknown family.
    """
    megatron = find_megatron(path)
    folder = megatron or Path(path)
    if not folder.is_dir():
        raise ValueError(f"{str(path)!r} does not exist; pass a Hugging Face folder or a Megatron checkpoint")
    described = folder if (folder / "config.json").is_file() else Path(config_dir or folder)
    hf_config = _read_config(described)
    weights = MegatronWeights(folder, hf_config) if megatron else HFWeights(folder, hf_config)
    weights.described = described
    return weights


def check_weights(path: str | Path, hf_config: Any) -> None:
    """Raises ValueError unless the folder holds the model of `hf_config`; names the tensors that do not fit."""
    megatron = find_megatron(path)
    if megatron is None:
        return check_hf(path, hf_config)
    MegatronWeights(megatron, hf_config).check()


def require_hf(path: str | Path, key: str) -> None:
    """Raises ValueError if a Megatron checkpoint is given where vLLM reads the weights itself."""
    if find_megatron(path):
        raise ValueError(
            f"{key}={str(path)!r} is a Megatron checkpoint, which vLLM cannot read; make a Hugging Face folder of it: "
            f"mcore-rl convert {path} OUT --to hf"
        )


@torch.no_grad()
def load_weights(path: str | Path, shards: Sequence[Shard]) -> None:
    """Fill live views from a folder of either kind, casting to their dtype.

    Raises:
        ValueError: as `check_weights` for the tensors wanted, or a weight is not finite; names the tensor.
    """
    if find_megatron(path) is None:
        return load_hf(path, shards)
    weights = open_weights(path)
    wanted: dict[str, list[Shard]] = {}
    for shard in shards:
        wanted.setdefault(shard.hf_name, []).append(shard)
    weights.problems = {name: why for name, why in weights.problems.items() if name in wanted}
    weights.problems |= {n: "is not of this model" for n in wanted if n not in weights.specs | weights.problems}
    weights.check()
    for sources in weights.read(wanted):
        plan(sources, [shard for source in sources for shard in wanted.get(source.hf_name, [])]).execute_local()
    for shard in shards:
        check_finite(shard.hf_name, shard.view)


def _read_config(folder: Path) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} has no config.json, so its model is unknown; name the Hugging Face folder that the "
            "weights came from (--config)"
        )
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    family(hf_config)
    return hf_config
