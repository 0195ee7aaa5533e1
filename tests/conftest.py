"""Shared fixtures. The environment is set before torch is imported: test processes must not fight for cores."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

# 97 is a multiple of no tensor-parallel size: padded vocabularies are always exercised.
DENSE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    tie_word_embeddings=False,
)
MOE = DENSE | dict(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)


def save_tiny_hf(folder: Path, moe: bool = True, seed: int = 0, **overrides) -> Path:
    """Write a small Qwen3 or Qwen3-MoE checkpoint in fp32 into `folder`.

    A fresh HF model has only ones in its norms, and so small a router that its softmax is flat: neither a swapped norm
    nor a wrong normalisation would show. All weights are drawn so that such mistakes change the logits.
    """
    config = Qwen3MoeConfig(**MOE | overrides) if moe else Qwen3Config(**DENSE | overrides)
    torch.manual_seed(seed)
    model = (Qwen3MoeForCausalLM if moe else Qwen3ForCausalLM)(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                weight.normal_(std=0.2)
            else:
                weight.mul_(2)
    model.save_pretrained(folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    # pytest resets the filters that mcore_rl.parallel.device sets for Megatron's optional packages.
    config.addinivalue_line("filterwarnings", "ignore:(Transformer Engine and )?Apex (is|are) not installed")


@pytest.fixture(scope="session")
def tiny_moe_dir(tmp_path_factory) -> Path:
    return save_tiny_hf(tmp_path_factory.mktemp("tiny_moe"))


@pytest.fixture(scope="session")
def tiny_dense_dir(tmp_path_factory) -> Path:
    return save_tiny_hf(tmp_path_factory.mktemp("tiny_dense"), moe=False)


@pytest.fixture(scope="session")
def tiny_tied_dir(tmp_path_factory) -> Path:
    """Dense, output matrix tied to the embedding."""
    return save_tiny_hf(tmp_path_factory.mktemp("tiny_tied"), moe=False, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def rollout_dirs(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints of one MoE architecture with different weights; the first has a tokenizer."""
    from rollout_reference import save_character_tokenizer

    first, second = (
        save_tiny_hf(tmp_path_factory.mktemp(f"rollout_{seed}"), seed=seed, moe_intermediate_size=64) for seed in (0, 1)
    )
    save_character_tokenizer(first)
    return first, second


@pytest.fixture(scope="session")
def rollout_engine(rollout_dirs):
    """vLLM inside the test process, on the first of `rollout_dirs`; a test that changes its weights puts them back."""
    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.rollout.vllm_engine import open_engine

    rollout = RolloutConfig(placement="in_process", kv_cache_gb=0.1, max_model_len=200)
    engine = open_engine(
        rollout,
        WeightSyncConfig(backend="shm"),
        model_path=str(rollout_dirs[0]),
        model_dtype="float32",
        max_prompt_tokens=100,
        world_size=1,
        seed=0,
    )
    yield engine
    engine.close()


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
