"""Routing replay: which experts the policy's forward passes take, and the old log-probs under them."""

from __future__ import annotations

from dataclasses import replace

import torch

from mcore_rl.model.forward import Policy, forward_only, forward_recorded
from mcore_rl.types import PackedBatch, PolicyOutput
from moe.measure.flips import router_shift


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

    A token whose routers have moved so far that gamma (`moe.measure.flips.router_shift`) is below `floor` weighs 0.
    Nothing is differentiated through it.
    """
    _, recorded = forward_recorded(policy, batches, statistics=True)
    found = []
    for batch, now in zip(batches, recorded, strict=True):
        gamma = router_shift(batch.shift_logprobs, now.log_p)
        found.append(replace(batch, router_weights=torch.where(gamma < floor, 0.0, gamma)))
    return found
