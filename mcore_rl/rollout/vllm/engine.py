"""vLLM as the rollout engine: inside the trainer process, or in a child process of rank 0."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing.connection
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.engine import (
    RolloutEngine,
    RolloutError,
    Sampled,
    check_prompts,
    load_decoder,
    make_group,
    request_seeds,
    token_versions,
)
from mcore_rl.rollout.engine_group import EngineGroup
from mcore_rl.rollout.placement import resolve
from mcore_rl.rollout.vllm import isolation
from mcore_rl.rollout.vllm.arguments import engine_arguments, sampling_params
from mcore_rl.rollout.vllm.driver import Direct, OwnThread
from mcore_rl.rollout.vllm.server import ServerEngine
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams
from moe.record.vllm import RequestRoutes


def open_engine(
    rollout: RolloutConfig,
    weight_sync: WeightSyncConfig,
    model_path: str,
    model_dtype: str,
    max_prompt_tokens: int,
    world_size: int,
    seed: int,
    return_routes: bool = False,
    threads: int = 1,
) -> RolloutEngine:
    """Start (or, for placement "server", reach) the engine. Called on rank 0 after the process groups exist.

    Args:
        model_dtype: of the trainer; used where `rollout.dtype` is "auto".
        max_prompt_tokens: longest prompt; with `rollout.max_response_tokens` the default of `max_model_len`.
        world_size: trainer ranks.
        return_routes: every trajectory comes with the routes of its tokens.
        threads: of each worker of a child on a CPU; an engine in this process has those of this process.

    Raises:
        ValueError: placement and number of ranks or server address do not fit, or the server is set up wrongly.
        RolloutError: the engine did not start.
    """
    placement, backend = resolve(rollout, weight_sync, world_size)
    if placement == "server":
        urls = [rollout.server_url] if isinstance(rollout.server_url, str) else rollout.server_url
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError(f"rollout.server_url={urls} names a server twice")
        servers = [ServerEngine(url, model_path, rollout.startup_timeout_s, return_routes) for url in urls]
        return servers[0] if len(servers) == 1 else EngineGroup(servers)
    dtype = model_dtype if rollout.dtype == "auto" else rollout.dtype
    max_model_len = rollout.max_model_len or max_prompt_tokens + rollout.max_response_tokens
    arguments = (model_path, placement, backend, dtype, max_model_len, rollout, seed, return_routes, threads)
    with ExitStack() as started:
        engines = []
        for _ in range(rollout.num_engines):
            engines.append(VLLMEngine(*arguments))
            started.callback(engines[-1].close)
        started.pop_all()  # none is closed: all have started
    return engines[0] if len(engines) == 1 else EngineGroup(engines)


class VLLMEngine:
    """A `RolloutEngine` in this process or in a child of it."""

    trainer_host = "127.0.0.1"

    def __init__(
        self,
        model_path: str,
        placement: str,
        backend: str,
        dtype: str,
        max_model_len: int,
        rollout: RolloutConfig,
        seed: int,
        return_routes: bool,
        threads: int,
    ):
        self.placement = placement
        self.weight_backend = backend
        self.num_workers = rollout.tensor_parallel_size
        self.max_model_len = max_model_len
        self._closed = False
        self._shared_files: set[Path] = set()
        self._names = map(str, itertools.count())
        self._may_sleep, self._sleeps = rollout.sleep and torch.cuda.is_available(), False
        self._decode = load_decoder(model_path)
        isolation.prepare_environment(backend)
        has_tokenizer = self._decode is not None
        arguments = engine_arguments(
            model_path, backend, dtype, max_model_len, rollout, seed, has_tokenizer, return_routes
        )
        self._llm = _start(arguments, placement, rollout.startup_timeout_s, threads)
        if placement == "child":
            threading.Thread(target=_fail_waiters, args=(self._llm.engine_core,), daemon=True).start()
            self._driver = OwnThread(self._llm, lambda: all(process.is_alive() for process in self._children()))
        else:
            self._driver = Direct(self._llm)
        atexit.register(self.close)
        self.policy_version = 0
        self._shared_files = {Path(f) for of_worker in self.call_workers("shared_files") for f in of_worker}
        self._routes = None
        if return_routes:
            facts = self.call_workers("rollout_facts")[0]["routes"]
            self._routes = RequestRoutes(tuple(facts["layers"]), facts["num_experts"])

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        with self._dead_engine_explained("labelling its weights"):
            self._driver.call(lambda llm: llm.set_weight_version(str(version)))
        self._policy_version = version

    @property
    def sync_client(self) -> _LocalSyncClient:
        return _LocalSyncClient(self)

    @property
    def child_pids(self) -> list[int]:
        return [process.pid for process in self._children()]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int) -> list[RolloutGroup]:
        check_prompts(prompts, self.max_model_len)
        return self.sample_groups(prompts, params, request_seeds(seed, len(prompts), params.n))

    def sample_groups(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[RolloutGroup]:
        """As `generate`, of checked prompts with a seed each."""
        if params.stop and self._decode is None:
            raise ValueError(
                f"stop strings {params.stop} need a tokenizer, the model folder has none; use stop_token_ids"
            )
        with self._dead_engine_explained("generation"), self._isolated():
            self._wake()
            requests = [
                (next(self._names), {"prompt_token_ids": list(prompt.token_ids)}, sampling_params(params, seed))
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            # What an earlier call left in the cache must not decide how this one is computed.
            outputs = self._driver.run(requests, begin=_reset_prefix_cache)
        return [self._group(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def call_workers(self, method: str, **kwargs: Any) -> list[Any]:
        with self._dead_engine_explained(method), self._isolated():
            self._wake()
            return self._driver.call(lambda llm: llm.collective_rpc(method, kwargs=kwargs))

    def pause(self) -> None:
        with self._dead_engine_explained("pausing"), self._isolated():
            self._wake()
            self._driver.pause()

    def resume(self) -> None:
        with self._dead_engine_explained("resuming"):
            self._driver.resume()

    def sleep(self) -> None:
        if not self._may_sleep or self._sleeps:
            return
        with self._dead_engine_explained("falling asleep"), self._isolated():
            # weights to main memory: at level 2 they would be lost, and only a sync brings them
            self._driver.call(lambda llm: llm.sleep(level=1))
        self._sleeps = True

    def drop_caches(self) -> None:
        """Forget all keys and values, also of requests that are in flight."""
        with self._dead_engine_explained("cache reset"):
            self._driver.call(lambda llm: _reset_prefix_cache(llm, running=True))

    def check_alive(self) -> None:
        if self._closed:
            raise RolloutError("the rollout engine is closed")
        for process in self._children():
            if not process.is_alive():
                raise RolloutError(
                    f"the engine's process {process.pid} is dead: {isolation.exit_cause(process.exitcode)}"
                )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._driver.close()
        with isolation.default_group_kept() if self.placement == "in_process" else nullcontext():
            self._llm.engine_core.shutdown()
        self._llm = None
        for file in self._shared_files:  # of workers that did not end in time and were killed
            file.unlink(missing_ok=True)

    def _wake(self) -> None:
        if self._sleeps:
            self._driver.call(lambda llm: llm.wake_up())
            self._sleeps = False

    def _isolated(self):
        return isolation.generators_kept() if self.placement == "in_process" else nullcontext()

    def _children(self) -> list[Any]:
        if self.placement != "child" or self._llm is None:
            return []
        return list(self._llm.engine_core.resources.engine_manager.processes)

    def _group(self, prompt: Prompt, output: Any) -> RolloutGroup:
        responses = [
            Sampled(
                r.token_ids,
                r.logprobs.logprobs,  # flat: one a token, as no others than the sampled one are asked for
                r.finish_reason,
                token_versions([(s.version, s.start, s.end) for s in r.weight_versions or ()], len(r.token_ids)),
                self._routes
                and self._routes.read(
                    r.routed_experts, len(prompt.token_ids) + len(r.token_ids), f"response {r.index} of {prompt.id!r}"
                ),
            )
            for r in sorted(output.outputs, key=lambda response: response.index)
        ]
        return make_group(prompt, responses, self._decode)

    @contextmanager
    def _dead_engine_explained(self, doing: str) -> Iterator[None]:
        """Turns vLLM's errors into RolloutError; a dead child is named with its exit status."""
        if self._closed:
            raise RolloutError("the rollout engine is closed")
        try:
            yield
        except RolloutError:
            raise
        except Exception as error:
            for process in self._children():
                if _has_ended(process):
                    cause = isolation.exit_cause(process.exitcode)
                    raise RolloutError(f"the engine's process {process.pid} died during {doing}: {cause}") from error
            raise RolloutError(f"the rollout engine failed during {doing}: {error}") from error


