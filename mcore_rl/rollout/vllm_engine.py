"""vLLM as the rollout engine: inside the trainer process, or in a child process of rank 0."""

from __future__ import annotations

import atexit
import multiprocessing.connection
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout import isolation
from mcore_rl.rollout.engine import (
    RolloutEngine,
    RolloutError,
    Sampled,
    check_prompts,
    load_decoder,
    make_group,
    request_seeds,
)
from mcore_rl.rollout.placement import resolve
from mcore_rl.rollout.server_engine import ServerEngine
from mcore_rl.rollout.server_group import ServerGroup
from mcore_rl.rollout.vllm_arguments import engine_arguments, sampling_params
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams
from moe.adapters.vllm import RequestRoutes


def open_engine(
    rollout: RolloutConfig,
    weight_sync: WeightSyncConfig,
    model_path: str,
    model_dtype: str,
    max_prompt_tokens: int,
    world_size: int,
    seed: int,
    return_routes: bool = False,
) -> RolloutEngine:
    """Start (or, for placement "server", reach) the engine. Called on rank 0 after the process groups exist.

    Args:
        model_dtype: of the trainer; used where `rollout.dtype` is "auto".
        max_prompt_tokens: longest prompt; with `rollout.max_response_tokens` the default of `max_model_len`.
        world_size: trainer ranks.
        return_routes: every trajectory comes with the routes of its tokens.

    Raises:
        ValueError: placement and number of ranks or server address do not fit, or the server is set up wrongly.
        RolloutError: the engine did not start.
    """
    placement, backend = resolve(rollout, weight_sync, world_size)
    if placement == "server":
        urls = [rollout.server_url] if isinstance(rollout.server_url, str) else rollout.server_url
        servers = [ServerEngine(url, model_path, rollout.startup_timeout_s, return_routes) for url in urls]
        return servers[0] if len(servers) == 1 else ServerGroup(servers)
    dtype = model_dtype if rollout.dtype == "auto" else rollout.dtype
    max_model_len = rollout.max_model_len or max_prompt_tokens + rollout.max_response_tokens
    return VLLMEngine(model_path, placement, backend, dtype, max_model_len, rollout, seed, return_routes)


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
    ):
        self.policy_version = 0
        self.placement = placement
        self.weight_backend = backend
        self.num_workers = rollout.tensor_parallel_size
        self.max_model_len = max_model_len
        self._closed = False
        self._num_requests = 0
        self._may_sleep, self._sleeps = rollout.sleep and torch.cuda.is_available(), False
        self._decode = load_decoder(model_path)
        isolation.prepare_environment(backend)
        has_tokenizer = self._decode is not None
        arguments = engine_arguments(
            model_path, backend, dtype, max_model_len, rollout, seed, has_tokenizer, return_routes
        )
        self._llm = _start(arguments, placement, rollout.startup_timeout_s)
        if placement == "child":
            threading.Thread(target=_fail_waiters, args=(self._llm.engine_core,), daemon=True).start()
        atexit.register(self.close)
        self._routes = None
        if return_routes:
            facts = self.call_workers("rollout_facts")[0]["routes"]
            self._routes = RequestRoutes(tuple(facts["layers"]), facts["num_experts"])

    @property
    def sync_client(self) -> _LocalSyncClient:
        return _LocalSyncClient(self)

    @property
    def child_pids(self) -> list[int]:
        return [process.pid for process in self._children()]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int) -> list[RolloutGroup]:
        check_prompts(prompts, self.max_model_len)
        if params.stop and self._decode is None:
            raise ValueError(
                f"stop strings {params.stop} need a tokenizer, the model folder has none; use stop_token_ids"
            )
        with self._dead_engine_explained("generation"), self._isolated():
            self._wake()
            # What an earlier call left in the cache must not decide how this one is computed.
            self._reset_prefix_cache()
            outputs = self._run(prompts, params, seed)
        return [self._group(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def call_workers(self, method: str, **kwargs: Any) -> list[Any]:
        with self._dead_engine_explained(method), self._isolated():
            self._wake()
            return self._llm.collective_rpc(method, kwargs=kwargs)

    def sleep(self) -> None:
        if not self._may_sleep or self._sleeps:
            return
        with self._dead_engine_explained("falling asleep"), self._isolated():
            self._llm.sleep(
                level=1
            )  # weights to main memory: at level 2 they would be lost, and only a sync brings them
        self._sleeps = True

    def reset_prefix_cache(self) -> None:
        with self._dead_engine_explained("cache reset"):
            self._reset_prefix_cache()

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
        with isolation.default_group_kept() if self.placement == "in_process" else nullcontext():
            self._llm.engine_core.shutdown()
        self._llm = None

    def _wake(self) -> None:
        if self._sleeps:
            self._llm.wake_up()
            self._sleeps = False

    def _isolated(self):
        return isolation.generators_kept() if self.placement == "in_process" else nullcontext()

    def _children(self) -> list[Any]:
        if self.placement != "child" or self._llm is None:
            return []
        return list(self._llm.engine_core.resources.engine_manager.processes)

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM could not drop its prefix cache: requests of an earlier call are still running")

    def _run(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int) -> list[Any]:
        ids = []
        try:
            for prompt, prompt_seed in zip(prompts, request_seeds(seed, len(prompts), params.n), strict=True):
                ids.append(str(self._num_requests))
                self._num_requests += 1
                tokens = {"prompt_token_ids": list(prompt.token_ids)}
                self._llm.add_request(ids[-1], tokens, sampling_params(params, prompt_seed))
            finished = {}
            while self._llm.has_unfinished_requests():
                finished.update((output.request_id, output) for output in self._llm.step() if output.finished)
        except BaseException:
            if all(process.is_alive() for process in self._children()):
                self._llm.abort_request(ids)
            raise
        return [finished[i] for i in ids]

    def _group(self, prompt: Prompt, output: Any) -> RolloutGroup:
        responses = [
            Sampled(
                tuple(r.token_ids),
                tuple(at_token[token].logprob for at_token, token in zip(r.logprobs, r.token_ids, strict=True)),
                r.finish_reason,
                self._routes
                and self._routes.read(
                    r.routed_experts, len(prompt.token_ids) + len(r.token_ids), f"response {r.index} of {prompt.id!r}"
                ),
            )
            for r in sorted(output.outputs, key=lambda response: response.index)
        ]
        return make_group(prompt, responses, self._decode, self.policy_version)

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
    """`WeightSyncClient` of an engine that this process owns; generation is never in flight during an update."""

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
        self._engine.reset_prefix_cache()


def _start(arguments: dict[str, Any], placement: str, timeout_s: float) -> Any:
    child = placement == "child"
    with isolation.start_environment(child, timeout_s):
        from vllm import EngineArgs
        from vllm.distributed import cleanup_dist_env_and_memory, model_parallel_is_initialized
        from vllm.v1.engine.llm_engine import LLMEngine

        from mcore_rl.rollout.vllm_patches import allow_routes_on_cpu

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
