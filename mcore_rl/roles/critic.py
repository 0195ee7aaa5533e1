"""The critic: what a state is worth, learned from returns (PPO)."""

from __future__ import annotations

from mcore_rl.config import RunConfig
from mcore_rl.model.optimizer import Training, build_training
from mcore_rl.parallel.groups import Groups
from mcore_rl.roles.scorer import load_scorer


def critic_training(config: RunConfig, groups: Groups, total_updates: int) -> Training:
    """The critic with its optimizer: the policy's, but for the learning rate."""
    chunks = load_scorer(config.critic.path or config.model.path, config, groups)
    optimizer = config.optimizer.model_copy(update={"lr": config.critic.lr})
    return build_training(chunks, optimizer, config.parallel, total_updates)
