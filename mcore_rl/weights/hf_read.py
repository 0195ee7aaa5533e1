"""Hugging Face folders, read: safetensors are mapped into memory, and only the boxes that a rank wants are copied."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcore_rl.weights.plan import plan
from mcore_rl.weights.shards import Region, Shard, hf_regions, whole_shard

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


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
    single = folder / SINGLE
    if not single.is_file():
        raise ValueError(f"model folder {str(folder)!r} has neither {SINGLE} nor {INDEX}; only safetensors are read")
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


def map_tensor(opened: Any, file: Path, region: Region) -> Shard:
    """The whole tensor as a memory-mapped shard."""
    try:
        tensor = opened.get_tensor(region.hf_name)
    except SafetensorError as error:
        raise ValueError(
            f"the index names {region.hf_name!r} in {str(file)!r}, but the file does not hold it"
        ) from error
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"tensor {region.hf_name!r} in {str(file)!r} is {tensor.dtype}, which a cast would corrupt; "
            f"allowed: {', '.join(str(d) for d in DTYPES)}"
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


def some(names: Sequence[str]) -> str:
    """The first names of a list, quoted."""
    return ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
