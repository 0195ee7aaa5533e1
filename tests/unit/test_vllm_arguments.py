"""What vLLM cannot compute on a CPU is refused before an engine starts."""

from types import SimpleNamespace

import pytest

from mcore_rl.rollout.vllm.arguments import check_attention_on_cpu


def test_heads_and_latent_attention_without_a_kernel_are_refused():
    plain = dict(model_type="qwen3", hidden_size=64, num_attention_heads=2)
    check_attention_on_cpu(SimpleNamespace(**plain), "float32")
    check_attention_on_cpu(SimpleNamespace(**plain, head_dim=64), "float32")
    with pytest.raises(ValueError, match="no attention kernel for heads of 16, .*'qwen3' has; .* 32, 64, 80"):
        check_attention_on_cpu(SimpleNamespace(**plain, head_dim=16), "float32")
    latent = plain | dict(model_type="deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64)
    check_attention_on_cpu(SimpleNamespace(**latent), "bfloat16")
    with pytest.raises(ValueError, match="the engine is to be float32. Set rollout.dtype=bfloat16"):
        check_attention_on_cpu(SimpleNamespace(**latent), "float32")
    with pytest.raises(ValueError, match="'deepseek_v3' has 20 and 64"):
        check_attention_on_cpu(SimpleNamespace(**latent | dict(kv_lora_rank=20)), "bfloat16")
