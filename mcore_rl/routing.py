"""Routing replay in training: which experts the policy's forward passes take, and the old log-probs under them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.cuda import is_available

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.model.forward import Policy, forward_only, forward_recorded, routers_of
from mcore_rl.parallel.layout import EXPERT_FIELDS
from mcore_rl.types import PackedBatch, PolicyOutput
from moe.flips import router_shift


def check_routing(config: RunConfig, algorithm: Algorithm, hf_config: Any) -> None:
    """Raises ValueError where a dense model is asked for routes, an algorithm without rollouts for replay, or an engine
    that cannot return routes for them."""
    mode, rollout = config.moe.routing_replay, config.rollout
    asked = {
        f"moe.routing_replay={mode!r}": mode != "none",
        f"moe.log_every={config.moe.log_every}": config.moe.log_every > 0,
        f"moe.record_every={config.moe.record_every}": config.moe.record_every > 0,
        "rollout.return_routes=true": rollout.return_routes,
        "moe.router_shift=true": config.moe.router_shift,
        "model.freeze_router=true": config.model.freeze_router,
    }
    if not any(getattr(hf_config, name, None) for name in EXPERT_FIELDS):
        if settings := ", ".join(setting for setting, is_set in asked.items() if is_set):
            raise ValueError(f"{settings}: {hf_config.model_type} has no experts; drop it")
    if mode != "none" and not algorithm.needs_rollouts:
        raise ValueError(
            f"moe.routing_replay={mode!r}: algorithm.name={config.algorithm['name']!r} samples no rollouts, so no "
            "policy before the step whose routes could be taken again; set it to none"
        )
    if mode == "old" and algorithm.old_logprobs == "rollout":
        raise ValueError(
            "moe.routing_replay='old' takes the routes of the pass before the step, which algorithm.old_logprobs="
            "'rollout' leaves out; set routing_replay to 'rollout' or old_logprobs to 'trainer'"
        )
    if returns_routes(config) and rollout.partial:
        raise ValueError(
            "rollout.partial=true: where weights change in the middle of a response, the engine computes what it had "
            "said before again, and its routes are those of the new weights; set partial to false, or both "
            "moe.routing_replay=rollout and rollout.return_routes off"
        )
    if config.moe.router_shift and (not algorithm.needs_rollouts or algorithm.old_logprobs == "rollout"):
        raise ValueError(
            f"moe.router_shift=true: under algorithm.name={config.algorithm['name']!r} and its old_logprobs no pass of "
            "the policy before the step is made to compare its routers with; set it to false"
        )
    one_worker = rollout.tensor_parallel_size == 1 or rollout.placement == "server" or is_available()
    if returns_routes(config) and not one_worker:
        raise ValueError(
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size}: on a CPU vLLM returns routes from engines "
            "of one worker only, which moe.routing_replay=rollout and rollout.return_routes need; set it to 1"
        )


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


def returns_routes(config: RunConfig) -> bool:
    """Whether the rollout engine must say which experts it used."""
    return config.rollout.return_routes or config.moe.routing_replay == "rollout"


def with_routers(policy: Policy, config: RunConfig) -> Policy:
    """The policy whose routes can be recorded and replayed, where the configuration asks for that."""
    if config.moe.routing_replay == "none" and not config.moe.watches and not config.moe.router_shift:
        return policy
    return replace(policy, routers=routers_of(policy.chunks, policy.groups))


def score_policy(
    policy: Policy, batches: list[PackedBatch], mode: str, follow: bool = False
) -> tuple[list[PackedBatch], list[PolicyOutput]]:
    """What the policy says before its step, and the batches with the routes that every pass of the step takes.

    Under "old" (R2 of arXiv:2512.01374) this pass chooses them, so at unchanged weights each ratio is exactly 1; under
    "rollout" (R3, arXiv:2510.11370) they are the engine's, in this pass too.

    Args:
        follow: the batches also get this pass's experts with their router log-probs, for `router_weighted`.
    """
    batches = with_rollout_routes(batches, mode)
    if mode != "old" and not follow:
        return batches, forward_only(policy, batches)
    outputs, recorded = forward_recorded(policy, batches, statistics=follow)
    pairs = list(zip(batches, recorded, strict=True))
    if follow:
        pairs = [(replace(b, shift_ids=r.expert_ids, shift_logprobs=r.log_p), r) for b, r in pairs]
    return [replace(b, expert_ids=r.expert_ids) if mode == "old" else b for b, r in pairs], outputs


def with_rollout_routes(batches: list[PackedBatch], mode: str) -> list[PackedBatch]:
    """The batches whose passes take the rollout engine's routes, where `mode` is "rollout"."""
    return [replace(b, expert_ids=b.rollout_expert_ids) for b in batches] if mode == "rollout" else batches


def router_weighted(policy: Policy, batches: list[PackedBatch], floor: float) -> list[PackedBatch]:
    """The batches with RSPO's weight of every token at the policy's weights now; one more forward pass.

    A token whose routers have moved so far that gamma (`moe.flips.router_shift`) is below `floor` weighs 0. Nothing is
    differentiated through it.
    """
    _, recorded = forward_recorded(policy, batches, statistics=True)
    found = []
    for batch, now in zip(batches, recorded, strict=True):
        gamma = router_shift(batch.shift_logprobs, now.log_p)
        found.append(replace(batch, router_weights=torch.where(gamma < floor, 0.0, gamma)))
    return found