class _LocalSyncClient:
    """`WeightSyncClient` of an engine that this process owns."""

    def __init__(self, engine: VLLMEngine):
        self._engine = engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._engine.call_workers("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self._engine.call_workers("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._engine.call_workers("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engine.call_workers("finish_weight_update")
        self._engine.drop_caches()


def _reset_prefix_cache(llm: Any, running: bool = False) -> None:
    if not llm.reset_prefix_cache(reset_running_requests=running):
        raise RolloutError("vLLM could not drop its prefix cache: requests of an earlier call are still running")


def _start(arguments: dict[str, Any], placement: str, timeout_s: float, threads: int) -> Any:
    child = placement == "child"
    with isolation.start_environment(child, timeout_s, threads):
        from vllm import EngineArgs
        from vllm.distributed import cleanup_dist_env_and_memory, model_parallel_is_initialized
        from vllm.v1.engine.llm_engine import LLMEngine

        from mcore_rl.rollout.vllm.patches import allow_routes_on_cpu

        allow_routes_on_cpu()
        if not child and model_parallel_is_initialized():
            raise ValueError(
                "this process has an in-process engine already; close it first, or use rollout.placement='child'"
            )
        with isolation.empty_main_module() if child else isolation.process_state_kept():
            try:
                return LLMEngine.from_engine_args(EngineArgs(**arguments), enable_multiprocessing=child)
            except Exception as error:
                if not child:
                    with isolation.default_group_kept():
                        cleanup_dist_env_and_memory()
                raise RolloutError(f"the rollout engine ({placement}) did not start: {error}") from error


def _has_ended(process: Any, wait_s: float = 1.0) -> bool:
    """Whether a child is dead, a moment after something failed: its sockets close before it ends, and where vLLM's
    monitor thread asks for its status first, no other thread sees it as dead until that one has noted the answer.
    """
    end = time.monotonic() + wait_s
    while process.exitcode is None and time.monotonic() < end:
        time.sleep(0.01)
    return process.exitcode is not None


def _fail_waiters(core: Any) -> None:
    """Wake every thread that waits for a dead child: vLLM's client (v1/engine/core_client.py:918) waits forever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    multiprocessing.connection.wait([process.sentinel for process in core.resources.engine_manager.processes])
    core.resources.engine_dead = True
    core.outputs_queue.put(EngineDeadError())
    for waiter in list(core.utility_results.values()):
        if not waiter.done():
            waiter.set_exception(EngineDeadError())
