"""New weights for the running rollout engine: `connect` once, `send` after every update of the policy.

By shm and gloo the weights go straight into the layout of the engine's own parameters where vLLM's loader only copies
(`loader_trace`); checksums of every tensor are compared before the engine takes them, and what it then computes with is
read back (`engine_weights`).

Every backend goes through vLLM's start / update / finish cycle with one of its `TrainerWeightTransferEngine`s: our own
"shm" and "gloo", vLLM's "nccl" and "ipc". Rank 0 drives the engine, every rank takes part.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from mcore_rl.config import WeightSyncConfig
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.transfer.exporter import Exporter, Ranks
from mcore_rl.rollout.transfer.layout import Area, Areas
from mcore_rl.rollout.vllm import isolation

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine

    from mcore_rl.rollout.transfer.backends import ExporterSource


class WeightTransfer:
    """The open connection from the trainer's weights to the engine's.

    Attributes:
        detour: why weights go through vLLM's loader; empty where they need not.
    """

    def __init__(
        self, engine: RolloutEngine | None, trainer: TrainerWeightTransferEngine, ranks: Ranks, areas: Areas | None
    ):
        self._engine, self._trainer, self._ranks, self._areas = engine, trainer, ranks, areas
        self.detour = areas.detour if areas else "the backend is vLLM's own"

    def send(self, version: int) -> dict[str, float]:
        """Replace the engine's weights by the trainer's present ones; called on every trainer rank.

        Returns:
            Seconds by phase: of rank 0 `write`, with the checksums of what is written, and `engine`, and of its
            slowest worker `receive`, `verify`, `load` (of which `pack` is vLLM's packing) and `read_back`, which are
            parts of `engine`. Empty for vLLM's own backends.

        Raises:
            RolloutError: the engine died, or refused the weights, or computes with others than were sent; these are
                named. It must not be sampled from any more.
        """
        if self._engine is not None:
            self._engine.pause()
        self._trainer.send_weights()
        if self._engine is not None:
            self._engine.policy_version = version
            self._engine.resume()
        return on_rank_0(self._ranks, self._seconds) if self._areas else {}

    def _seconds(self) -> dict[str, float]:
        of_workers = self._engine.call_workers("update_seconds")
        return self._trainer.seconds | {name: max(s[name] for s in of_workers) for name in of_workers[0]}

    def problems(self) -> list[str]:
        """Reads back what the engine computes with now and names the tensors that are not those last sent; collective.

        Nothing is known where the weights went through vLLM's loader (`detour`).
        """
        found = on_rank_0(self._ranks, lambda: self._engine.call_workers("weight_problems")) if self._areas else []
        return list(dict.fromkeys(problem for of_worker in found for problem in of_worker))

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
    from mcore_rl.rollout.transfer.backends import ExporterSource, open_trainer_side  # imports vllm

    source = ExporterSource(exporter)
    client = engine.sync_client if engine is not None else None
    memory = os.memfd_create("mcore_rl_weights") if ranks.rank == 0 else None
    try:
        terms = on_rank_0(ranks, lambda: _terms(engine, source, config, memory))
        trainer = open_trainer_side(terms, ranks, client, source, partial(on_rank_0, ranks))
    finally:
        if memory is not None:
            os.close(memory)  # the mappings stay; with the last of them the memory is gone, however the processes end
    return WeightTransfer(engine, trainer, ranks, terms["areas"])


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
    areas = None
    wanted = {"metadata": metadata, "check_packing_every": config.check_packing_every}
    if backend in ("shm", "gloo"):
        areas = Areas.of([Area.from_json(area) for area in engine.call_workers("weight_area", **wanted)])
        os.ftruncate(memory, areas.num_bytes if backend == "shm" else 0)
    return {
        "backend": backend,
        "path": f"/proc/{os.getpid()}/fd/{memory}",
        "host": engine.trainer_host,
        "num_workers": engine.num_workers,
        "areas": areas,
    }
