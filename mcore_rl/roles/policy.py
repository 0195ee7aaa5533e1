"""The trained policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.nn import Module

from mcore_rl.config import RunConfig
from mcore_rl.model.build import build_model
from mcore_rl.model.forward import Policy, routers_of
from mcore_rl.model.optimizer import freeze_routers
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.weights.shards import megatron_shards
from mcore_rl.weights.stored import load_weights


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


def with_routers(policy: Policy, config: RunConfig) -> Policy:
    """The policy whose routes can be recorded and replayed, where the configuration asks for that."""
    if config.moe.routing_replay == "none" and not config.moe.watches and not config.moe.router_shift:
        return policy
    return replace(policy, routers=routers_of(policy.chunks, policy.groups))


def router_header(config: RunConfig, transformer: Any) -> str:
    """What happens to the routers in a run, in one line; "" for a dense model.

    Args:
        transformer: the Megatron configuration of the policy.
    """
    if transformer.num_moe_experts is None:
        return ""
    rate = transformer.moe_router_bias_update_rate if transformer.moe_router_enable_expert_bias else 0.0
    parts = (
        f"{transformer.num_moe_experts} experts, top-{transformer.moe_router_topk}",
        "router weights frozen" if config.model.freeze_router else "router weights trained",
        f"aux loss {transformer.moe_aux_loss_coeff:g}",
        f"z-loss {transformer.moe_z_loss_coeff or 0:g}",
        f"expert bias {'frozen' if rate == 0 else f'updated at rate {rate:g}'}",
        f"router in {transformer.moe_router_dtype}",
        f"output head in {'fp32' if config.model.fp32_head else config.model.dtype}",
        f"replay {config.moe.routing_replay}",
    )
    shift = f", tokens weighed by router shift above {config.moe.router_shift_floor:g}"
    return "routers: " + ", ".join(parts) + (shift if config.moe.router_shift else "")
