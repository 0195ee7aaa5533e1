"""Our configuration in vLLM's words. vLLM is imported late: its environment must be set before."""

from __future__ import annotations

from typing import Any

from mcore_rl.config import RolloutConfig
from mcore_rl.types import SamplingParams
from mcore_rl.weights.stored import find_megatron

WORKER_EXTENSION = "mcore_rl.rollout.worker_extension.WorkerExtension"
MAX_BATCHED_TOKENS = 8192


def engine_arguments(
    model_path: str,
    backend: str,
    dtype: str,
    max_model_len: int,
    rollout: RolloutConfig,
    seed: int,
    has_tokenizer: bool,
    return_routes: bool = False,
) -> dict[str, Any]:
    """vLLM's EngineArgs for one of our engines."""
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    arguments = dict(
        model=model_path,
        skip_tokenizer_init=not has_tokenizer,
        dtype=dtype,
        seed=seed,
        max_model_len=max_model_len,
        max_num_batched_tokens=max(MAX_BATCHED_TOKENS, max_model_len),
        tensor_parallel_size=rollout.tensor_parallel_size,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config=WeightTransferConfig(backend=backend),
        enable_return_routed_experts=return_routes,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        # a Megatron checkpoint, which only the trainer reads; it sends the weights before it asks for anything
        load_format="dummy" if find_megatron(model_path) else "auto",
    )
    if not current_platform.is_cpu():
        return arguments | dict(gpu_memory_utilization=rollout.gpu_memory_utilization, enable_sleep_mode=rollout.sleep)
    # A prompt computed in chunks rolls its request's generator back, which a CPU generator cannot do.
    return arguments | dict(
        enforce_eager=True, enable_chunked_prefill=False, kv_cache_memory_bytes=int(rollout.kv_cache_gb * 2**30)
    )


def sampling_params(params: SamplingParams, seed: int) -> Any:
    """vLLM's SamplingParams of one prompt."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VLLMSamplingParams

    return VLLMSamplingParams(
        n=params.n,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        seed=seed,
        logprobs=0,
        detokenize=bool(params.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
