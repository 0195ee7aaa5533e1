"""Training checkpoints: Megatron's torch_dist format plus the loop's own counters. `checkpoint_writer` writes them.

A checkpoint can be read under another layout than the one it was written in. Under the same one a run goes on exactly
as if it had not stopped, random states included.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from mcore_rl.data.real_fake import DiscriminatorState
from mcore_rl.data.stored_rollouts import read_rollouts, write_rollouts
from mcore_rl.model.forward import Policy
from mcore_rl.model.optimizer import Training, torch_optimizers, use_fused_kernels
from mcore_rl.parallel.groups import Groups
from mcore_rl.types import BatchAhead, RolloutGroup

ROLLOUTS = "rollouts.safetensors"  # in the folder of a checkpoint


@dataclass(frozen=True)
class Progress:
    """Where the loop stands: all that a resumed run needs beside model, optimizer and random state."""

    step: int = 0  # finished training steps
    prompts_seen: int = 0  # data cursor: what the engine has been asked or the trainer has read
    policy_version: int = 0  # weight updates sent to the rollout engine
    kl_coef: float | None = None  # of the next step; PPO can adapt it
    carried: tuple[RolloutGroup, ...] = ()  # on rank 0: scored groups that the last batch had no room for
    discriminator: DiscriminatorState = DiscriminatorState()
    ahead: tuple[BatchAhead, ...] = ()  # of the next steps, in order

    def after_step(self, kl_coef: float) -> Progress:
        return replace(self, step=self.step + 1, policy_version=self.policy_version + 1, kl_coef=kl_coef)

    def without_rollouts(self) -> Progress:
        """As ranks that own no rollouts have it."""
        ahead = tuple(replace(batch, groups=()) for batch in self.ahead)
        return replace(self, carried=(), ahead=ahead, discriminator=replace(self.discriminator, fresh=(), buffer=()))

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """The inverse of `dataclasses.asdict`, without rollouts: checkpoints hold plain values."""
        ahead = tuple(BatchAhead(**batch) for batch in state["ahead"])
        return cls(**{**state, "ahead": ahead, "discriminator": DiscriminatorState.of(state["discriminator"])})


def write_progress(path: Path, progress: Progress) -> None:
    """The rollouts that wait to be trained on; what else `progress` says is in the common state."""
    state = progress.discriminator
    groups = {"carried": progress.carried} | {f"ahead/{batch.step}": batch.groups for batch in progress.ahead}
    write_rollouts(path, groups, {"fresh": state.fresh, "buffer": state.buffer})


def read_progress(path: Path, progress: Progress) -> Progress:
    """`progress` with the rollouts that `write_progress` wrote.

    Raises:
        ValueError: rollouts wait in the common state, where checkpoints once had them: there is no file.
    """
    if not path.is_file():
        if progress != progress.without_rollouts():
            raise ValueError(
                f"checkpoint {str(path.parent)!r} has no {path.name}: it was written by an earlier version, which kept "
                "rollouts that wait in another form; continue it with that version to a step at which none wait"
            )
        return progress
    groups, fakes = read_rollouts(path)
    ahead = tuple(replace(batch, groups=groups[f"ahead/{batch.step}"]) for batch in progress.ahead)
    return replace(
        progress, carried=groups["carried"], ahead=ahead, discriminator=replace(progress.discriminator, **fakes)
    )


def step_folder(folder: Path, step: int) -> Path:
    """Of one checkpoint in the folder of all."""
    return folder / f"step_{step:06d}"


def complete_steps(folder: Path) -> list[int]:
    """Of the complete checkpoints, oldest first."""
    matches = (re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*"))
    return sorted(int(m.group(1)) for m in matches if m)


def load_checkpoint(
    folder: Path, trained: Mapping[str, Training], groups: Groups, frozen: Mapping[str, Policy] | None = None
) -> Progress | None:
    """Load the newest complete checkpoint into the models; None where there is none. Collective.

    Args:
        frozen: stay as they are where the checkpoint does not have them: written before they had other weights.

    Raises:
        ValueError: it was written with a setting that cannot change.
    """
    steps = complete_steps(folder)
    if not steps:
        return None
    newest = step_folder(folder, steps[-1])
    progress = [_load(newest / name, training, groups) for name, training in trained.items()]
    for name, model in (frozen or {}).items():
        if (newest / name).is_dir():
            _load_frozen(newest / name, model)
    return read_progress(newest / ROLLOUTS, progress[0]) if groups.rank == 0 else progress[0]


def _load_frozen(folder: Path, model: Policy) -> None:
    with quiet():
        state = dist_checkpointing.load(frozen_state(model), str(folder))
    for i, chunk in enumerate(model.chunks):
        chunk.load_state_dict(state[f"model{i}"], strict=True)
    if model.host is not None:
        model.host.park()


def _load(folder: Path, training: Training, groups: Groups) -> Progress:
    written_with = dist_checkpointing.load_common_state_dict(str(folder))["written_with"]
    _check_settings(folder, written_with, _settings(training, groups))
    _materialise_optimizer_state(training)
    state = sharded_state(training, groups, loading=True)
    if written_with["layout"] != vars(groups.layout):
        del state["rng"]  # other ranks drew from it
    with quiet():
        state = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(training.chunks):
        chunk.module.load_state_dict(state[f"model{i}"], strict=True)
    training.optimizer.load_state_dict(state["optimizer"])
    use_fused_kernels(training.optimizer)
    if training.host is not None:
        training.host.park()
    training.scheduler.load_state_dict(state["scheduler"])
    if "rng" in state:
        torch.set_rng_state(state["rng"]["torch"])
        get_cuda_rng_tracker().set_states(state["rng"]["model_parallel"])
    return Progress.of(state["progress"])


def _settings(training: Training, groups: Groups) -> dict[str, Any]:
    config = training.optimizer.config
    return {
        "layout": vars(groups.layout),
        "parallel.distributed_optimizer": config.use_distributed_optimizer,
        "optimizer.name": config.optimizer,
    }


def _check_settings(folder: Path, written: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in now.keys() - {"layout"}:
        if written[name] != now[name]:
            raise ValueError(
                f"checkpoint {str(folder)!r} was written with {name}={written[name]!r} and cannot be read with "
                f"{now[name]!r}: the optimizer's state has another form; set it back. The layout may change"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Megatron calls parts of torch that announce their end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _metadata() -> Mapping:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded_state(training: Training, groups: Groups, *, loading: bool) -> dict[str, Any]:
    """Of a model and its optimizer, as Megatron's checkpoints take it and give it back."""
    metadata = _metadata()
    model = {f"model{i}": c.module.sharded_state_dict(metadata=metadata) for i, c in enumerate(training.chunks)}
    # chunks number their layers alike; the optimizer looks at the tensors, not at their names
    of_all = {f"{name}.{key}": value for name, part in model.items() for key, value in part.items()}
    rng = {"torch": torch.get_rng_state(), "model_parallel": get_cuda_rng_tracker().get_states()}
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        **model,
        "optimizer": training.optimizer.sharded_state_dict(of_all, is_loading=loading, metadata=metadata),
        "scheduler": training.scheduler.state_dict(),
        "written_with": _settings(training, groups),
        "rng": ShardedObject("rng", rng, (world,), (rank,)),
    }


def frozen_state(model: Policy) -> dict[str, Any]:
    """Weights of a model that has no optimizer, as `sharded_state`, from its own layout."""
    with model.groups.active():
        metadata = _metadata()
        return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(model.chunks)}


def _materialise_optimizer_state(training: Training) -> None:
    """Give torch's Adam its (zero) state: Megatron asks a fresh optimizer for the tensors it will load into."""
    for inner in torch_optimizers(training.optimizer):
        if not isinstance(inner, torch.optim.Adam):
            continue
        for group in inner.param_groups:
            for p in group["params"]:
                if not inner.state[p]:
                    inner.state[p].update(
                        step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
