"""Megatron's DDP, optimizer and learning-rate schedule around model chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module

from mcore_rl.config import OptimizerConfig, ParallelConfig
from mcore_rl.model.offload import HostMemory, in_use


@dataclass(frozen=True)
class Training:
    """DDP-wrapped chunks with the optimizer that updates them."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    host: HostMemory | None = None  # of the optimizer's state between steps, where it is offloaded

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> tuple[float, float]:
        """One optimizer step on the accumulated gradients.

        Returns:
            (global gradient norm before clipping, learning rate used).
        """
        lr = self.optimizer.param_groups[0]["lr"]
        with in_use(self.host, change=True):
            _, grad_norm, _ = self.optimizer.step()
            if self.host is not None:
                self.optimizer.zero_grad()  # drops the main weights' own copies of the gradients
        self.scheduler.step(increment=1)
        return float(grad_norm), lr


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Those that do the work: Megatron has one for dense and one for expert parameters."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def use_fused_kernels(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam update all parameters of the CPU by one kernel; to be repeated when its groups were loaded.

    There torch itself goes through the parameters one by one: it chooses its fused and foreach kernels on GPUs only.
    """
    for inner in torch_optimizers(optimizer):
        if isinstance(inner, torch.optim.Adam):
            for group in inner.param_groups:
                group["fused"] = all(p.device.type == "cpu" for p in group["params"]) or None


def optimizer_state(optimizer: MegatronOptimizer, chunks: Sequence[Module], device: torch.device) -> HostMemory:
    """Of a trained model's optimizer: its moments, and main weights that are no views of the model's own."""
    of_model = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}

    def tensors() -> Iterator[Tensor]:
        for inner in torch_optimizers(optimizer):
            for weight in (p for group in inner.param_groups for p in group["params"]):
                if weight.untyped_storage().data_ptr() not in of_model:
                    yield weight
                # torch's Adam counts its steps in tensors without a dimension, on the CPU
                yield from (x for x in inner.state.get(weight, {}).values() if torch.is_tensor(x) and x.dim() > 0)

    return HostMemory(tensors, device)


def freeze_routers(chunks: Sequence[Module]) -> None:
    """Take the router weights out of the training; to be called before the optimizer is built."""
    for name, weight in (item for chunk in chunks for item in chunk.named_parameters()):
        if name.endswith("mlp.router.weight"):
            weight.requires_grad_(False)


def build_training(
    chunks: Sequence[Module], optimizer: OptimizerConfig, parallel: ParallelConfig, total_steps: int
) -> Training:
    """Wrap model chunks for training. Gradients are reduced in fp32; bf16 models get fp32 main weights.

    Args:
        total_steps: optimizer steps of the whole run, the default length of the decay.
    """
    config = get_model_config(chunks[0])
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        check_for_nan_in_grad=True,
    )
    # bucketing of later chunks is off as in Megatron's own training loop: their gradients come first
    wrapped = [DistributedDataParallel(config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
    megatron_optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer=optimizer.name,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            sgd_momentum=0.0,
            weight_decay=optimizer.weight_decay,
            clip_grad=optimizer.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        wrapped,
    )
    use_fused_kernels(megatron_optimizer)
    scheduler = OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=max(optimizer.decay_steps or total_steps, optimizer.warmup_steps + 1),
        lr_decay_style=optimizer.schedule,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    # the schedule asks the model's configuration for these, which cannot be known before it is wrapped
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:  # not before a chunk's last micro-batch
        config.no_sync_func = [c.no_sync for c in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    config.grad_scale_func = megatron_optimizer.scale_loss
    device = next(wrapped[0].parameters()).device
    host = optimizer_state(megatron_optimizer, wrapped, device) if optimizer.offload else None
    return Training(wrapped, megatron_optimizer, scheduler, host)
