r"""A vLLM server as the rollout engine, by its HTTP routes. Start it with

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --port 8000 \
        --max-model-len 512 --enable-scale-out --logprobs-mode processed_logprobs \
        --weight-transfer-config '{"backend": "nccl"}' \
        --worker-extension-cls mcore_rl.rollout.transfer.worker_extension.WorkerExtension

and on CPU also `--weight-transfer-config '{"backend": "shm"}'` (or gloo for another host), `--enforce-eager`,
`--no-enable-chunked-prefill` and `--max-num-batched-tokens` of at least the model length.
"""

from __future__ import annotations

import base64
import io
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests

from mcore_rl.rollout.engine import (
    RolloutError,
    Sampled,
    check_prompts,
    load_decoder,
    make_group,
    request_seeds,
    token_versions,
)
from mcore_rl.rollout.threads import in_threads
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams
from moe.record.vllm import RequestRoutes

CONCURRENT_REQUESTS = 64
GENERATE = "inference/v1/generate"  # token ids in, token ids and their log-probs out


class ServerEngine:
    """A `RolloutEngine` reached over HTTP; the server goes on when it is closed.

    Args:
        timeout_s: how long to wait for a server that is still starting, and of every later request but the generating
            ones, which may take as long as they need.

    Raises:
        ValueError: the server was started without something that training needs (names the missing flag).
        RolloutError: it does not answer in time.
    """

    placement = "server"

    def __init__(self, url: str, model_path: str, timeout_s: float, return_routes: bool = False):
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._decode = load_decoder(model_path)
        self._session = requests.Session()
        # a connection kept open is closed by the server after 5 s of rest, which a request may just then be using
        self._session.headers["Connection"] = "close"
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=CONCURRENT_REQUESTS)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._wait_until_up()
        facts = self.call_workers("rollout_facts")[0]
        check_facts(facts, return_routes)
        routes = facts["routes"]
        self._routes = RequestRoutes(tuple(routes["layers"]), routes["num_experts"]) if return_routes else None
        self.max_model_len = facts["max_model_len"]
        self.weight_backend = facts["weight_transfer"]
        self.num_workers = facts["num_workers"]
        self.trainer_host = _own_address(self.url)
        self.resume()  # a trainer whose update was refused leaves it paused
        self._sample(Prompt("probe", (0,), ""), SamplingParams(max_tokens=1), seed=0)
        self.policy_version = 0

    @property
    def policy_version(self) -> int:
        return self._policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self.post("update_weight_version", {"new_version": str(version)})
        self._policy_version = version

    @property
    def sync_client(self) -> _HttpSyncClient:
        return _HttpSyncClient(self)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int) -> list[RolloutGroup]:
        check_prompts(prompts, self.max_model_len)
        return self.sample_groups(prompts, params, request_seeds(seed, len(prompts), params.n))

    def sample_groups(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[RolloutGroup]:
        """As `generate`, of checked prompts with a seed each."""
        calls = [partial(self._sample, prompt, params, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        answers = in_threads(calls, at_once=CONCURRENT_REQUESTS)
        return [self._group(prompt, answer["choices"]) for prompt, answer in zip(prompts, answers, strict=True)]

    def call_workers(self, method: str, **kwargs: Any) -> list[Any]:
        return self.post("collective_rpc", {"method": method, "kwargs": kwargs})["results"]

    def pause(self) -> None:
        self.post("pause", mode="keep")

    def resume(self) -> None:
        self.post("resume")

    def sleep(self) -> None:
        """A server has GPUs of its own."""

    def check_alive(self) -> None:
        try:
            healthy = self._session.get(f"{self.url}/health", timeout=10).status_code == 200
        except requests.RequestException as error:
            raise RolloutError(f"the vLLM server {self.url} does not answer: {error}") from error
        if not healthy:
            raise RolloutError(f"the vLLM server {self.url} answers, but its engine is dead; its own log has the cause")

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        told = False
        while True:
            try:
                return self.check_alive()
            except RolloutError:
                if time.monotonic() > deadline:
                    raise
            if not told:
                print(
                    f"waiting up to {self._timeout_s:g} s for the vLLM server {self.url}", file=sys.stderr, flush=True
                )
                told = True
            time.sleep(0.5)

    def close(self) -> None:
        self._session.close()

    def post(self, route: str, body: Any = None, **query: str) -> Any:
        """The JSON answer of one route. Raises RolloutError with the server's own words."""
        timeout = None if route == GENERATE else self._timeout_s
        try:
            answer = self._session.post(f"{self.url}/{route}", json=body, params=query, timeout=timeout)
        except requests.RequestException as error:
            raise RolloutError(f"the vLLM server {self.url} failed during {route}: {error}") from error
        if answer.status_code in (403, 404):
            raise ValueError(
                f"the vLLM server {self.url} does not serve /{route}; start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment and with --enable-scale-out"
            )
        if answer.status_code != 200:
            raise RolloutError(
                f"the vLLM server {self.url} refused {route} ({answer.status_code}): {answer.text[:2000]}"
            )
        return answer.json()

    def _sample(self, prompt: Prompt, params: SamplingParams, seed: int) -> Any:
        sampling = {
            "n": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_tokens,
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_token_ids),
            "seed": seed,
            "logprobs": 0,
            "detokenize": bool(params.stop),
        }
        body = {"token_ids": list(prompt.token_ids), "sampling_params": sampling}
        return self.post(GENERATE, body)

    def _group(self, prompt: Prompt, choices: list[dict[str, Any]]) -> RolloutGroup:
        responses = [
            Sampled(
                choice["token_ids"],
                [at_token["logprob"] for at_token in choice["logprobs"]["content"]],
                choice["finish_reason"],
                token_versions(
                    [(s["version"], s["start"], s["end"]) for s in choice["weight_versions"] or ()],
                    len(choice["token_ids"]),
                ),
                self._routes
                and self._routes.read(
                    decode_array(choice["routed_experts"]),
                    len(prompt.token_ids) + len(choice["token_ids"]),
                    f"response {choice['index']} of {prompt.id!r}",
                ),
            )
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]
        return make_group(prompt, responses, self._decode)


class _HttpSyncClient:
    """`WeightSyncClient` of a server."""

    def __init__(self, engine: ServerEngine):
        self._engine = engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._engine.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._engine.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._engine.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._engine.post("finish_weight_update")
        if not self._engine.post("reset_prefix_cache", reset_running_requests="true")["success"]:
            raise RolloutError("the vLLM server could not drop its prefix cache after a weight update")


def decode_array(text: str | None) -> np.ndarray | None:
    """An array as vLLM's server writes it: the base64 of a .npy file."""
    return None if text is None else np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def check_facts(facts: dict[str, Any], return_routes: bool = False) -> None:
    """Raises ValueError naming the flag that the server was started without."""
    if return_routes and not facts["routes"]["returned"]:
        fix = "a server on CPU cannot; use rollout.placement=child or in_process"
        if facts["device"] != "cpu":
            fix = "start it with --enable-return-routed-experts"
        raise ValueError(
            "moe.routing_replay=rollout and rollout.return_routes=true need routes, which the vLLM server does not "
            f"return: {fix}"
        )
    if facts["weight_transfer"] is None:
        raise ValueError(
            """the vLLM server cannot take weights; start it with --weight-transfer-config '{"backend": "shm"}'"""
        )
    if facts["logprobs_mode"] != "processed_logprobs":
        raise ValueError(
            f"the vLLM server reports {facts['logprobs_mode']}, not those of the distribution it samples from; start "
            "it with --logprobs-mode processed_logprobs"
        )
    if facts["device"] == "cpu" and facts["chunked_prefill"]:
        raise ValueError(
            "a vLLM server on CPU dies of a seeded request whose prompt is computed in chunks; start it with "
            "--no-enable-chunked-prefill and --max-num-batched-tokens of at least its model length"
        )


def _own_address(url: str) -> str:
    """The address of this host that the server sees."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]
