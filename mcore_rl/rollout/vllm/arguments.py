"""Our configuration in vLLM's words. vLLM is imported late: its environment must be set before."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from mcore_rl.config import RolloutConfig
from mcore_rl.types import SamplingParams
from mcore_rl.weights.stored import find_megatron

WORKER_EXTENSION = "mcore_rl.rollout.transfer.worker_extension.WorkerExtension"
MAX_BATCHED_TOKENS = 8192
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # v1/attention/backends/cpu_attn.py:70
CPU_LATENT_SIZE = (512, 64)  # v1/attention/backends/mla/cpu_mla.py:62


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
    """vLLM's EngineArgs for one of our engines.

    Raises:
        ValueError: vLLM cannot compute this model on a CPU; without CUDA only.
    """
    if not torch.cuda.is_available():
        check_attention_on_cpu(AutoConfig.from_pretrained(model_path), dtype)
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


def check_attention_on_cpu(config: Any, dtype: str) -> None:
    """Raises ValueError where vLLM 0.32 has no attention kernel for the model on a CPU: it fails at the first token.

    Args:
        config: of the HF model.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        size = (config.kv_lora_rank, config.qk_rope_head_dim)
        if size != CPU_LATENT_SIZE or dtype != "bfloat16":
            raise ValueError(
                f"vLLM on a CPU computes multi-latent attention in bfloat16 with kv_lora_rank={CPU_LATENT_SIZE[0]} and "
                f"qk_rope_head_dim={CPU_LATENT_SIZE[1]} only; the model {config.model_type!r} has {size[0]} and "
                f"{size[1]}, the engine is to be {dtype}. Set rollout.dtype=bfloat16, or use a GPU"
            )
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim not in CPU_HEAD_DIMS:
        raise ValueError(
            f"vLLM on a CPU has no attention kernel for heads of {head_dim}, as the model {config.model_type!r} has; "
            f"it has them for {', '.join(map(str, CPU_HEAD_DIMS))}"
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
        flat_logprobs=True,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        seed=seed,
        logprobs=0,
        detokenize=bool(params.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
