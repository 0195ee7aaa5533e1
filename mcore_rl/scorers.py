"""Models with a score head, by their role: reward model, critic, discriminator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.nn import Module
from transformers import AutoTokenizer, PretrainedConfig

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Scorer
from mcore_rl.model.heads import as_scorer
from mcore_rl.model.offload import frozen_weights
from mcore_rl.model.optimizer import Training, build_training
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.rollout.engine import TOKENIZER_FILES
from mcore_rl.weights.families import SCORE, is_scorer
from mcore_rl.weights.shards import megatron_shards
from mcore_rl.weights.stored import check_weights, load_weights
from mcore_rl.weights.sync import WeightExporter, export_hf


def check_scorer(
    key: str, path: str, layout: ParallelLayout, tokenizer: Any, *, positions: int, has_head: bool = False
) -> PretrainedConfig:
    """Check the folder of a model that scores what the policy writes.

    Args:
        key: of the configuration, for the messages. tokenizer: the policy's.
        positions: longest sequence it will read.
        has_head: a policy's folder will not do, as a new head says nothing.

    Raises:
        ValueError: no supported model, no sequence classifier or not of one score, another tokenizer, too few tokens or
            positions, or a layout that does not divide it.
    """
    hf_config = read_hf_config(path, key)
    if has_head and not is_scorer(hf_config):
        raise ValueError(
            f"{key}={path!r} is a {hf_config.architectures[0]}, which has no score head; a reward needs one that was "
            "trained: a ...ForSequenceClassification with one label"
        )
    if is_scorer(hf_config) and hf_config.num_labels != 1:
        raise ValueError(f"{key}={path!r} has num_labels={hf_config.num_labels}; a score is one number, num_labels=1")
    if hf_config.vocab_size < len(tokenizer):
        raise ValueError(f"{key}={path!r} knows {hf_config.vocab_size} tokens, the policy writes {len(tokenizer)}")
    if hf_config.max_position_embeddings < positions:
        raise ValueError(
            f"{key}={path!r} has {hf_config.max_position_embeddings} positions and prompts with their responses take "
            f"up to {positions}; lower data.max_prompt_tokens or rollout.max_response_tokens"
        )
    if any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        if AutoTokenizer.from_pretrained(path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{key}={path!r} has another tokenizer than the policy; it reads the policy's token ids")
    layout.validate_model(hf_config)
    check_weights(path, hf_config)
    return hf_config


def load_scorer(path: str, config: RunConfig, groups: Groups) -> list[Module]:
    """Chunks of the scorer in a HF folder; of a policy's folder, its backbone with a head of zeros."""
    hf_config = scorer_config(path)
    chunks = build_model(hf_config, config.model, groups)
    shards = megatron_shards(chunks, hf_config, groups)
    load_weights(path, shards if is_scorer(read_hf_config(path)) else [s for s in shards if s.hf_name != SCORE])
    return chunks


def reward_scorer(config: RunConfig, groups: Groups) -> Scorer | None:
    """The reward model, where the run has one."""
    if config.reward_model.path is None:
        return None
    chunks = load_scorer(config.reward_model.path, config, groups)
    return Scorer(chunks, groups, frozen_weights(chunks, groups.device) if config.reward_model.offload else None)


def scorer_config(path: str) -> PretrainedConfig:
    """Of the scorer that `load_scorer` makes of a folder."""
    on_disk = read_hf_config(path)
    return on_disk if is_scorer(on_disk) else as_scorer(on_disk)


def export_discriminator(config: RunConfig, training: Training, groups: Groups) -> None:
    """Leave it as a HF folder, a sequence classifier that `reward_model.path` takes; collective."""
    path, out = config.discriminator.path or config.model.path, config.run_dir / "hf_discriminator"
    hf_config = scorer_config(path)
    export_hf(WeightExporter([chunk.module for chunk in training.chunks], hf_config, groups), out, path)
    hf_config.dtype = config.model.dtype
    on_rank_0(groups, lambda: hf_config.save_pretrained(out))  # a policy's folder describes a policy


def critic_training(config: RunConfig, groups: Groups, total_updates: int) -> Training:
    """The critic with its optimizer: the policy's, but for the learning rate."""
    chunks = load_scorer(config.critic.path or config.model.path, config, groups)
    optimizer = config.optimizer.model_copy(update={"lr": config.critic.lr})
    return build_training(chunks, optimizer, config.parallel, total_updates)


def discriminator_training(config: RunConfig, groups: Groups) -> Training:
    """The discriminator with its optimizer. Its learning rate is constant: how many updates it takes is not known."""
    chunks = load_scorer(config.discriminator.path or config.model.path, config, groups)
    changes = {"lr": config.discriminator.lr, "min_lr": 0.0, "schedule": "constant", "warmup_steps": 0}
    return build_training(chunks, config.optimizer.model_copy(update=changes), config.parallel, total_steps=1)


def check_scorers(
    config: RunConfig, algorithm: Algorithm, layout: ParallelLayout, tokenizer: Any, positions: int
) -> None:
    """`check_scorer` of those that are read from folders of their own."""
    if config.reward_model.path is not None:
        key, path = "reward_model.path", config.reward_model.path
        check_scorer(key, path, layout, tokenizer, positions=positions, has_head=True)
    for role, section in (("critic", config.critic), ("discriminator", config.discriminator)):
        if role in algorithm.needs and section.path is not None:
            check_scorer(f"{role}.path", section.path, layout, tokenizer, positions=positions)
