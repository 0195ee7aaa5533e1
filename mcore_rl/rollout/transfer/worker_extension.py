"""What every vLLM worker imports: repairs of vLLM, and the worker's side of the weight-transfer backends shm and gloo.

vLLM loads this module in each worker process because it holds `worker_extension_cls`; that happens before the worker
makes its weight-transfer engine, so the backends are registered by then.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from mcore_rl.rollout.transfer.engine_weights import Arrivals, EngineWeights
from mcore_rl.rollout.transfer.layout import (
    GLOO_TIMEOUT,
    Area,
    Metadata,
    broadcast_from_0,
    checkpoint_area,
    map_file,
)
from mcore_rl.rollout.transfer.loader_trace import NotTraceable
from mcore_rl.rollout.vllm import patches as vllm_patches
from mcore_rl.rollout.vllm.isolation import CHILD_FLAG
from moe.record.vllm import route_facts


class WorkerExtension:
    """Methods that every vLLM worker gains."""

    def rollout_facts(self) -> dict[str, Any]:
        """What a trainer must know of an engine that it did not start itself."""
        config = self.vllm_config
        transfer = config.weight_transfer_config
        return {
            "weight_transfer": transfer.backend if transfer else None,
            "logprobs_mode": config.model_config.logprobs_mode,
            "max_model_len": config.model_config.max_model_len,
            "device": self.device.type,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "num_workers": config.parallel_config.world_size_across_dp,
            "routes": route_facts(self.model_runner.model, config),
        }

    def shared_files(self) -> list[str]:
        """Where workers on a CPU talk to each other: vLLM unlinks them as a worker ends, unless it is killed."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sorted({line.split()[-1] for line in maps if "/dev/shm/vllm_dist" in line})

    def weight_area(self, metadata: Metadata, check_packing_every: int) -> dict[str, Any]:
        """The `Area` in which this worker wants the trainer's tensors."""
        return self.weight_transfer_engine.layout(metadata, check_packing_every).to_json()

    def update_seconds(self) -> dict[str, float]:
        """Where the time of the last update went."""
        return self.weight_transfer_engine.seconds

    def weight_problems(self) -> list[str]:
        """See `CopyEngine.problems`."""
        return self.weight_transfer_engine.problems()

    def metadata_problems(self, metadata: Metadata) -> list[str]:
        """Tensors that differ in name or shape from the checkpoint this worker was started with, or lose precision."""
        config = self.vllm_config.model_config
        problems = compare_with_checkpoint(metadata, config.model)
        tied = getattr(config.hf_text_config, "tie_word_embeddings", False)
        return [p for p in problems if not (tied and p.startswith("lm_head.weight "))]


