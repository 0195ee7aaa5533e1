"""How ranks are laid out over tensor, context, expert, data and pipeline parallelism: integers only.

Megatron's order is tp-cp-ep-dp-pp, fastest first. Dense layers see the ranks of one pipeline stage as a grid
dp x cp x tp, expert layers see the same ranks as edp x ep x etp:

    rank = ((pp * DP  + dp)  * CP + cp) * TP  + tp
         = ((pp * EDP + edp) * EP + ep) * ETP + etp
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_rl.config import LayoutConfig


@dataclass(frozen=True)
class RankCoords:
    """Position of one rank along each axis; `edp` is data parallelism among the copies of an expert."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    edp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes.

    Raises:
        ValueError: a size below 1, vpp without pp, or expert axes that do not divide a pipeline stage.

    Example:
        >>> ParallelLayout(tp=2, ep=2, dp=2).world_size
        4
        >>> ParallelLayout(tp=2, ep=2, dp=2).coords(3)
        RankCoords(tp=1, cp=0, dp=1, pp=0, ep=1, etp=0, edp=1)
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"parallel.{name}={size!r} must be a whole number of at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp={self.vpp} needs pipeline stages; set parallel.pp>1 or parallel.vpp=1")
        if self.stage_size % (self.ep * self.etp):
            raise ValueError(
                f"parallel.ep*etp={self.ep}*{self.etp} must divide the ranks of one pipeline stage, tp*cp*dp="
                f"{self.tp}*{self.cp}*{self.dp}={self.stage_size}; choose ep*etp from {_divisors(self.stage_size)} "
                "or start more ranks"
            )

    @classmethod
    def from_config(cls, parallel: LayoutConfig, world_size: int) -> ParallelLayout:
        """Derive dp from the number of ranks. Raises ValueError where the world does not fit, with sizes that do."""
        model_size = parallel.tp * parallel.pp * parallel.cp
        if world_size % model_size:
            raise ValueError(
                f"{world_size} ranks cannot hold parallel.tp*pp*cp={parallel.tp}*{parallel.pp}*{parallel.cp}="
                f"{model_size}; start a multiple of {model_size} (torchrun --nproc-per-node {model_size}) or lower "
                "tp, pp or cp"
            )
        axes = {name: getattr(parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
        return cls(**axes, dp=world_size // model_size)

    @property
    def world_size(self) -> int:
        return self.stage_size * self.pp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Copies of every expert."""
        return self.stage_size // (self.ep * self.etp)

    @property
    def megatron_sizes(self) -> dict[str, int | None]:
        """The axes in the words that Megatron has for them, in its configuration and in its groups."""
        return dict(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp if self.vpp > 1 else None,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )

    @property
    def segment_multiple(self) -> int:
        """Sequences of a packed batch are as long as a multiple of this: context ranks hold two chunks of each."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def batch_multiple(self) -> int:
        """Packed batches are as long as a multiple of this: sequence parallelism cuts a context rank's share again."""
        return math.lcm(self.segment_multiple, self.cp * self.tp)

    def reports(self, rank: int) -> bool:
        """Whether a rank is the one of those that share micro-batches whose results count."""
        at = self.coords(rank)
        return at.pp == self.pp - 1 and at.tp == 0 and at.cp == 0

    @property
    def reporters(self) -> list[int]:
        """The data-parallel rank of each rank that reports, in the order of the ranks."""
        return [self.coords(rank).dp for rank in range(self.world_size) if self.reports(rank)]

    def coords(self, rank: int) -> RankCoords:
        """Position of a global rank. Raises ValueError outside 0..world_size-1."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0..{self.world_size - 1}, the ranks of {self}")
        pp, place = divmod(rank, self.stage_size)
        rest, tp = divmod(place, self.tp)
        dp, cp = divmod(rest, self.cp)
        rest, etp = divmod(place, self.etp)
        edp, ep = divmod(rest, self.ep)
        return RankCoords(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp, edp=edp)

    def validate_model(self, hf_config: Any) -> None:
        """Check that the model of a HF config can be cut this way. Raises ValueError listing every mistake and fix."""
        expert_field = next((f for f in EXPERT_FIELDS if getattr(hf_config, f, None)), None)
        mistakes = [
            _indivisible("tp", self.tp, "num_attention_heads", hf_config.num_attention_heads),
            self._key_value_heads(hf_config),
            _too_many_chunks(self.pp * self.vpp, hf_config.num_hidden_layers),
        ]
        # Without a width of their own, experts have the one field; a model has no dense layers then.
        expert_width = next((f for f in ("moe_intermediate_size", "intermediate_size") if hasattr(hf_config, f)), "")
        if not expert_field or expert_width == "moe_intermediate_size":
            mistakes.append(_indivisible("tp", self.tp, "intermediate_size", hf_config.intermediate_size))
        if shared := getattr(hf_config, "shared_expert_intermediate_size", None):
            mistakes.append(_indivisible("tp", self.tp, "shared_expert_intermediate_size", shared))
        if expert_field:
            mistakes += [
                _indivisible("ep", self.ep, expert_field, getattr(hf_config, expert_field)),
                _indivisible("etp", self.etp, expert_width, getattr(hf_config, expert_width)),
            ]
        elif self.ep * self.etp > 1:
            mistakes.append(
                f"parallel.ep={self.ep}, parallel.etp={self.etp} shard experts, but {hf_config.model_type} is a dense "
                "model; set parallel.ep=1 parallel.etp=1"
            )
        if lines := [f"  - {mistake}" for mistake in mistakes if mistake]:
            raise ValueError("the model does not fit the parallel layout:\n" + "\n".join(lines))

    def _key_value_heads(self, hf_config: Any) -> str | None:
        """More ranks than heads share a head: each computes it whole (attention.py:1398 of Megatron-Core 0.16.1)."""
        groups = hf_config.num_key_value_heads
        if self.tp % groups == 0 and hf_config.model_type != "olmoe":  # its norm of all keys is split with the heads
            return None
        return _indivisible("tp", self.tp, "num_key_value_heads", groups)

    def table(self) -> str:
        """All ranks, one line each, under one line of sizes; for --dry-run."""
        columns = ("rank", "pp", "dp", "cp", "tp", "edp", "ep", "etp")
        sizes = ("of", self.pp, self.dp, self.cp, self.tp, self.edp, self.ep, self.etp)
        coords = [(rank, self.coords(rank)) for rank in range(self.world_size)]
        rows = [columns, sizes, *((rank, *(getattr(c, name) for name in columns[1:])) for rank, c in coords)]
        lines = ["".join(f"{value!s:>6}" for value in row) for row in rows]
        return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


# what the architectures of transformers call their number of experts
EXPERT_FIELDS = ("num_experts", "n_routed_experts", "num_local_experts")


def _indivisible(axis: str, size: int, field: str, count: int) -> str | None:
    if count % size == 0:
        return None
    return f"parallel.{axis}={size} must divide the model's {field}={count}; {axis} can be {_divisors(count)}"


def _too_many_chunks(chunks: int, layers: int) -> str | None:
    if chunks <= layers:
        return None
    return f"parallel.pp*vpp={chunks} is more than the model's num_hidden_layers={layers}; lower pp or vpp"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 1024) + 1) if number % n == 0)
