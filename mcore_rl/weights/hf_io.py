"""HF folders: streaming safetensors in both directions.

Reading maps the files into memory and copies only the boxes a rank asks for. Writing knows every name and shape
beforehand, so headers are written first and each tensor goes to its place as it arrives: one tensor in memory.
File format: 8 bytes little-endian header length, JSON header, raw row-major data
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcore_rl.weights.atomic import written_beside
from mcore_rl.weights.plan import plan
from mcore_rl.weights.shards import Region, Shard, TensorSpec, hf_regions, hf_shapes, whole_shard

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_OF_WEIGHTS = (".index.json", "metadata.json")  # of safetensors, of a Megatron checkpoint
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}  # config, tokenizer, templates, model code


def hf_files(path: str | Path) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the index or the single file of an HF folder.

    Raises:
        ValueError: missing folder, no safetensors in it, an unreadable or truncated file, a corrupt index, or an index
            that names a file that is not there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model folder {str(folder)!r} does not exist; pass a folder with config.json and safetensors")
    if (folder / INDEX).is_file():
        return _read_index(folder)
    single = folder / _SINGLE
    if not single.is_file():
        raise ValueError(f"model folder {str(folder)!r} has neither {_SINGLE} nor {INDEX}; only safetensors are read")
    with ExitStack() as stack:
        return dict.fromkeys(open_safetensors(single, stack).keys(), single)


def check_hf(path: str | Path, hf_config: Any) -> None:
    """Compare the tensors of a folder with those of a model: names, shapes and kinds, reading headers only.

    Raises:
        ValueError: as `load_hf`; or the folder holds a tensor that the model does not.
    """
    regions = {region.hf_name: region for region in hf_regions(hf_config)}
    files = hf_files(path)
    _check_names(path, regions, files)
    unknown = [name for name in files if name not in regions and not is_redundant(name)]
    if unknown:
        raise ValueError(
            f"model folder {str(path)!r} has tensors the model does not: {some(unknown)}; they would be dropped. "
            "Does config.json belong to these weights?"
        )
    with ExitStack() as stack:
        opened = {file: open_safetensors(file, stack) for file in set(files.values())}
        for name, region in regions.items():
            map_tensor(opened[files[name]], files[name], region)


@torch.no_grad()
def load_hf(path: str | Path, shards: Sequence[Shard]) -> None:
    """Fill the live views from an HF folder, casting to their dtype; only the pages of their boxes are read.

    Raises:
        ValueError: as `hf_files`; or a tensor is missing, has another shape, is not in its file, or is not a
            float32, float64, bfloat16 or float16 tensor, or has values that are not finite; names the tensor, what was
            found and what is needed.
    """
    files = hf_files(path)
    by_file: defaultdict[Path, list[Shard]] = defaultdict(list)
    _check_names(path, {s.hf_name: None for s in shards}, files)
    for shard in shards:
        by_file[files[shard.hf_name]].append(shard)
    for file, wanted in by_file.items():
        with ExitStack() as stack:
            opened = open_safetensors(file, stack)
            sources = [map_tensor(opened, file, shard) for shard in {s.hf_name: s for s in wanted}.values()]
            plan(sources, wanted).execute_local()
    for shard in shards:
        check_finite(shard.hf_name, shard.view)


def check_finite(name: str, values: Tensor) -> None:
    """Raises ValueError if a value is NaN or infinite."""
    if values.numel() and not all(math.isfinite(end) for end in torch.aminmax(values)):
        bad = values.numel() - int(values.isfinite().sum())
        raise ValueError(f"tensor {name!r} has {bad} values that are NaN or infinite; the weights are broken")


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
    needed = sum(nbytes(spec) for spec in specs.values())
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
        size = nbytes(spec)
        if bins[-1] and used + size > limit:
            bins.append({})
            used = 0
        bins[-1][name] = spec
        used += size
    names = [f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors" for i in range(len(bins))]
    if len(bins) == 1:
        names = [_SINGLE]
    slots = {}
    for file_name, members in zip(names, bins, strict=True):
        file = stack.enter_context((folder / file_name).open("wb"))
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, spec in members.items():
            end = offset + nbytes(spec)
            header[name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts on an 8-byte boundary
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in members.items():
            slots[name] = _Slot(file, 8 + len(text) + header[name]["data_offsets"][0], spec)
    if len(bins) > 1:
        total = sum(nbytes(spec) for spec in specs.values())
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


def map_tensor(opened: Any, file: Path, region: Region) -> Shard:
    """The whole tensor as a memory-mapped shard."""
    try:
        tensor = opened.get_tensor(region.hf_name)
    except SafetensorError as error:
        raise ValueError(
            f"the index names {region.hf_name!r} in {str(file)!r}, but the file does not hold it"
        ) from error
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"tensor {region.hf_name!r} in {str(file)!r} is {tensor.dtype}, which a cast would corrupt; "
            f"allowed: {', '.join(str(d) for d in _DTYPES)}"
        )
    try:
        return whole_shard(region, tensor)
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from None


def open_safetensors(file: Path, stack: ExitStack) -> Any:
    """A file's header, the file mapped. Raises ValueError if it is not complete; names the tensors that are cut off."""
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except (SafetensorError, OSError) as error:
        lost = _cut_off(file)
        what = f"; cut off: {some(lost)}" if lost else ""
        raise ValueError(f"{str(file)!r} is not a complete safetensors file: {error}{what}") from error


def _cut_off(file: Path) -> list[str]:
    """Tensors whose data lies beyond the end of a file; none where not even the header can be read."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if size < file.stat().st_size else {}
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name, end in ends.items() if 8 + size + end > file.stat().st_size]


def _read_index(folder: Path) -> dict[str, Path]:
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = {str(name): folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"index {str(path)!r} is corrupt: {type(error).__name__}: {error}") from error
    absent = sorted({file.name for file in files.values() if not file.is_file()})
    if absent:
        raise ValueError(f"index {str(path)!r} names files that do not exist: {some(absent)}")
    return files


def _check_names(path: str | Path, needed: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    missing = [name for name in needed if name not in present]
    if missing:
        raise ValueError(
            f"model folder {str(path)!r} lacks tensors the model needs: {some(missing)}. "
            "Does config.json (layers, experts, tie_word_embeddings) belong to these weights?"
        )


def is_redundant(name: str) -> bool:
    """Tensors some writers add and every reader ignores: rotary tables, the second name of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def main_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """The dtype of most bytes: what config.json names."""
    total: defaultdict[torch.dtype, int] = defaultdict(int)
    for spec in specs.values():
        total[spec.dtype] += nbytes(spec)
    return max(total, key=total.__getitem__)


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


def some(names: Sequence[str]) -> str:
    """The first names of a list, quoted."""
    return ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