def compare_with_checkpoint(metadata: Metadata, model_path: str) -> list[str]:
    """One line for every missing, unknown or misshapen tensor, and for every one in a dtype that is none of a weight or
    loses what the checkpoint keeps beyond the model's; nothing where the path is not a safetensors folder.

    vLLM itself takes a partial set of weights without an error and then answers with garbage.
    """
    expected, sizes = {}, {}
    for file in Path(model_path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_slice(name)
                expected[name], sizes[name] = list(tensor.get_shape()), 4 if tensor.get_dtype() == "F32" else 2
    if not expected:
        return []
    usual = mode(sizes.values())
    given = {name: list(shape) for name, _, shape in metadata}
    problems = [f"{name} is missing" for name in expected if name not in given and "rotary_emb" not in name]
    problems += [f"{name} is not in the model" for name in given if name not in expected]
    problems += [
        f"{name} has shape {given[name]}, the model {expected[name]}"
        for name in given
        if name in expected and given[name] != expected[name]
    ]
    problems += [
        f"{name} has dtype {dtype}, a weight is float32, bfloat16 or float16"
        if dtype not in ("float32", "bfloat16", "float16")
        else f"{name} has dtype {dtype}, the checkpoint keeps it in float32"
        for name, dtype, _ in metadata
        if dtype not in ("float32", "bfloat16", "float16") or (dtype != "float32" and sizes.get(name, 0) > usual)
    ]
    return problems


@dataclass
class CopyInitInfo(base.WeightTransferInitInfo):
    """Where the copy comes from: `path` of the shared memory, or the broadcast group."""

    num_bytes: int
    places: list[list[int]]  # of every worker: number of its area, byte of the buffer where that begins
    path: str = ""
    host: str = ""
    port: int = 0
    world_size: int = 0
    rank_offset: int = 1  # of this engine's first worker; the trainer is rank 0


@dataclass
class CopyUpdateInfo(base.WeightTransferUpdateInfo):
    """`checksums` of the trainer's weights, by area and piece."""

    checksums: list[list[int]]


class CopyEngine(base.WeightTransferEngine):
    """Takes weights from a buffer that holds all of them, after it has found them to be the trainer's.

    The buffer is laid out as the worker's own parameters are, or, where that cannot be, as the checkpoint: then vLLM's
    layerwise reload keeps references to what it was given until a layer is complete, so a staging buffer that is used
    again within an update corrupts weights; here nothing is.
    """

    init_info_cls = CopyInitInfo
    update_info_cls = CopyUpdateInfo
    area: Area
    arrivals: Arrivals
    weights: EngineWeights | None = None
    good_updates: int  # since the first or the last that went wrong
    buffer: torch.Tensor

    def layout(self, metadata: Metadata, check_packing_every: int) -> Area:
        """Where this worker wants the tensors."""
        self.check_packing_every, self.good_updates = check_packing_every, 0
        try:
            self.weights = EngineWeights(self.model, self.model_config, metadata)
            self.area = self.weights.area
        except NotTraceable as reason:
            self.weights, self.area = None, checkpoint_area(metadata, str(reason))
        return self.area

    def rank(self, init_info: CopyInitInfo) -> int:
        """Of this worker among the trainer (0) and all workers of all engines."""
        parallel = self.parallel_config
        return init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank

    def find_area(self, init_info: CopyInitInfo, buffer: torch.Tensor) -> None:
        self.number, start = init_info.places[self.rank(init_info) - 1]
        self.buffer, self.memory = buffer, buffer[start : start + self.area.num_bytes]
        self.arrivals = Arrivals(self.area, self.memory)

    def start_weight_update(self) -> None:
        self.seconds: dict[str, float] = {}

    def receive_weights(self, update_info: CopyUpdateInfo) -> None:
        """Raises ValueError with the names of the tensors that did not arrive, and then the engine still has what it
        had, or of those that it computes with in other values than arrived.
        """
        self.expected, good = update_info.checksums[self.number], self.good_updates
        self.good_updates = 0
        with self._timed("receive"):
            self.fetch()
        with self._timed("verify"):
            refuse(self.arrivals.problems(self.expected))
        with self._timed("load"):
            self._load()
        with self._timed("read_back"):
            refuse(self.problems(good, self.check_packing_every if good else 1))
        self.good_updates = good + 1

    def _load(self) -> None:
        if self.weights is not None:
            self.seconds["pack"] = self.weights.take_over(self.memory)
            return
        initialize_layerwise_reload(self.model)
        self.model.load_weights((piece.name, piece.shard(self.memory).view) for piece in self.area.pieces)
        finalize_layerwise_reload(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        pass

    def problems(self, part: int = 0, parts: int = 1) -> list[str]:
        """What is wrong in what the engine computes with, by tensor; not known where vLLM's loader was used.

        See `EngineWeights.engine_problems`.
        """
        return [] if self.weights is None else self.weights.engine_problems(self.memory, self.expected, part, parts)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def fetch(self) -> None:
        """Bring the newest weights into the buffer."""
        raise NotImplementedError

    def shutdown(self) -> None:
        self.buffer = self.memory = self.arrivals = None


def refuse(problems: list[str]) -> None:
    """Raises ValueError with the first of them, and how many, if any."""
    if problems:
        rest = f" ({len(problems)} tensors in all)" if len(problems) > 4 else ""
        raise ValueError(f"{'; '.join(problems[:4])}{rest}")


class ShmEngine(CopyEngine):
    """The buffer is memory that the trainer ranks write."""

    def init_transfer_engine(self, init_info: CopyInitInfo) -> None:
        self.find_area(init_info, map_file(init_info.path, init_info.num_bytes))

    def fetch(self) -> None:
        pass


class GlooEngine(CopyEngine):
    """The buffer is filled by a broadcast from trainer rank 0."""

    def init_transfer_engine(self, init_info: CopyInitInfo) -> None:
        store = torch.distributed.TCPStore(init_info.host, init_info.port, timeout=GLOO_TIMEOUT)
        self.group = torch.distributed.ProcessGroupGloo(store, self.rank(init_info), init_info.world_size, GLOO_TIMEOUT)
        self.find_area(init_info, torch.empty(init_info.num_bytes, dtype=torch.uint8))

    def fetch(self) -> None:
        broadcast_from_0(self.group, self.buffer)

    def shutdown(self) -> None:
        super().shutdown()
        self.group = None


def _end_with_trainer(pid: int) -> None:
    """A child engine ends with the process that started it, however that one ended.

    With several workers that is their parent's parent; vLLM's engine process ends when a worker does.
    """
    with suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)


if os.environ.get(CHILD_FLAG) and multiprocessing.parent_process() is not None:
    threading.Thread(target=_end_with_trainer, args=(int(os.environ[CHILD_FLAG]),), daemon=True).start()
WeightTransferEngineFactory.register_engine("shm", ShmEngine)
WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
vllm_patches.apply()
