"""Shared fixtures. The environment is set before torch is imported: test processes must not fight for cores."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import save_tiny_hf  # noqa: E402


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
    """vLLM inside the test process, with routes, on the first of `rollout_dirs`; weights are put back after a test."""
    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.rollout.vllm.engine import open_engine

    rollout = RolloutConfig(placement="in_process", kv_cache_gb=0.1, max_model_len=200)
    engine = open_engine(
        rollout,
        WeightSyncConfig(backend="shm"),
        model_path=str(rollout_dirs[0]),
        model_dtype="float32",
        max_prompt_tokens=100,
        world_size=1,
        seed=0,
        return_routes=True,
    )
    yield engine
    engine.close()


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
