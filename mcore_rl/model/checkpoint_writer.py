"""Writing training checkpoints: beside and renamed, by a thread while training goes on where that is asked for.

checkpoints/step_000040/    complete, or not there at all; a folder a model: policy/, critic/, reference/, and
                            rollouts.safetensors, what waits to be trained on
checkpoints/step_000050.tmp what is being written, or what a crash leaves; removed by the next save
"""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig

from mcore_rl.config import CheckpointConfig
from mcore_rl.launch import RunFailure, exit_code
from mcore_rl.model.checkpoint import (
    ROLLOUTS,
    Progress,
    complete_steps,
    frozen_state,
    quiet,
    sharded_state,
    step_folder,
    write_progress,
)
from mcore_rl.model.forward import Policy
from mcore_rl.model.heads import as_scorer
from mcore_rl.model.optimizer import Training
from mcore_rl.parallel.collectives import gather_objects, on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.weights.families import is_scorer
from mcore_rl.weights.hf_write import copy_description
from mcore_rl.weights.stored import POLICY

_NEARLY_NOTHING = 2**16  # bytes


@dataclass
class _Writing:
    """A checkpoint on its way to the disk."""

    final: Path
    requests: list[AsyncRequest]
    thread: threading.Thread = field(init=False)
    failure: str | None = None

    def start(self, buckets: list) -> None:
        self.thread = threading.Thread(target=self._write, args=(buckets,), name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self, buckets: list) -> None:
        try:
            for request, mine in zip(self.requests, buckets, strict=True):
                if request.async_fn is not None:
                    rank, _, results = request.async_fn_args
                    request.async_fn(rank, mine, results, **request.async_fn_kwargs)
        except Exception as error:  # noqa: BLE001  raised on every rank when the checkpoint is finished
            self.failure = f"{type(error).__name__}: {error}"


class CheckpointWriter:
    """Writes checkpoints/step_N of a run's trained models; every method is called on all ranks at the same point.

    Args:
        trained: the models by name; "policy" is one of them.
        config: the newest `keep_last` checkpoints stay. With `asynchronous` `save` returns once the state is copied to
            the CPU's memory, which takes as much room as the state; a thread writes the copy, and `poll` publishes it
            once all ranks have written theirs.
        hf_dirs: folders the models came from, whose config and tokenizer files are laid beside the weights: a
            checkpoint can then be converted without its run. None: it cannot.
        frozen: models that are not trained but have other weights than the files they came from.
    """

    def __init__(
        self,
        folder: Path,
        trained: Mapping[str, Training],
        groups: Groups,
        config: CheckpointConfig,
        hf_dirs: Mapping[str, str] | None = None,
        frozen: Mapping[str, Policy] | None = None,
    ):
        self.folder, self.trained, self.groups, self.config = folder, trained, groups, config
        self.hf_dirs, self.frozen = hf_dirs or {}, frozen or {}
        self._writing: _Writing | None = None

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, once the one before is complete.

        Raises:
            OSError: this one or the one before cannot be written (disk full, permissions), on every rank.
        """
        self.wait()
        final = step_folder(self.folder, progress.step)
        with self._failing_everywhere(final):
            on_rank_0(self.groups, lambda: self._begin(final, progress))
            requests = [self._request(_partial(final) / name, t, progress) for name, t in self.trained.items()]
            requests += [_saving(frozen_state(model), _partial(final) / name) for name, model in self.frozen.items()]
            self._writing = _Writing(final, requests)
            self._writing.start([_staged(r, copied=self.config.asynchronous) for r in requests])
        if not self.config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Publish the checkpoint that is being written if all ranks are done. Raises OSError as `save`."""
        if self._writing and not any(gather_objects(self.groups, self._writing.thread.is_alive())):
            self._finish()

    def wait(self) -> None:
        """Until nothing is being written. Raises OSError as `save`."""
        if self._writing:
            self._writing.thread.join()
            self._finish()

    def _request(self, folder: Path, training: Training, progress: Progress) -> AsyncRequest:
        state = sharded_state(training, self.groups, loading=False)
        return _saving(state | {"progress": asdict(progress.without_rollouts())}, folder)

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        with self._failing_everywhere(writing.final):
            for failure in filter(None, gather_objects(self.groups, writing.failure)):
                raise OSError(failure)
            with quiet():
                for finalise in (f for request in writing.requests for f in request.finalize_fns):
                    finalise()
            dist.barrier()
            on_rank_0(self.groups, lambda: self._publish(writing.final))

    def _begin(self, final: Path, progress: Progress) -> None:
        self._make_room(final)
        write_progress(_partial(final) / ROLLOUTS, progress)

    def _make_room(self, final: Path) -> None:
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover)
        for name in (*self.trained, *self.frozen):
            (_partial(final) / name).mkdir(parents=True)

    def _publish(self, final: Path) -> None:
        for name, source in self.hf_dirs.items():
            dtype = next(self.trained[name].chunks[0].parameters()).dtype
            _describe(_partial(final) / name, name, source, dtype)
        if final.exists():
            _remove(final)
        _partial(final).rename(final)
        for old in complete_steps(self.folder)[: -self.config.keep_last]:
            _remove(step_folder(self.folder, old))

    @contextmanager
    def _failing_everywhere(self, final: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException) as error:
            failure = OSError(_why_not_written(final, error))
            if self.groups.rank != 0:  # it is the same on every rank
                raise RunFailure(exit_code(failure)) from error
            shutil.rmtree(_partial(final), ignore_errors=True)
            raise failure from error


def _saving(state: dict, folder: Path) -> AsyncRequest:
    with quiet():
        return dist_checkpointing.save(state, str(folder), async_sharded_save=True)


def _describe(folder: Path, name: str, hf_dir: str, dtype: torch.dtype) -> None:
    """What a checkpoint needs to be read without its run."""
    copy_description(Path(hf_dir), folder, dtype)
    hf_config = AutoConfig.from_pretrained(folder)
    if name != POLICY and not is_scorer(hf_config):
        as_scorer(hf_config).save_pretrained(folder)


def _partial(final: Path) -> Path:
    return final.with_suffix(".tmp")


def _staged(request: AsyncRequest, *, copied: bool) -> list:
    """What this rank writes for a request, in the CPU's memory; copied: not that of parameters that go on changing."""
    if request.async_fn is None:
        return []
    buckets = request.preload_fn() if request.preload_fn else request.async_fn_args[1]
    if not copied or torch.cuda.is_available():  # from a GPU it is a copy already
        return buckets
    return [
        (path, name, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, name, (objects, tensors) in buckets
    ]


def _remove(checkpoint: Path) -> None:
    """A kill half way leaves what the next save removes, not a folder that looks complete."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_suffix(".old.tmp")))


def _why_not_written(checkpoint: Path, error: BaseException) -> str:
    free = shutil.disk_usage(checkpoint.parent).free if checkpoint.parent.is_dir() else None
    # the writers lose the error number on its way here
    full = getattr(error, "errno", None) == errno.ENOSPC or (free is not None and free < _NEARLY_NOTHING)
    cause = f"disk full, {free} bytes are free" if full else str(error).strip().splitlines()[-1]
    return (
        f"checkpoint {str(checkpoint)!r} cannot be written: {cause}; earlier ones are untouched: make room, then "
        "continue with resume=true"
    )
