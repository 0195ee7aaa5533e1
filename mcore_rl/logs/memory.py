"""What a trainer rank holds: parameters by role, and the most memory it has used."""

from __future__ import annotations

import resource

import torch

from mcore_rl.model.forward import Policy, Scorer
from mcore_rl.parallel.collectives import max_over_ranks
from mcore_rl.parallel.groups import Groups
from mcore_rl.roles.models import Models


def held_parameters(groups: Groups, models: Models) -> dict[str, float]:
    """{"memory/<role>_parameters": number on the rank that holds most} of every model of the run."""
    roles = ("policy", "reference", "critic", "discriminator", "reward_model")
    return {
        f"memory/{role}_parameters": max_over_ranks(groups, float(count_parameters(model.chunks)))
        for role in roles
        if isinstance(model := getattr(models, role), (Policy, Scorer))
    }


def count_parameters(chunks) -> int:
    """Of this rank's model chunks."""
    return sum(p.numel() for chunk in chunks for p in chunk.parameters())


def peak_gb(groups: Groups) -> float:
    """GB (10^9 bytes) of the rank that has used most since it started: tensors on its GPU, or the process on a CPU.

    On a CPU that is everything: the libraries' code, and with one rank vLLM, which then lives in the same process.
    """
    if groups.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(groups.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return max_over_ranks(groups, peak / 1e9)
