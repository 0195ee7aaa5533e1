"""Logic of Megatron-Core 0.16.1 that does not hold without CUDA, or without TransformerEngine and apex.

One function a patch; it receives the module it names right after that module was executed. Mere names (`torch.cuda`,
`"cuda"`) are rewritten by `device`.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Patch(Protocol):
    __name__: str
    module: str

    def __call__(self, module: ModuleType) -> None: ...


def _patches(module: str) -> Callable[[Callable[[ModuleType], None]], Patch]:
    def mark(function):
        function.module = module
        return function

    return mark


@_patches("megatron.core.jit")
def no_compile(jit: ModuleType) -> None:
    """jit.py:20 makes every fused function a `torch.compile`: on a CPU that starts a C++ compiler at the first call."""
    jit.disable_jit_fuser()


@_patches("megatron.core.utils")
def norms_of_all_at_once(utils: ModuleType) -> None:
    """utils.py:1205,1214 take a norm and a product a tensor, and a number out of each, where apex and TransformerEngine
    have one kernel for all; torch's foreach functions are that kernel here."""

    def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args):
        norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
        return torch.linalg.vector_norm(norms).float().view(1), None

    def scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor) -> None:
        torch._foreach_copy_(tensor_lists[1], torch._foreach_mul(tensor_lists[0], factor))

    utils.local_multi_tensor_l2_norm, utils.local_multi_tensor_scale = l2_norm, scale


@_patches("megatron.core.tensor_parallel.random")
def cpu_generator(random: ModuleType) -> None:
    """random.py:41,72 read and write a CUDA generator, through torch._C where torch was built with CUDA."""
    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


