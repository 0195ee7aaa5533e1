"""Training checkpoints: Megatron's torch_dist format plus the loop's own counters, written beside and renamed.

checkpoints/step_000040/    complete, or not there at all; a folder a trained model: policy/, critic/, ...
checkpoints/step_000050.tmp what a crash leaves; removed by the next save
"""

from __future__ import annotations

import errno
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig

from mcore_rl.data.real_fake import DiscriminatorState
from mcore_rl.model.heads import as_scorer
from mcore_rl.model.optimizer import Training
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.types import BatchAhead, Prompt, RolloutGroup, Trajectory
from mcore_rl.weights.families import is_scorer
from mcore_rl.weights.hf_io import copy_description
from mcore_rl.weights.stored import POLICY

_NEARLY_NOTHING = 2**16  # bytes


@dataclass(frozen=True)
class Progress:
    """Where the loop stands: all that a resumed run needs beside model, optimizer and random state."""

    step: int = 0  # finished training steps
    prompts_seen: int = 0  # data cursor: what the engine has been asked or the trainer has read
    policy_version: int = 0  # weight updates sent to the rollout engine
    kl_coef: float | None = None  # of the next step; PPO can adapt it
    carried: tuple[RolloutGroup, ...] = ()  # scored groups that the last batch had no room for
    discriminator: DiscriminatorState = DiscriminatorState()
    ahead: tuple[BatchAhead, ...] = ()  # of the next steps, in order

    def after_step(self, kl_coef: float) -> Progress:
        return replace(self, step=self.step + 1, policy_version=self.policy_version + 1, kl_coef=kl_coef)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """The inverse of `dataclasses.asdict`: checkpoints hold plain values."""
        return cls(
            **state
            | {
                "carried": tuple(map(_group, state["carried"])),
                "ahead": tuple(
                    replace(BatchAhead(**b), groups=tuple(map(_group, b["groups"]))) for b in state["ahead"]
                ),
                "discriminator": DiscriminatorState.of(state["discriminator"]),
            }
        )


def save_checkpoint(
    folder: Path,
    trained: Mapping[str, Training],
    groups: Groups,
    progress: Progress,
    *,
    keep_last: int,
    hf_dirs: Mapping[str, str] | None = None,
) -> Path:
    """Write checkpoints/step_N; collective.

    Args:
        trained: the models by name; "policy" is one of them.
        hf_dirs: folders they came from, whose config and tokenizer files are laid beside the weights: a checkpoint
            can then be converted without its run. None: it cannot.

    Raises:
        OSError: the folder cannot be written (disk full, permissions), on every rank, with the path.
    """
    final = folder / f"step_{progress.step:06d}"
    partial = final.with_suffix(".tmp")

    def prepare() -> None:
        for leftover in folder.glob("*.tmp"):
            shutil.rmtree(leftover)
        for name in trained:
            (partial / name).mkdir(parents=True)

    def publish() -> None:
        for name, source in (hf_dirs or {}).items():
            _describe(partial / name, name, source, next(trained[name].chunks[0].parameters()).dtype)
        if final.exists():
            _remove(final)
        partial.rename(final)
        for old in sorted(_complete(folder))[:-keep_last]:
            _remove(folder / f"step_{old:06d}")

    try:
        on_rank_0(groups, prepare)
        for name, training in trained.items():
            state = _sharded_state(training, loading=False)
            state["progress"] = asdict(progress)
            with _quiet():
                dist_checkpointing.save(state, str(partial / name))
        dist.barrier()
        on_rank_0(groups, publish)
    except (OSError, CheckpointException) as error:
        failure = OSError(_why_not_written(final, error))
        failure.told = groups.rank != 0  # it is the same on every rank (mcore_rl.launch.tell)
        if groups.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise failure from error
    return final


def _describe(folder: Path, name: str, hf_dir: str, dtype: torch.dtype) -> None:
    """What a checkpoint needs to be read without its run."""
    copy_description(Path(hf_dir), folder, dtype)
    hf_config = AutoConfig.from_pretrained(folder)
    if name != POLICY and not is_scorer(hf_config):
        as_scorer(hf_config).save_pretrained(folder)


def _remove(checkpoint: Path) -> None:
    """A kill half way leaves what the next save removes, not a folder that looks complete."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_suffix(".tmp")))


def _why_not_written(checkpoint: Path, error: BaseException) -> str:
    free = shutil.disk_usage(checkpoint.parent).free if checkpoint.parent.is_dir() else None
    # the writers' processes lose the error number on its way here
    full = getattr(error, "errno", None) == errno.ENOSPC or (free is not None and free < _NEARLY_NOTHING)
    cause = f"disk full, {free} bytes are free" if full else str(error).strip().splitlines()[-1]
    return (
        f"checkpoint {str(checkpoint)!r} cannot be written: {cause}; earlier ones are untouched: make room, then "
        "continue with resume=true"
    )


def load_checkpoint(folder: Path, trained: Mapping[str, Training]) -> Progress | None:
    """Load the newest complete checkpoint into the models; None where there is none. Collective."""
    steps = _complete(folder)
    if not steps:
        return None
    newest = folder / f"step_{max(steps):06d}"
    progress = [_load(newest / name, training) for name, training in trained.items()]
    return progress[0]


def _load(folder: Path, training: Training) -> Progress:
    _materialise_optimizer_state(training)
    state = _sharded_state(training, loading=True)
    with _quiet():
        state = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(training.chunks):
        chunk.module.load_state_dict(state[f"model{i}"], strict=True)
    training.optimizer.load_state_dict(state["optimizer"])
    training.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"]["torch"])
    get_cuda_rng_tracker().set_states(state["rng"]["model_parallel"])
    return Progress.of(state["progress"])


def _group(state: Mapping[str, Any]) -> RolloutGroup:
    return RolloutGroup(Prompt(**state["prompt"]), tuple(Trajectory(**t) for t in state["trajectories"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Megatron calls parts of torch that announce their end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _complete(folder: Path) -> list[int]:
    matches = (re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*"))
    return [int(m.group(1)) for m in matches if m]


def _metadata() -> Mapping:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(training: Training, *, loading: bool) -> dict:
    metadata = _metadata()
    model = {f"model{i}": c.module.sharded_state_dict(metadata=metadata) for i, c in enumerate(training.chunks)}
    merged = {k: v for part in model.values() for k, v in part.items()} if len(model) > 1 else model["model0"]
    rng = {"torch": torch.get_rng_state(), "model_parallel": get_cuda_rng_tracker().get_states()}
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        **model,
        "optimizer": training.optimizer.sharded_state_dict(merged, is_loading=loading, metadata=metadata),
        "scheduler": training.scheduler.state_dict(),
        "rng": ShardedObject("rng", rng, (world,), (rank,)),
    }


def _materialise_optimizer_state(training: Training) -> None:
    """Give torch's Adam its (zero) state: Megatron asks a fresh optimizer for the tensors it will load into."""
    for part in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam):
            continue
        for group in inner.param_groups:
            for p in group["params"]:
                if not inner.state[p]:
                    inner.state[p].update(
                        step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
