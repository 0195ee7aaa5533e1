"""The trainer's side of every weight-transfer backend, as vLLM's trainer engines."""

from __future__ import annotations

import base64
import pickle
import time
from collections import defaultdict
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

from mcore_rl.rollout.transfer.exporter import Exporter, Ranks
from mcore_rl.rollout.transfer.layout import GLOO_TIMEOUT, Areas, Metadata, broadcast_from_0, map_file
from mcore_rl.weights.shards import Shard

OnRank0 = Callable[[Callable[[], Any]], Any]  # the call's result, or its failure, on every rank


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
    areas: Areas
    on_rank_0: OnRank0 = field(kw_only=True)


class CopyTrainerEngine(base.TrainerWeightTransferEngine):
    """What shm and gloo have in common: a buffer laid out for the workers, and checksums of all that goes into it."""

    areas: Areas

    def init_workers(self, **where: Any) -> None:
        """Tell the workers where the buffer is and where their parts of it are."""
        starts = self.areas.starts()
        places = [[area, starts[area]] for area in self.areas.of_worker]
        # a client of several engines counts their workers on from `rank_offset`; the trainer is rank 0
        info = {"num_bytes": self.areas.num_bytes, "places": places, "rank_offset": 1, **where}
        self.client.init_weight_transfer_engine(info)

    def update_info(self, checksums: list[int]) -> dict[str, Any]:
        return {"checksums": self.areas.by_area(checksums)}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class ShmTrainerEngine(CopyTrainerEngine):
    """Every rank writes its own shards straight into the memory that the workers load from."""

    init_info_cls = ShmTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.areas, engine.on_rank_0 = init_info.areas, init_info.on_rank_0
        engine.targets = engine.areas.shards(map_file(init_info.path, engine.areas.num_bytes))
        engine.on_rank_0(lambda: engine.init_workers(path=init_info.path))
        return engine

    def send_weights(self) -> None:
        self.seconds: dict[str, float] = {}
        with self.timed("write"):  # which adds up over the ranks, so all have written
            checksums = self.source.exporter.write_into(self.targets)
        # nobody writes the next version while a worker reads this one
        with self.timed("engine"):
            self.on_rank_0(lambda: self._update(checksums))

    def _update(self, checksums: list[int]) -> None:
        self.client.start_weight_update()
        self.client.update_weights(self.update_info(checksums))
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.targets = []


@dataclass
class GlooTrainerInitInfo(base.TrainerInitInfo):
    backend: ClassVar[str] = "gloo"
    host: str  # of trainer rank 0, as the workers see it
    areas: Areas
    on_rank_0: OnRank0 = field(kw_only=True)


class GlooTrainerEngine(CopyTrainerEngine):
    """Rank 0 gathers the full weights and broadcasts them to the workers through a group of their own."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.areas, engine.on_rank_0 = init_info.areas, init_info.on_rank_0
        engine.regions = engine.areas.regions()
        engine.on_rank_0(lambda: engine._meet(init_info.host))
        return engine

    def _meet(self, host: str) -> None:
        self.buffer = torch.empty(self.areas.num_bytes, dtype=torch.uint8)
        self.targets: defaultdict[str, list[Shard]] = defaultdict(list)
        for shard in self.areas.shards(self.buffer):
            self.targets[shard.hf_name].append(shard)
        store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=GLOO_TIMEOUT)
        size = 1 + len(self.areas.of_worker)
        with _beside(lambda: self.init_workers(host=host, port=store.port, world_size=size)):
            self.group = torch.distributed.ProcessGroupGloo(store, 0, size, GLOO_TIMEOUT)

    def send_weights(self) -> None:
        self.seconds: dict[str, float] = {}
        with self.timed("write"):
            for name, tensor in self.source:  # materialising is a collective
                for shard in self.targets[name] if self.is_sender else ():
                    shard.view.copy_(tensor[tuple(slice(low, high) for low, high in shard.box)])
            checksums = self.source.exporter.checksums(self.regions)
        with self.timed("engine"):
            self.on_rank_0(lambda: self._update(checksums))

    def _update(self, checksums: list[int]) -> None:
        self.client.start_weight_update()
        with _beside(lambda: self.client.update_weights(self.update_info(checksums))):
            broadcast_from_0(self.group, self.buffer)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.targets, self.buffer, self.group = {}, None, None


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
    terms: dict[str, Any],
    ranks: Ranks,
    client: base.VLLMWeightSyncClient | None,
    source: ExporterSource,
    run_on_rank_0: OnRank0,
) -> base.TrainerWeightTransferEngine:
    """Meet the engine's workers. `terms` are rank 0's: backend, path of its memory, its host, its workers' areas."""
    backend, rank = terms["backend"], ranks.rank
    if backend == "shm":
        info = ShmTrainerInitInfo(terms["path"], terms["areas"], on_rank_0=run_on_rank_0, rank=rank)
    elif backend == "gloo":
        info = GlooTrainerInitInfo(terms["host"], terms["areas"], on_rank_0=run_on_rank_0, rank=rank)
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
