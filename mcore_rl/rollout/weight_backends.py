"""The trainer's side of every weight-transfer backend, as vLLM's trainer engines."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from mcore_rl.rollout.weight_layout import (
    GLOO_TIMEOUT,
    Metadata,
    broadcast_from_0,
    layout_bytes,
    map_file,
    tensor_views,
)
from mcore_rl.rollout.weight_transfer import Exporter, Ranks


class ExporterSource(base.WeightSource):
    """An `Exporter` as vLLM's trainer engines want it."""

    def __init__(self, exporter: Exporter):
        self.exporter = exporter

    def metadata(self) -> list[base.ParamMeta]:
        return [base.ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in self.exporter.metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.exporter)

    def plain_metadata(self) -> Metadata:
        """The same as JSON-able values."""
        return [(m.name, str(m.dtype).removeprefix("torch."), list(m.shape)) for m in self.metadata()]


@dataclass
class ShmTrainerInitInfo(base.TrainerInitInfo):
    backend: ClassVar[str] = "shm"
    path: str  # on rank 0 an open memory file
    barrier: Callable[[], None] = field(kw_only=True)


class ShmTrainerEngine(base.TrainerWeightTransferEngine[ShmTrainerInitInfo]):
    """Every rank writes its own shards straight into the memory that the workers load from."""

    init_info_cls = ShmTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        metadata = source.plain_metadata()
        engine.views = tensor_views(map_file(init_info.path, layout_bytes(metadata)), metadata)
        engine.barrier = init_info.barrier
        if engine.is_sender:
            client.init_weight_transfer_engine({"metadata": metadata, "path": init_info.path})
        engine.barrier()
        return engine

    def send_weights(self) -> None:
        self.source.exporter.write_into(self.views)
        self.barrier()
        if self.is_sender:
            self.client.start_weight_update()
            self.client.update_weights({})
            self.client.finish_weight_update()
        self.barrier()  # nobody writes the next version while a worker reads this one

    def shutdown(self) -> None:
        self.views = {}


@dataclass
class GlooTrainerInitInfo(base.TrainerInitInfo):
    backend: ClassVar[str] = "gloo"
    host: str  # of trainer rank 0, as the workers see it
    num_workers: int


class GlooTrainerEngine(base.TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Rank 0 gathers the full weights and broadcasts them to the workers through a group of their own."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not engine.is_sender:
            return engine
        metadata = source.plain_metadata()
        engine.buffer = torch.empty(layout_bytes(metadata), dtype=torch.uint8)
        engine.views = tensor_views(engine.buffer, metadata)
        store = torch.distributed.TCPStore(
            init_info.host, 0, is_master=True, wait_for_workers=False, timeout=GLOO_TIMEOUT
        )
        size = 1 + init_info.num_workers
        meeting = {"host": init_info.host, "port": store.port, "world_size": size, "rank_offset": 1}
        info = {"metadata": metadata, **meeting}
        with _beside(lambda: client.init_weight_transfer_engine(info)):
            engine.group = torch.distributed.ProcessGroupGloo(store, 0, size, GLOO_TIMEOUT)
        return engine

    def send_weights(self) -> None:
        if not self.is_sender:
            for _ in self.source:  # materialising is a collective
                pass
            return
        names = set()
        for name, tensor in self.source:
            self.views[name].copy_(tensor)
            names.add(name)
        assert names == self.views.keys(), f"exporter left out {sorted(self.views.keys() - names)}"
        self.client.start_weight_update()
        with _beside(lambda: self.client.update_weights({})):
            broadcast_from_0(self.group, self.buffer)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.views, self.buffer, self.group = {}, None, None


class IpcClient:
    """Sends CUDA IPC handles as the pickled string that vLLM's worker accepts: they fit neither msgpack nor JSON."""

    def __init__(self, client: base.VLLMWeightSyncClient):
        self.init_weight_transfer_engine = client.init_weight_transfer_engine
        self.start_weight_update = client.start_weight_update
        self.finish_weight_update = client.finish_weight_update
        self._update_weights = client.update_weights

    def update_weights(self, update_info: dict[str, Any]) -> None:
        handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
        self._update_weights(update_info | {"ipc_handles": None, "ipc_handles_pickled": handles})


class Rank0IpcEngine(IPCTrainerWeightTransferEngine):
    """vLLM's engine has every rank share tensors of its own with a worker on its own GPU. Here only rank 0 has the full
    tensors, and the one worker is on its GPU: the others only take part in gathering them.

    Packed, so that rank 0 holds one buffer more and not a second model; the buffer takes the largest tensor.
    """

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        sizes = [meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in source.metadata()]
        init_info.packed_buffer_size_bytes = max(init_info.packed_buffer_size_bytes, *sizes)
        return super().trainer_init(init_info, client=client, source=source)

    def send_weights(self) -> None:
        if self.is_sender:
            super().send_weights()
        else:
            for _ in self.source:
                pass

    def _all_gather_and_merge_handles(self, handles: list[dict[str, tuple]]) -> list[dict[str, tuple]]:
        return handles

    @staticmethod
    def _post_send_sync() -> None:
        torch.cuda.ipc_collect()


def open_trainer_side(
    terms: dict[str, Any], ranks: Ranks, client: base.VLLMWeightSyncClient | None, source: ExporterSource
) -> base.TrainerWeightTransferEngine:
    """Meet the engine's workers. `terms` are rank 0's: backend, path of its memory, its host, number of workers."""
    backend, rank = terms["backend"], ranks.rank
    if backend == "shm":
        barrier = torch.distributed.barrier if ranks.world_size > 1 else lambda: None
        info = ShmTrainerInitInfo(terms["path"], barrier=barrier, rank=rank)
    elif backend == "gloo":
        info = GlooTrainerInitInfo(terms["host"], terms["num_workers"], rank=rank)
    elif backend == "nccl":
        info = NCCLTrainerInitInfo(terms["host"], get_open_port(), 1 + terms["num_workers"], rank=rank)
    elif backend == "ipc":
        info = IPCTrainerInitInfo(rank=rank, packed=True)
        return Rank0IpcEngine.trainer_init(info, client=client and IpcClient(client), source=source)
    else:
        raise ValueError(f"the rollout engine was started with weight transfer {backend!r}; use shm, gloo, nccl or ipc")
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


@contextmanager
def _beside(call: Callable[[], None]) -> Iterator[None]:
    """Run `call` in a thread while the body runs: both meet in a collective. The call's own failure is raised first."""
    pool = ThreadPoolExecutor(1)
    pending = pool.submit(call)
    try:
        yield
    except Exception as error:
        if pending.done() and pending.exception() is not None:
            raise pending.exception() from error
        raise
    finally:
        pool.shutdown(wait=False)
    pending.result()


WeightTransferTrainerFactory.register_engine("shm", ShmTrainerEngine)
WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerEngine)
