"""Hugging Face folders, written: complete or not there.

Every name and shape is known beforehand, so headers are written first and each tensor goes to its place as it arrives:
one tensor in memory. File format: 8 bytes little-endian header length, JSON header, raw row-major data
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mcore_rl.weights.atomic import written_beside
from mcore_rl.weights.hf_read import DTYPES, INDEX, SINGLE, some
from mcore_rl.weights.shards import TensorSpec, hf_shapes

_OF_WEIGHTS = (".index.json", "metadata.json")  # of safetensors, of a Megatron checkpoint
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}  # config, tokenizer, templates, model code


def save_hf(
    out_dir: str | Path,
    hf_config: Any,
    source_dir: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a complete HF folder that transformers and vLLM load, or nothing.

    The folder is renamed into place when it is complete and on disk. A model folder that is already at `out_dir` is
    replaced.

    Args:
        source_dir: HF folder whose config, tokenizer, generation config and templates are copied.
        tensors: (name, full tensor) of every name in `hf_shapes(hf_config)`, in any order, each once.
        dtype: of the tensors on disk (those of fixed dtype keep it), or of each by its name; None: of the first tensor.
        max_shard_bytes: a larger model is split into several files with an index.

    Raises:
        ValueError: `out_dir` exists and is not a model folder; a tensor is unknown, missing, written twice or of
            another shape; the disk is full (names path, needed and free bytes).
    """
    out, source = Path(out_dir), Path(source_dir)
    if not (source / "config.json").is_file():
        raise ValueError(f"source folder {str(source)!r} has no config.json to copy")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not a model folder, so it is not replaced; choose another path")
    if dtype is None:
        first = next(iterator := iter(tensors))
        dtype, tensors = first[1].dtype, chain([first], iterator)
    if isinstance(dtype, Mapping):
        specs = {name: TensorSpec(spec.shape, dtype[name]) for name, spec in hf_shapes(hf_config).items()}
        dtype = main_dtype(specs)
    else:
        specs = hf_shapes(hf_config, dtype)
    needed = sum(spec.nbytes for spec in specs.values())
    with written_beside(out, needed) as partial:
        _write_weights(partial, specs, tensors, max_shard_bytes)
        copy_description(source, partial, dtype)
    return out


@dataclass
class _Slot:
    """Where a tensor's bytes go."""

    file: BinaryIO
    offset: int
    spec: TensorSpec


def _write_weights(
    folder: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]], limit: int
) -> None:
    with ExitStack() as stack:
        slots = _lay_out(folder, specs, limit, stack)
        files = {id(slot.file): slot.file for slot in slots.values()}
        for name, tensor in tensors:
            slot = slots.pop(name, None)
            if slot is None:
                raise ValueError(f"tensor {name!r} is {'written twice' if name in specs else 'not part of the model'}")
            if tuple(tensor.shape) != slot.spec.shape:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model needs {slot.spec.shape}")
            data = tensor.detach().to("cpu", slot.spec.dtype).contiguous()
            slot.file.seek(slot.offset)
            slot.file.write(data.view(-1).view(torch.uint8).numpy())
        if slots:
            raise ValueError(f"tensors were not written: {some(list(slots))}")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _lay_out(folder: Path, specs: Mapping[str, TensorSpec], limit: int, stack: ExitStack) -> dict[str, _Slot]:
    """Deal the tensors out to files, write the headers and the index; the data follows."""
    bins: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in specs.items():
        size = spec.nbytes
        if bins[-1] and used + size > limit:
            bins.append({})
            used = 0
        bins[-1][name] = spec
        used += size
    names = [f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors" for i in range(len(bins))]
    if len(bins) == 1:
        names = [SINGLE]
    slots = {}
    for file_name, members in zip(names, bins, strict=True):
        file = stack.enter_context((folder / file_name).open("wb"))
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, spec in members.items():
            end = offset + spec.nbytes
            header[name] = {"dtype": DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts on an 8-byte boundary
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in members.items():
            slots[name] = _Slot(file, 8 + len(text) + header[name]["data_offsets"][0], spec)
    if len(bins) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        weight_map = {name: file_name for file_name, members in zip(names, bins, strict=True) for name in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return slots


def copy_description(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy everything beside the weights: config (with the dtype that is written), tokenizer, generation config,
    templates, model code."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _COPIED and not file.name.endswith(_OF_WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """The dtype of most bytes: what config.json names."""
    total: defaultdict[torch.dtype, int] = defaultdict(int)
    for spec in specs.values():
        total[spec.dtype] += spec.nbytes
    return max(total, key=total.__getitem__)
