"""Which ranks form which process groups, and which of them reach over the border of a node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mcore_rl.parallel.layout import ParallelLayout

DENSE, EXPERT = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")
TRAFFIC = {
    "tp": "activations, twice a layer",
    "cp": "keys and values, every layer",
    "ep": "tokens of experts, twice a layer",
    "etp": "tokens of experts, twice a layer",
    "pp": "activations between stages",
    "dp": "gradients, once an update",
    "edp": "gradients of experts, once an update",
}
_BUSY = ("tp", "cp", "ep", "etp")


@dataclass(frozen=True)
class AxisGroups:
    """The process groups of one parallel axis."""

    axis: str
    groups: tuple[tuple[int, ...], ...]  # ranks
    crossing: int  # groups with ranks on more than one node

    @property
    def size(self) -> int:
        return len(self.groups[0])

    @property
    def is_slow(self) -> bool:
        """Whether traffic of every layer leaves the node."""
        return self.crossing > 0 and self.axis in _BUSY


def group_grid(layout: ParallelLayout, gpus_per_node: int) -> list[AxisGroups]:
    """The groups of every axis with more than one rank; ranks fill one node after the other."""
    found = []
    for axis in TRAFFIC:
        axes = DENSE if axis in DENSE else EXPERT
        members: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for rank in range(layout.world_size):
            at = layout.coords(rank)
            members[tuple(getattr(at, other) for other in axes if other != axis)].append(rank)
        groups = tuple(tuple(ranks) for ranks in members.values())
        crossing = sum(len({rank // gpus_per_node for rank in ranks}) > 1 for ranks in groups)
        if len(groups[0]) > 1:
            found.append(AxisGroups(axis, groups, crossing))
    return found


def spell(ranks: Sequence[int]) -> str:
    """Ranks in few characters.

    Example:
        >>> spell([0, 1, 2, 3]), spell([0, 4, 8, 12]), spell([5])
        ('0-3', '0-12 by 4', '5')
    """
    if len(ranks) == 1:
        return str(ranks[0])
    steps = {b - a for a, b in zip(ranks, ranks[1:])}
    if len(ranks) == 2 and steps != {1} or len(steps) > 1:
        return ",".join(map(str, ranks)) if len(ranks) <= 8 else f"{','.join(map(str, ranks[:4]))},..,{ranks[-1]}"
    return f"{ranks[0]}-{ranks[-1]}" + (f" by {step}" if (step := steps.pop()) > 1 else "")
