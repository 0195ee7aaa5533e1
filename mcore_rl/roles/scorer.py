"""Models with a score head, which critics, reward models and discriminators are."""

from __future__ import annotations

from torch.nn import Module
from transformers import PretrainedConfig

from mcore_rl.config import RunConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.heads import as_scorer
from mcore_rl.parallel.groups import Groups
from mcore_rl.weights.families import SCORE, is_scorer
from mcore_rl.weights.shards import megatron_shards
from mcore_rl.weights.stored import load_weights


def load_scorer(path: str, config: RunConfig, groups: Groups) -> list[Module]:
    """Chunks of the scorer in a HF folder; of a policy's folder, its backbone with a head of zeros."""
    hf_config = scorer_config(path)
    chunks = build_model(hf_config, config.model, groups)
    shards = megatron_shards(chunks, hf_config, groups)
    load_weights(path, shards if is_scorer(read_hf_config(path)) else [s for s in shards if s.hf_name != SCORE])
    return chunks


def scorer_config(path: str) -> PretrainedConfig:
    """Of the scorer that `load_scorer` makes of a folder."""
    on_disk = read_hf_config(path)
    return on_disk if is_scorer(on_disk) else as_scorer(on_disk)
