"""The discriminator: whether a response is real or generated, a reward that moves (GAPO)."""

from __future__ import annotations

from mcore_rl.config import RunConfig
from mcore_rl.model.optimizer import Training, build_training
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.roles.scorer import load_scorer, scorer_config
from mcore_rl.weights.sync import WeightExporter, export_hf


def discriminator_training(config: RunConfig, groups: Groups) -> Training:
    """The discriminator with its optimizer. Its learning rate is constant: how many updates it takes is not known."""
    chunks = load_scorer(config.discriminator.path or config.model.path, config, groups)
    changes = {"lr": config.discriminator.lr, "min_lr": 0.0, "schedule": "constant", "warmup_steps": 0}
    return build_training(chunks, config.optimizer.model_copy(update=changes), config.parallel, total_steps=1)


def export_discriminator(config: RunConfig, training: Training, groups: Groups) -> None:
    """Leave it as a HF folder, a sequence classifier that `reward_model.path` takes; collective."""
    path, out = config.discriminator.path or config.model.path, config.run_dir / "hf_discriminator"
    hf_config = scorer_config(path)
    export_hf(WeightExporter([chunk.module for chunk in training.chunks], hf_config, groups), out, path)
    hf_config.dtype = config.model.dtype
    on_rank_0(groups, lambda: hf_config.save_pretrained(out))  # a policy's folder describes a policy
