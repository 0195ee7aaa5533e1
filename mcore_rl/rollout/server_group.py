"""Several vLLM servers as one rollout engine: every prompt is answered by one of them, all get the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from mcore_rl.rollout.engine import check_prompts, request_seeds
from mcore_rl.rollout.server_engine import ServerEngine
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams

T = TypeVar("T")


class ServerGroup:
    """A `RolloutEngine` over servers of one model. Errors name the server by its address.

    Prompt i goes to server i mod N, with all its responses and the seed that it would have with one server.

    Raises:
        ValueError: the servers take weights by different backends, or an address is given twice.
    """

    placement = "server"

    def __init__(self, servers: Sequence[ServerEngine]):
        self.servers = list(servers)
        urls = [server.url for server in servers]
        if len(set(urls)) < len(urls):
            raise ValueError(f"rollout.server_url={urls} names a server twice")
        backends = {server.url: server.weight_backend for server in servers}
        if len(set(backends.values())) > 1:
            raise ValueError(f"the vLLM servers take weights in different ways: {backends}; start all with one backend")
        self.weight_backend = servers[0].weight_backend
        self.num_workers = sum(server.num_workers for server in servers)
        self.max_model_len = min(server.max_model_len for server in servers)
        hosts = [server.trainer_host for server in servers]
        # A loopback address is one for servers on this host only.
        self.trainer_host = next((host for host in hosts if not host.startswith("127.")), hosts[0])

    @property
    def policy_version(self) -> int:
        return self.servers[0].policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        for server in self.servers:
            server.policy_version = version

    @property
    def sync_client(self) -> _GroupSyncClient:
        return _GroupSyncClient(self)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int) -> list[RolloutGroup]:
        check_prompts(prompts, self.max_model_len)
        count, seeds = len(self.servers), request_seeds(seed, len(prompts), params.n)

        def part(i: int, server: ServerEngine) -> list[RolloutGroup]:
            return server.sample_groups(prompts[i::count], params, seeds[i::count])

        answers = [iter(groups) for groups in self.on_all(part)]
        return [next(answers[i % count]) for i in range(len(prompts))]

    def call_workers(self, method: str, **kwargs: Any) -> list[Any]:
        results = self.on_all(lambda _, server: server.call_workers(method, **kwargs))
        return [result for of_server in results for result in of_server]

    def sleep(self) -> None:
        """Servers have GPUs of their own."""

    def check_alive(self) -> None:
        self.on_all(lambda _, server: server.check_alive())

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def on_all(self, call: Callable[[int, ServerEngine], T]) -> list[T]:
        """`call(i, server)` of every server at once; the first failure is raised without waiting for the others, which
        may be waiting for the failed one.
        """
        pool = ThreadPoolExecutor(len(self.servers))
        pending = [pool.submit(call, i, server) for i, server in enumerate(self.servers)]
        done, _ = wait(pending, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
        for finished in done:
            finished.result()
        return [finished.result() for finished in pending]


class _GroupSyncClient:
    """`WeightSyncClient` of all servers at once: they meet in collectives, each with ranks of its own."""

    def __init__(self, group: ServerGroup):
        self._group = group

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        workers = [server.num_workers for server in self._group.servers]

        def init(i: int, server: ServerEngine) -> None:
            own = dict(init_info)
            if "rank_offset" in own:  # gloo and nccl count the workers of all servers after the trainer
                own["rank_offset"] += sum(workers[:i])
            server.sync_client.init_weight_transfer_engine(own)

        self._group.on_all(init)

    def start_weight_update(self) -> None:
        self._group.on_all(lambda _, server: server.sync_client.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._group.on_all(lambda _, server: server.sync_client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._group.on_all(lambda _, server: server.sync_client.finish_weight_update(weight_version))
