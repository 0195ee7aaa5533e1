"""Policies by their role: the trained one, and the frozen reference, which may be cut another way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch.nn import Module
from transformers import PretrainedConfig

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.model.build import build_model
from mcore_rl.model.forward import Policy
from mcore_rl.model.offload import frozen_weights
from mcore_rl.model.optimizer import freeze_routers
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.shards import megatron_shards
from mcore_rl.weights.stored import check_weights, load_weights

if TYPE_CHECKING:
    from mcore_rl.run import Plan


def load_chunks(plan: Plan, groups: Groups, path: str) -> list[Module]:
    """Model chunks of the policy in a folder."""
    chunks = build_model(plan.hf_config, plan.config.model, groups)
    if plan.config.model.freeze_router:
        freeze_routers(chunks)
    load_weights(path, megatron_shards(chunks, plan.hf_config, groups))
    return chunks


def as_policy(plan: Plan, groups: Groups, chunks: list[Module]) -> Policy:
    """With what log-probs are read by."""
    return Policy(
        chunks,
        groups,
        vocab_size=plan.hf_config.vocab_size,
        temperature=plan.config.rollout.temperature if plan.algorithm.needs_rollouts else 1.0,
        chunk_tokens=plan.config.batch.logprob_chunk_tokens,
        fp32_head=plan.config.model.fp32_head,
    )


def precomputes_reference(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether all that the reference will be asked is known before training, see `mcore_rl.reference`."""
    return "pairs" in algorithm.needs and config.reference.precompute


def holds_reference(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether a reference model is there during the training."""
    return "reference" in algorithm.needs and not precomputes_reference(config, algorithm)


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


def following(config: RunConfig, reference: Policy | None) -> dict[str, Policy]:
    """The reference by its name where it follows the policy: what a checkpoint then has to hold."""
    return {"reference": reference} if reference is not None and config.reference.update_every else {}


def reference_layout(config: RunConfig, hf_config: PretrainedConfig, world: int) -> ParallelLayout:
    """Raises ValueError where it does not fit the ranks or the model."""
    own = config.reference.parallel
    try:
        layout = ParallelLayout.from_config(own or config.parallel, world)
        layout.validate_model(hf_config)
    except ValueError as error:
        raise ValueError(f"reference.parallel: {error}" if own else str(error)) from None
    return layout


def check_reference(config: RunConfig, algorithm: Algorithm, hf_config: PretrainedConfig, world: int) -> None:
    """Raises ValueError where what is said of the reference does not fit the model, the ranks or the algorithm."""
    own = config.reference
    if own.path is not None:
        if "reference" not in algorithm.needs:
            raise ValueError(
                f"reference.path={own.path!r} is never read: with algorithm.kl_coef=0 there is no reference"
            )
        check_weights(own.path, hf_config)
    if own.update_every and own.precompute and "pairs" in algorithm.needs:
        raise ValueError(
            f"reference.update_every={own.update_every} with reference.precompute=true: log-probs that are computed "
            "before training cannot follow the policy; set reference.precompute=false"
        )
    reference_layout(config, hf_config, world)
