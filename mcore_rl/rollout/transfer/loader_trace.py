"""Where vLLM's own loader puts every HF tensor: read off a load that moves nothing.

The parameters are put on the meta device in the form they had when the model was loaded, the loader is given meta
tensors, and each of its copies is noted instead of done: from which box of which HF tensor, into which elements of
which parameter. That is the engine's table "HF name <-> box of a parameter", for every model that vLLM loads by plain
copies and any tensor parallelism; other models are told apart here, and go through the loader at every update.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import (
    get_layer_params_buffers,
    get_layer_tensors,
    get_tensor_load_numel,
)

from mcore_rl.rollout.transfer.layout import Metadata


class NotTraceable(Exception):
    """The loader does something else than copying boxes; the message says what."""


@dataclass(frozen=True)
class Loaded:
    """A box of an HF tensor in a parameter, which has it from element `offset` on with strides `stride`."""

    name: str
    box: list[list[int]]
    offset: int
    stride: list[int]


@dataclass(frozen=True)
class LoadedParameter:
    """A parameter in the form in which it is loaded; `parts` do not overlap and leave nothing out but padding."""

    module: str
    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: list[Loaded]


def trace_loader(model: nn.Module, metadata: Metadata) -> list[LoadedParameter]:
    """What `model.load_weights` would do with a checkpoint of these tensors; the model is left as it was.

    Raises:
        NotTraceable: it would do more than copy, or leave a tensor or an element of a parameter out.
    """
    sources = {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, dtype, shape in metadata}
    names = {_storage(tensor): name for name, tensor in sources.items()}
    with _as_loaded(model) as parameters, _CopiesNoted() as noted:
        model.load_weights(iter(sources.items()))
    parts: defaultdict[int, list[Loaded]] = defaultdict(list)
    for target, source in noted.copies:
        name = names.get(_storage(source))
        if name is None or _storage(target) not in parameters:
            raise NotTraceable(f"a tensor of shape {tuple(source.shape)} is computed while it is loaded")
        box = _box(source, sources[name])
        if box is None or target.shape != source.shape:
            raise NotTraceable(f"{name} is not loaded as a box")
        parts[_storage(target)].append(Loaded(name, box, target.storage_offset(), list(target.stride())))
    left = set(sources) - {part.name for of_parameter in parts.values() for part in of_parameter}
    if left:
        raise NotTraceable(f"{min(left)} is not loaded")
    return [_complete(*parameters[storage], of_parameter) for storage, of_parameter in parts.items()]


class _CopiesNoted(TorchDispatchMode):
    """Notes `target.copy_(source)` instead of doing it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.copies.append((args[0].detach(), args[1].detach()))
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_loaded(model: nn.Module) -> Iterator[dict[int, tuple[str, nn.Module, str, Tensor]]]:
    """Storage -> (module's name, module, parameter's name, meta tensor) while the parameters are as when they were
    loaded.
    """
    restored = []
    try:
        for layer in model.modules():
            info = get_layerwise_info(layer)
            info.kernel_tensors = get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            restored.append((layer, info))
            restore_layer_on_meta(layer, info)
            for tensor in get_layer_tensors(layer).values():  # a layerwise reload leaves its own loaders behind
                tensor.weight_loader = _get_original_loader(tensor)
        yield {
            _storage(tensor): (name, module, key, tensor)
            for name, module in model.named_modules(remove_duplicate=False)
            for key, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None
        }
    finally:
        for layer, info in restored:
            _place_kernel_tensors(layer, info)
            info.reset()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _box(view: Tensor, full: Tensor) -> list[list[int]] | None:
    """The box of the contiguous `full` that `view` is, None where it is none."""
    if view.dim() != full.dim() or any(n > 1 and s != t for n, s, t in zip(view.shape, view.stride(), full.stride())):
        return None
    box, rest = [], view.storage_offset()
    for size, stride in zip(view.shape, full.stride()):
        low, rest = divmod(rest, stride)
        box.append([low, low + size])
    return box


def _complete(module_name: str, module: nn.Module, name: str, tensor: Tensor, parts: list[Loaded]) -> LoadedParameter:
    where = f"{module_name}.{name}"
    if not tensor.is_contiguous():
        raise NotTraceable(f"{where} is not contiguous")
    times = torch.zeros(tensor.numel(), dtype=torch.uint8)
    for part in parts:
        times.as_strided([high - low for low, high in part.box], part.stride, part.offset).add_(1)
    missing = get_tensor_load_numel(tensor) - int(times.count_nonzero())
    if times.max() > 1:
        raise NotTraceable(f"{where} is loaded twice")
    if missing and not isinstance(module, VocabParallelEmbedding):  # padded to a multiple of 64 rows
        raise NotTraceable(f"{missing} elements of {where} are not loaded")
    return LoadedParameter(module_name, name, tensor.shape, tensor.dtype, parts)
