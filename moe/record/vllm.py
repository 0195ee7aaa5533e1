"""Routes of vLLM's own forward passes, request by request.

vLLM returns them as `CompletionOutput.routed_experts` under `enable_return_routed_experts=True`: chunks of a prompt are
joined, blocks found in the prefix cache bring the routes they were computed with, preempted requests begin anew. On a
CPU only its older model runner works (the newer one needs Triton), and that one does not feed the machinery:
`CpuRoutes` does it in its place. vLLM is imported late: its environment must be set before.

Letters: n tokens of a request, L MoE layers, N decoder layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.record.trace import check_routes, compact_dtype


@dataclass(frozen=True)
class RequestRoutes:
    """Reads the routes that an engine returns with a finished request."""

    layers: tuple[int, ...]  # numbers, from 0, of the decoder layers that have experts
    num_experts: int

    def read(self, routed_experts: np.ndarray | None, num_tokens: int, request: str) -> Tensor:
        """[n-1, L, K] in the compact type: the last token has not been computed.

        Args:
            routed_experts: [n-1, N, K]; the rows of dense layers hold nothing.
            num_tokens: n, prompt and response.
            request: how an error names it.

        Raises:
            ValueError: there are none, not as many as tokens, or impossible ones.
        """
        shape = None if routed_experts is None else routed_experts.shape
        if shape is None or len(shape) != 3 or shape[0] != num_tokens - 1 or max(self.layers) >= shape[1]:
            raise ValueError(
                f"{request}: vLLM returned routes of shape {shape} for {num_tokens} tokens, expected "
                f"({num_tokens - 1}, layers, top-k)"
            )
        ids = torch.from_numpy(routed_experts[:, list(self.layers)]).to(compact_dtype(self.num_experts))
        try:
            check_routes(ids, self.num_experts)
        except ValueError as error:
            raise ValueError(f"{request}: {error}") from error
        return ids


def route_facts(model: torch.nn.Module, config: Any) -> dict[str, Any]:
    """What a reader of a vLLM worker's routes must know, as plain values."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    return {
        "returned": config.aux_output_config.enabled,
        "layers": sorted(m.layer_id for m in model.modules() if isinstance(m, MoERunner)),
        "num_experts": config.model_config.get_num_experts(),
    }


class CpuRoutes:
    """One worker's captured routes, handed to vLLM's auxiliary-output connector step by step."""

    def __init__(self, runner: Any):
        from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

        self._runner = runner
        self._connector = get_aux_output_connector(runner.model, runner.vllm_config, runner.kv_cache_config)
        self._pending = None

    def begin(self, scheduler_output: Any) -> None:
        """Before a step's forward pass."""
        self._connector.begin_step(scheduler_output.aux_output_connector_metadata)

    def computed(self) -> None:
        """After the forward pass, before its batch is changed."""
        batch = self._runner.input_batch
        requests = len(batch.req_ids)
        step = SimpleNamespace(
            req_ids=list(batch.req_ids),
            query_start_loc_np=self._runner.query_start_loc.np[: requests + 1].copy(),
            num_computed_tokens_np=batch.num_computed_tokens_cpu[:requests].copy(),
        )
        self._pending = self._connector.prepare_output(step)

    def sampled(self, output: Any) -> None:
        """After sampling: add the routes to what the worker returns. A prompt computed in part samples no token."""
        if self._pending is None:  # only the first tensor-parallel rank returns anything
            return
        counts = np.array([len(tokens) for tokens in output.sampled_token_ids])
        self._pending.enqueue_cpu_copy(num_sampled=counts, num_rejected=np.zeros_like(counts))
        output.aux_output_connector_output = self._pending.process_output()
        self._pending = None

    def close(self) -> None:
        """End the connector's thread."""
        self._connector.close()
