"""What every vLLM worker imports: repairs of vLLM, and the worker's side of the weight-transfer backends shm and gloo.

vLLM loads this module in each worker process because it holds `worker_extension_cls`; that happens before the worker
makes its weight-transfer engine, so the backends are registered by then.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from mcore_rl.rollout import vllm_patches
from mcore_rl.rollout.isolation import CHILD_FLAG
from mcore_rl.rollout.weight_layout import (
    GLOO_TIMEOUT,
    Metadata,
    broadcast_from_0,
    layout_bytes,
    map_file,
    tensor_views,
)
from moe.adapters.vllm import route_facts


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

    def metadata_problems(self, metadata: Metadata) -> list[str]:
        """Tensors that differ in name or shape from the checkpoint this worker was started with."""
        config = self.vllm_config.model_config
        problems = compare_with_checkpoint(metadata, config.model)
        tied = getattr(config.hf_text_config, "tie_word_embeddings", False)
        return [p for p in problems if not (tied and p.startswith("lm_head.weight "))]


def compare_with_checkpoint(metadata: Metadata, model_path: str) -> list[str]:
    """One line for every missing, unknown or misshapen tensor; nothing where the path is not a safetensors folder.

    vLLM itself takes a partial set of weights without an error and then answers with garbage.
    """
    expected = {}
    for file in Path(model_path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            expected.update((name, list(tensors.get_slice(name).get_shape())) for name in tensors.keys())
    if not expected:
        return []
    given = {name: list(shape) for name, _, shape in metadata}
    problems = [f"{name} is missing" for name in expected if name not in given and "rotary_emb" not in name]
    problems += [f"{name} is not in the model" for name in given if name not in expected]
    problems += [
        f"{name} has shape {given[name]}, the model {expected[name]}"
        for name in given
        if name in expected and given[name] != expected[name]
    ]
    return problems


@dataclass
class CopyInitInfo(base.WeightTransferInitInfo):
    """Where the copy comes from: `path` of the shared memory, or the broadcast group."""

    metadata: Metadata
    path: str = ""
    host: str = ""
    port: int = 0
    world_size: int = 0
    rank_offset: int = 1  # of this engine's first worker in that group


@dataclass
class CopyUpdateInfo(base.WeightTransferUpdateInfo):
    """Nothing changes from update to update."""


class FullCopyEngine(base.WeightTransferEngine):
    """Loads from one persistent buffer that holds the whole checkpoint.

    vLLM's layerwise reload keeps references to what it was given until a layer is complete, so a staging buffer that is
    used again within an update corrupts weights; here nothing is.
    """

    init_info_cls = CopyInitInfo
    update_info_cls = CopyUpdateInfo

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: CopyUpdateInfo) -> None:
        self.fetch()
        self.model.load_weights(self.views.items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def fetch(self) -> None:
        """Bring the newest weights into the buffer."""
        raise NotImplementedError

    def shutdown(self) -> None:
        self.views = {}


class ShmEngine(FullCopyEngine):
    """The buffer is memory that the trainer ranks write."""

    def init_transfer_engine(self, init_info: CopyInitInfo) -> None:
        self.views = tensor_views(map_file(init_info.path, layout_bytes(init_info.metadata)), init_info.metadata)

    def fetch(self) -> None:
        pass


class GlooEngine(FullCopyEngine):
    """The buffer is filled by a broadcast from trainer rank 0."""

    def init_transfer_engine(self, init_info: CopyInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = torch.distributed.TCPStore(init_info.host, init_info.port, timeout=GLOO_TIMEOUT)
        self.group = torch.distributed.ProcessGroupGloo(store, rank, init_info.world_size, GLOO_TIMEOUT)
        self.buffer = torch.empty(layout_bytes(init_info.metadata), dtype=torch.uint8)
        self.views = tensor_views(self.buffer, init_info.metadata)

    def fetch(self) -> None:
        broadcast_from_0(self.group, self.buffer)

    def shutdown(self) -> None:
        super().shutdown()
        self.buffer = self.group = None


def _end_with_parent() -> None:
    """A child engine ends with the process that started it, however that one ended."""
    parent = multiprocessing.parent_process()
    while os.getppid() == parent.pid:
        time.sleep(0.5)
    os._exit(1)


if os.environ.get(CHILD_FLAG) and multiprocessing.parent_process() is not None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
WeightTransferEngineFactory.register_engine("shm", ShmEngine)
WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
vllm_patches.apply()