@_patches("megatron.core.transformer.moe.moe_utils")
def splits_as_numpy(moe_utils: ModuleType) -> None:
    """moe_utils.py:1093 turns split sizes into numpy only where they are CUDA tensors; the all-to-all of
    tensor_parallel/mappings.py:441 and the token dispatcher need the numbers, not a tensor, on the CPU too."""

    def maybe_move_tensor_to_cpu(tensor: Tensor, as_numpy: bool = False, record_stream: bool = False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


@_patches("megatron.core.models.common.embeddings.rope_utils")
def rotary_of_a_pack_at_once(rope_utils: ModuleType) -> None:
    """rope_utils.py:175 cuts the frequencies of every sequence of a pack out one by one, for queries and keys of every
    layer: an eighth of an update of many short sequences. One gather by position does."""
    last: list = [None, None]  # cu_seqlens and the places of its positions: the same for all layers

    def apply(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, rotary_interleaved=False, multi_latent_attention=False,
              mscale=1.0, cp_group=None) -> Tensor:  # fmt: skip
        if last[0] is not cu_seqlens:
            last[:] = cu_seqlens, rotary_places(cu_seqlens, cp_group.size(), cp_group.rank(), len(t))
        return rope_utils._apply_rotary_pos_emb_bshd(
            t.unsqueeze(1),
            freqs[last[1]],
            rotary_interleaved=rotary_interleaved,
            multi_latent_attention=multi_latent_attention,
            mscale=mscale,
        ).squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = apply


def rotary_places(cu_seqlens: Tensor, cp_size: int, cp_rank: int, total: int) -> Tensor:
    """[total] int64, the position in its sequence of each token that a context rank holds: chunk `cp_rank` of 2 cp_size
    from the front of every sequence, and the one as far from its end."""
    lengths = (cu_seqlens.diff() // cp_size).long()
    starts = lengths.cumsum(0) - lengths
    of_token = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)
    place = torch.arange(total, device=lengths.device) - starts[of_token]
    if cp_size == 1:
        return place
    half = (lengths // 2)[of_token]
    behind = place - half + lengths[of_token] * cp_size - (cp_rank + 1) * half
    return torch.where(place < half, place + cp_rank * half, behind)


@_patches("megatron.core.tensor_parallel.mappings")
def uneven_gather(mappings: ModuleType) -> None:
    """mappings.py:149,198 all-gather and reduce-scatter tensors of different length (experts under expert tensor
    parallelism); gloo wants equal ones, so they are padded to the longest."""
    even_gather, even_reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(input_: Tensor, group, output_split_sizes=None, use_global_buffer: bool = False) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter(input_: Tensor, group, input_split_sizes=None, use_global_buffer: bool = False) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        padded = input_.new_zeros((len(sizes), max(sizes), *input_.shape[1:]))
        for row, part in zip(padded, torch.split(input_, sizes), strict=True):
            row[: part.shape[0]] = part
        dist.all_reduce(padded, group=group)
        return padded[group.rank(), : sizes[group.rank()]].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


@_patches("megatron.core.transformer.moe.moe_utils")
def router_gemm(moe_utils: ModuleType) -> None:
    """moe_utils.py:1192 asks `te_general_gemm is not None`, a name that its failed import at :24 never defined."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@_patches("megatron.core.transformer.multi_latent_attention")
def latent_attention_linear(multi_latent_attention: ModuleType) -> None:
    """multi_latent_attention.py:185 asks whether a linear is a TELinear, which without TransformerEngine is a mock that
    isinstance refuses; HAVE_TE (:61) is true all the same, because the import of that mock works."""
    multi_latent_attention.HAVE_TE = False


@_patches("megatron.core.optimizer.distrib_optimizer")
def adam_step_restored(distrib_optimizer: ModuleType) -> None:
    """distrib_optimizer.py:938 copies every state of torch's Adam from the checkpoint, but the loaders leave out
    `step` (:2103), which load_state_dict restored before: KeyError. Keep the restored one."""
    cls = distrib_optimizer.DistributedOptimizer
    original = cls._set_main_param_and_optimizer_states

    def set_states(self, model_param, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    cls._set_main_param_and_optimizer_states = set_states


@_patches("megatron.core.optimizer.distrib_optimizer")
def adam_step_unshared(distrib_optimizer: ModuleType) -> None:
    """distrib_optimizer.py:819 gives all parameters one `step` tensor; torch's Adam then advances it once a parameter,
    and the bias correction after a resume is wrong without any error."""
    cls = distrib_optimizer.DistributedOptimizer
    original = cls.load_state_dict

    def load_state_dict(self, state_dict) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    cls.load_state_dict = load_state_dict


@_patches("megatron.core.dist_checkpointing.strategies.filesystem_async")
def written_in_this_process(filesystem_async: ModuleType) -> None:
    """filesystem_async.py:51 passes the results of writing through a spawned Manager process, which imports the main
    module again: seven seconds a rank at the first checkpoint. And :251 forks a process a file, which is not safe where
    other threads compute, as they do beside a thread that writes. Write in the calling thread."""
    cls = filesystem_async.FileSystemWriterAsync

    def write(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
        found: dict[int, list] = {}
        for i, bucket in enumerate(buckets):
            written, counted = queue.Queue(), queue.Queue()
            counted.put(i)
            cls.write_preloaded_data(transforms, i, bucket, written, counted, use_fsync=True)
            _, found[i] = written.get()
        failures = [x for x in found.values() if isinstance(x, Exception)]
        results.put(failures[0] if failures else found)

    cls.write_preloaded_data_multiproc = staticmethod(write)
    filesystem_async._get_write_results_queue = queue.Queue


WITHOUT_CUDA: tuple[Patch, ...] = (
    no_compile,
    norms_of_all_at_once,
    rotary_of_a_pack_at_once,
    cpu_generator,
    splits_as_numpy,
    uneven_gather,
    written_in_this_process,
)
WITHOUT_TRANSFORMER_ENGINE: tuple[Patch, ...] = (
    router_gemm,
    latent_attention_linear,
    adam_step_restored,
    adam_step_unshared,
)
