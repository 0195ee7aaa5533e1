"""What is said of a run on GPUs before it starts: the memory of every kind of rank, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.memory import GIB

When = Literal["always", "scoring", "passes", "step", "rollout"]  # passes: forward and backward; step: the optimizer's


@dataclass(frozen=True)
class Hardware:
    gpus_per_node: int = 8
    gpu_memory_gb: float = 80.0  # of 2**30 bytes

    @property
    def gpu_bytes(self) -> float:
        return self.gpu_memory_gb * GIB


@dataclass(frozen=True)
class Models:
    """What a run is about: its algorithm and the HF configs of the models that it needs."""

    algorithm: Algorithm
    policy: Any
    shape: Any  # the policy as Megatron's TransformerConfig
    scorers: Mapping[str, Any]  # trained beside the policy, by role: "critic", "discriminator"
    frozen: Mapping[str, Any]  # only read, by role: "reference", "reward model"
    parameters: int  # of the policy
    active_parameters: int


@dataclass(frozen=True)
class Use:
    """Bytes of one kind on one rank's GPU."""

    role: str  # policy, critic, discriminator, reference, reward model, engine, other
    what: str
    bytes: int
    when: When = "always"


@dataclass(frozen=True)
class Place:
    """Ranks whose GPUs hold the same."""

    name: str
    ranks: range
    parameters: Mapping[str, int]  # by role
    uses: tuple[Use, ...]

    def peak_bytes(self, engine_sleeps: bool) -> int:
        """An engine that sleeps while the trainer works leaves its memory: only the larger of the two phases counts."""
        by_phase = {when: sum(u.bytes for u in self.uses if u.when == when) for when in get_args(When)}
        training = max(by_phase[when] for when in ("scoring", "passes", "step"))
        rollout = by_phase["rollout"]
        return by_phase["always"] + (max(training, rollout) if engine_sleeps else training + rollout)


@dataclass(frozen=True)
class Engine:
    """One vLLM engine: where it is and what it has room for, on each of its GPUs."""

    placement: str
    gpus: int
    weights: int  # bytes
    kv_cache: int  # bytes; negative where the weights alone are too large
    token_bytes: int  # of one position in the cache
    max_model_len: int

    @property
    def sequences(self) -> int:
        """Of the longest kind that fit the cache at once."""
        return max(0, self.kv_cache) // (self.token_bytes * self.max_model_len)


@dataclass(frozen=True)
class Schedule:
    """The pipeline's work in one mini-batch, were every response as long as it may be."""

    micro_batches: int  # of one rank
    positions: int  # of one micro-batch
    bubble: float  # share of the time in which a stage waits


@dataclass(frozen=True)
class Estimate:
    config: RunConfig
    layout: ParallelLayout
    hardware: Hardware
    models: Models
    schedule: Schedule
    places: tuple[Place, ...]
    engine: Engine | None  # a run that samples nothing has none
    host_bytes: Mapping[str, int]  # of the first node's main memory
    prompt_tokens: int

    @property
    def problems(self) -> list[str]:
        """Why it does not fit, one line each; empty where it does."""
        limit = self.hardware.gpu_bytes
        found = [
            f"{place.name}: {self.peak_bytes(place) / GIB:.1f} GB are needed, a GPU has {limit / GIB:g}"
            for place in self.places
            if self.peak_bytes(place) > limit
        ]
        if self.engine is not None and self.engine.sequences < 1:
            found.append(
                f"the engine's weights, {self.engine.weights / GIB:.1f} GB a GPU, leave no room for one sequence of "
                f"{self.engine.max_model_len} tokens in rollout.gpu_memory_utilization="
                f"{self.config.rollout.gpu_memory_utilization:g}"
            )
        return found

    @property
    def excess_bytes(self) -> float:
        """What the fullest trainer GPU and the engine lack together; 0 where everything fits."""
        lacks = max(self.peak_bytes(place) for place in self.places) - self.hardware.gpu_bytes
        engine = self.engine
        short = 0 if engine is None else engine.token_bytes * engine.max_model_len - engine.kv_cache
        return max(0, lacks) + max(0, short)

    def peak_bytes(self, place: Place) -> int:
        return place.peak_bytes(self.config.rollout.sleep)
