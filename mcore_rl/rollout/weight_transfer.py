"""New weights for the running rollout engine: `connect` once, `send` after every update of the policy.

Every backend goes through vLLM's start / update / finish cycle with one of its `TrainerWeightTransferEngine`s: our own
"shm" and "gloo", vLLM's "nccl" and "ipc". Rank 0 drives the engine, every rank takes part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mcore_rl.config import WeightSyncConfig
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.rollout import isolation
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.weight_layout import layout_bytes

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine

    from mcore_rl.rollout.weight_backends import ExporterSource


class Exporter(Protocol):
    """The trainer's weights under HF names; `mcore_rl.weights.sync.WeightExporter`."""

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]: ...

    def write_into(self, views: dict[str, Tensor]) -> None: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class Ranks(Protocol):
    """This rank among the trainer ranks; `mcore_rl.parallel.groups.Groups`."""

    rank: int
    world_size: int


class WeightTransfer:
    """The open connection from the trainer's weights to the engine's."""

    def __init__(self, engine: RolloutEngine | None, trainer: TrainerWeightTransferEngine):
        self._engine = engine
        self._trainer = trainer

    def send(self, version: int) -> None:
        """Replace the engine's weights by the trainer's present ones; called on every trainer rank.

        Raises:
            RolloutError: the engine died or refused the weights; it must not be sampled from any more.
        """
        if self._engine is not None:
            self._engine.pause()
        self._trainer.send_weights()
        if self._engine is not None:
            self._engine.policy_version = version
            self._engine.resume()

    def close(self) -> None:
        self._trainer.shutdown()


def connect(engine: RolloutEngine | None, exporter: Exporter, config: WeightSyncConfig, ranks: Ranks) -> WeightTransfer:
    """Build the transfer of the configured backend; called on every trainer rank, `engine` on rank 0 only.

    Raises:
        ValueError: the exporter's tensors are not those of the engine's checkpoint (names the first), or the backend
            cannot work where the engine is.
        RolloutError: the engine died or has another backend.
    """
    isolation.prepare_environment()
    from mcore_rl.rollout.weight_backends import ExporterSource, open_trainer_side  # imports vllm

    source = ExporterSource(exporter)
    client = engine.sync_client if engine is not None else None
    memory = os.memfd_create("mcore_rl_weights") if ranks.rank == 0 else None
    try:
        terms = on_rank_0(ranks, lambda: _terms(engine, source, config, memory))
        trainer = open_trainer_side(terms, ranks, client, source)
    finally:
        if memory is not None:
            os.close(memory)  # the mappings stay; with the last of them the memory is gone, however the processes end
    return WeightTransfer(engine, trainer)


def _terms(engine: RolloutEngine, source: ExporterSource, config: WeightSyncConfig, memory: int) -> dict[str, Any]:
    """What rank 0 decides and every rank must know."""
    metadata = source.plain_metadata()
    found = engine.call_workers("metadata_problems", metadata=metadata)
    problems = next((of_worker for of_worker in found if of_worker), [])
    if problems:
        raise ValueError(
            f"the trainer's weights do not fit the rollout engine's checkpoint in {len(problems)} tensors: "
            f"{'; '.join(problems[:3])}; open the engine with the model folder that the trainer was built from"
        )
    backend = engine.weight_backend
    if config.backend not in ("auto", backend):
        raise ValueError(f"weight_sync.backend={config.backend!r}, but the rollout engine was started with {backend!r}")
    os.ftruncate(memory, layout_bytes(metadata) if backend == "shm" else 0)
    return {
        "backend": backend,
        "path": f"/proc/{os.getpid()}/fd/{memory}",
        "host": engine.trainer_host,
        "num_workers": engine.num_workers,
    }
