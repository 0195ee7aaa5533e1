"""The frozen policy that the trained one is compared with, in a layout of its own; how it follows the trained one."""

from __future__ import annotations

from dataclasses import replace

from mcore_rl.config import RunConfig, due
from mcore_rl.model.forward import Policy
from mcore_rl.model.offload import frozen_weights, in_use
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan, reference_layout
from mcore_rl.roles.policy import as_policy, load_chunks
from mcore_rl.weights.reshard import reshard


def load_reference(plan: Plan, groups: Groups) -> Policy:
    """The frozen policy that KL terms and preference losses compare with, in its own layout and memory.

    Args:
        groups: of the trained policy.
    """
    config, parallel = plan.config, plan.config.parallel
    layout = reference_layout(config, plan.hf_config, groups.world_size)
    if layout != groups.layout:
        groups = process_groups.another(groups, layout, parallel.timeout_s)
    with groups.active():
        chunks = load_chunks(plan, groups, config.reference.path or config.model.path)
    host = frozen_weights(chunks, groups.device) if config.reference.offload else None
    return replace(as_policy(plan, groups, chunks), host=host)


def following(config: RunConfig, reference: object) -> dict[str, Policy]:
    """The reference by its name where it follows the policy: what a checkpoint then has to hold."""
    return {"reference": reference} if isinstance(reference, Policy) and config.reference.update_every else {}


def update_reference(plan: Plan, policy: Policy, reference: object, step: int) -> None:
    """Let the reference become the policy after `step` training steps, where that is due; collective."""
    if isinstance(reference, Policy) and due(plan.config.reference.update_every, step):
        with in_use(reference.host, change=True):
            reshard(plan.hf_config, policy, reference)
