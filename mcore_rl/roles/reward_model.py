"""The reward model: a frozen sequence classifier whose score is the reward."""

from __future__ import annotations

from mcore_rl.config import RunConfig
from mcore_rl.model.forward import Scorer
from mcore_rl.model.offload import frozen_weights
from mcore_rl.parallel.groups import Groups
from mcore_rl.roles.scorer import load_scorer


def reward_scorer(config: RunConfig, groups: Groups) -> Scorer | None:
    """The reward model, where the run has one."""
    if config.reward_model.path is None:
        return None
    chunks = load_scorer(config.reward_model.path, config, groups)
    return Scorer(chunks, groups, frozen_weights(chunks, groups.device) if config.reward_model.offload else None)
