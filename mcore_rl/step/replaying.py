"""RSPO's weights: how far the routers of a token have moved since before the step."""

from __future__ import annotations

from dataclasses import replace

import torch

from mcore_rl.model.forward import Policy, forward_recorded
from mcore_rl.types import WeightedBatch
from moe.measure.flips import router_shift


def router_weighted(policy: Policy, batches: list[WeightedBatch], floor: float) -> list[WeightedBatch]:
    """The batches with RSPO's weight of every token at the policy's weights now; one more forward pass.

    A token whose routers have moved so far that gamma (`moe.measure.flips.router_shift`) is below `floor` weighs 0.
    Nothing is differentiated through it.
    """
    _, recorded = forward_recorded(policy, batches, statistics=True)
    found = []
    for batch, now in zip(batches, recorded, strict=True):
        gamma = router_shift(batch.observed_logprobs, now.log_p)
        found.append(replace(batch, router_weights=torch.where(gamma < floor, 0.0, gamma)))
    return found
