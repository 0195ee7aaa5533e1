"""Several engines of one model as one: every prompt is answered by one of them, all get the same weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from mcore_rl.rollout.engine import RolloutEngine, check_prompts, request_seeds
from mcore_rl.rollout.threads import in_threads
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams

T = TypeVar("T")
PROMPTS_AT_ONCE = 64  # of each engine


class Member(RolloutEngine, Protocol):
    """What an engine of a group can do beside."""

    max_model_len: int

    def sample_groups(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[RolloutGroup]:
        """As `generate`, of checked prompts with a seed each; called from several threads at once."""
        ...


class EngineGroup:
    """A `RolloutEngine` over others. Errors name the one that failed; nobody takes over for it.

    A prompt goes, with all its responses and the seed that it would have with one engine, to the engine that has fewest
    prompts to answer; with `PROMPTS_AT_ONCE` at all of them it waits. So a slow engine, or one with long responses of
    an earlier call in flight, is asked less, and the samples do not depend on who answers.

    Raises:
        ValueError: the engines take weights by different backends.
    """

    def __init__(self, engines: Sequence[Member]):
        self.engines = list(engines)
        backends = [engine.weight_backend for engine in engines]
        if len(set(backends)) > 1:
            raise ValueError(f"the rollout engines take weights in different ways: {backends}; start all with one")
        self.placement = engines[0].placement
        self.weight_backend = backends[0]
        self.num_workers = sum(engine.num_workers for engine in engines)
        self.max_model_len = min(engine.max_model_len for engine in engines)
        hosts = [engine.trainer_host for engine in engines]
        # A loopback address is one for engines on this host only.
        self.trainer_host = next((host for host in hosts if not host.startswith("127.")), hosts[0])
        self._load, self._lock = [0] * len(engines), threading.Lock()

    @property
    def policy_version(self) -> int:
        return self.engines[0].policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self.on_all(lambda _, engine: setattr(engine, "policy_version", version))

    @property
    def sync_client(self) -> _GroupSyncClient:
        return _GroupSyncClient(self)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int) -> list[RolloutGroup]:
        check_prompts(prompts, self.max_model_len)
        seeds = request_seeds(seed, len(prompts), params.n)
        calls = [partial(self._answer, prompt, params, s) for prompt, s in zip(prompts, seeds, strict=True)]
        return in_threads(calls, at_once=PROMPTS_AT_ONCE * len(self.engines))

    def _answer(self, prompt: Prompt, params: SamplingParams, seed: int) -> RolloutGroup:
        with self._lock:
            chosen = self._load.index(min(self._load))
            self._load[chosen] += 1
        try:
            return self.engines[chosen].sample_groups([prompt], params, [seed])[0]
        finally:
            with self._lock:
                self._load[chosen] -= 1

    def call_workers(self, method: str, **kwargs: Any) -> list[Any]:
        results = self.on_all(lambda _, engine: engine.call_workers(method, **kwargs))
        return [result for of_engine in results for result in of_engine]

    def pause(self) -> None:
        self.on_all(lambda _, engine: engine.pause())

    def resume(self) -> None:
        self.on_all(lambda _, engine: engine.resume())

    def sleep(self) -> None:
        self.on_all(lambda _, engine: engine.sleep())

    def check_alive(self) -> None:
        self.on_all(lambda _, engine: engine.check_alive())

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def on_all(self, call: Callable[[int, Member], T]) -> list[T]:
        """`call(i, engine)` of every engine at once."""
        return in_threads([partial(call, i, engine) for i, engine in enumerate(self.engines)])


class _GroupSyncClient:
    """`WeightSyncClient` of all engines at once: they meet in collectives, each with ranks of its own."""

    def __init__(self, group: EngineGroup):
        self._group = group

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        workers = [engine.num_workers for engine in self._group.engines]

        def init(i: int, engine: Member) -> None:
            own = dict(init_info)
            if "rank_offset" in own:  # gloo and nccl count the workers of all engines after the trainer
                own["rank_offset"] += sum(workers[:i])
            engine.sync_client.init_weight_transfer_engine(own)

        self._group.on_all(init)

    def start_weight_update(self) -> None:
        self._group.on_all(lambda _, engine: engine.sync_client.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._group.on_all(lambda _, engine: engine.sync_client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._group.on_all(lambda _, engine: engine.sync_client.finish_weight_update(weight_version))
