"""Configurations for clusters that no test can start: each is checked as far as that goes without the machines."""

from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from mcore_rl import algorithms
from mcore_rl.config import load_config
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.lint import lint
from tools.bench.models import QWEN3_30B

FOLDER = Path(__file__).parents[2] / "examples" / "qwen3_30b_a3b"
MODEL = Qwen3MoeConfig(**QWEN3_30B)
# an optimizer and a critic double what a rank holds
RANKS = {"ppo": 32, "gapo": 32}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_configuration_for_a_cluster(path):
    config = load_config(path)
    assert config.name == f"qwen3_30b_a3b/{path.stem}" and config.algorithm.name == path.stem
    algorithm = algorithms.load(config.algorithm.name, **config.algorithm.fields)
    assert not [str(f) for f in lint(config, algorithm) if f.level == "error"]
    layout = ParallelLayout.from_config(config.parallel, RANKS.get(path.stem, 16))
    layout.validate_model(MODEL)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    assert longest <= config.batch.micro_batch_tokens, "a micro-batch holds the longest sequence"
    assert longest <= 32_768, "the base model has as many positions"
    samples = config.batch.prompts_per_step * (config.rollout.group_size if algorithm.needs_rollouts else 1)
    assert samples // config.batch.mini_batches >= layout.dp, "every rank has a sequence of every mini-batch"


def test_every_algorithm_has_one():
    known = set(algorithms.available()) - {"cispo"}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == known
