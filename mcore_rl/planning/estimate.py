"""Memory of every kind of rank of a run on GPUs, and whether it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.memory import (
    GIB,
    ModelState,
    activations,
    cache_bytes,
    frozen_state,
    is_sparse,
    itemsize,
    trained_state,
)
from mcore_rl.planning.plan import reference_layout, samples_anything

# Assumptions, in bytes, that no formula gives.
RESERVE = 4 * GIB  # CUDA context, NCCL's buffers, the allocator's fragmentation
ENGINE_WORKSPACE = 3 * GIB // 2  # vLLM's own activations and CUDA graphs
TRANSFER_BUFFERS = {"nccl": 2 * GIB, "ipc": GIB, "shm": 0, "gloo": 0}  # on rank 0, vLLM's defaults
GATHER_BUCKET = GIB // 8  # mcore_rl/weights/sync.py
ASSUMED_PROMPT_TOKENS = 1024

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


def estimate(
    config: RunConfig, layout: ParallelLayout, models: Models, hardware: Hardware, placement: str, backend: str
) -> Estimate:
    """Plan a run on GPUs.

    Args:
        placement, backend: of the engine and its weight transfer, as `rollout.placement.resolve` gives them.

    Raises:
        ValueError: a tensor of the model cannot be cut as the layout asks.
    """
    room = models.policy.max_position_embeddings - config.rollout.max_response_tokens
    prompt_tokens = max(1, min(config.data.max_prompt_tokens or ASSUMED_PROMPT_TOKENS, room))
    length = prompt_tokens + config.rollout.max_response_tokens
    schedule = _schedule(config, layout, models.algorithm, length)
    samples = samples_anything(config, models.algorithm)
    engine = _engine(config, models, length, hardware, placement) if samples else None
    places = []
    for stage in range(layout.pp):
        parameters, uses = _trainer(config, layout, models, stage, schedule)
        ranks = range(stage * layout.stage_size, (stage + 1) * layout.stage_size)
        # The engine's child takes the first GPUs; rank 0 has the buffers of the transfer wherever the engine is.
        first = engine is not None and stage == 0
        hosts = min(max(engine.gpus, TRANSFER_BUFFERS[backend] > 0), len(ranks)) if first else 0
        if hosts:
            beside = tuple(_beside_the_engine(engine, backend))
            places.append(Place(_name(layout, ranks[:hosts]), ranks[:hosts], parameters, uses + beside))
        if ranks[hosts:]:
            places.append(Place(_name(layout, ranks[hosts:]), ranks[hosts:], parameters, uses))
    host = _offloaded(places, hardware.gpus_per_node)
    host |= dict(_host(config, models, engine, backend, length)) if engine is not None else {}
    return Estimate(config, layout, hardware, models, schedule, tuple(places), engine, host, prompt_tokens)


def _name(layout: ParallelLayout, ranks: range) -> str:
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
    return f"{who}, stage {ranks[0] // layout.stage_size}" if layout.pp > 1 else who


def _schedule(config: RunConfig, layout: ParallelLayout, algorithm: Algorithm, length: int) -> Schedule:
    batch = config.batch
    responses = config.rollout.group_size if algorithm.needs_rollouts else 2 if "pairs" in algorithm.needs else 1
    samples = max(1, batch.prompts_per_step * responses // batch.mini_batches)
    limit = max(batch.micro_batch_tokens, length)
    micro_batches = max(1, -(-samples // (max(1, limit // length) * layout.dp)))
    if layout.vpp > 1:
        micro_batches = -(-micro_batches // layout.pp) * layout.pp
    waits = layout.pp - 1
    positions = min(limit, -(-samples // (micro_batches * layout.dp)) * length)
    return Schedule(micro_batches, positions, waits / (layout.vpp * micro_batches + waits))


def _trainer(
    config: RunConfig, layout: ParallelLayout, models: Models, stage: int, schedule: Schedule
) -> tuple[dict[str, int], tuple[Use, ...]]:
    """(parameters by role, uses) of every rank of a stage, wherever the engine is."""
    parameters, uses = {}, []
    for role, hf in {"policy": models.policy, **models.scorers}.items():
        state = trained_state(hf, layout, stage, config.model, config.optimizer, config.parallel)
        parameters[role] = state.parameters
        uses += [Use(role, what, getattr(state, what)) for what in ("weights", "gradients")]
        uses.append(Use(role, "optimizer", state.optimizer, "step" if config.optimizer.offload else "always"))
    for role, hf in models.frozen.items():
        state = _frozen(config, layout, role, hf, stage)
        parameters[role] = state.parameters
        offload = {"reference": config.reference, "reward model": config.reward_model}[role].offload
        uses.append(Use(role, "weights", state.weights, "scoring" if offload else "always"))
    of_micro_batch = activations(
        models.shape,
        layout,
        stage,
        config.model,
        schedule.positions,
        config.batch.logprob_chunk_tokens,
        models.policy.vocab_size,
    )
    kept = of_micro_batch.kept * _in_flight(layout, stage, schedule.micro_batches)
    uses.append(Use("policy", "activations", kept + of_micro_batch.working, "passes"))
    if of_micro_batch.logits:
        uses.append(Use("policy", "logits", of_micro_batch.logits, "passes"))
    uses.append(Use("other", "reserve", RESERVE))
    if layout.world_size > 1:
        uses.append(Use("other", "weight transfer", GATHER_BUCKET, "rollout"))
    return parameters, tuple(uses)


def _frozen(config: RunConfig, layout: ParallelLayout, role: str, hf_config: Any, stage: int) -> ModelState:
    """Of a model that is only read; where it is cut another way, of the rank of the stage that holds most."""
    if role != "reference" or config.reference.parallel is None:
        return frozen_state(hf_config, layout, stage, config.model)
    own = reference_layout(config, hf_config, layout.world_size)
    stages = {own.coords(stage * layout.stage_size + place).pp for place in range(layout.stage_size)}
    return max((frozen_state(hf_config, own, s, config.model) for s in stages), key=lambda state: state.bytes)


def _in_flight(layout: ParallelLayout, stage: int, micro_batches: int) -> int:
    """Model chunks whose activations a stage keeps at once, under 1F1B and its interleaved form."""
    if layout.vpp == 1:
        return min(layout.pp - stage, micro_batches)
    return min(2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)


def _engine(config: RunConfig, models: Models, length: int, hardware: Hardware, placement: str) -> Engine:
    rollout = config.rollout
    size = itemsize(config.model.dtype if rollout.dtype == "auto" else rollout.dtype)
    tp = rollout.tensor_parallel_size
    weights = models.parameters * size // tp
    budget = int(rollout.gpu_memory_utilization * hardware.gpu_bytes)
    return Engine(
        placement=placement,
        gpus=0 if placement == "server" else tp,
        weights=weights,
        kv_cache=budget - weights - ENGINE_WORKSPACE,
        token_bytes=cache_bytes(models.shape, tp, size),
        max_model_len=rollout.max_model_len or length,
    )


def _beside_the_engine(engine: Engine, backend: str) -> Iterator[Use]:
    """What a rank's GPU holds more where the engine is on it."""
    if engine.gpus:
        yield Use("engine", "weights", engine.weights, "rollout")
        yield Use("engine", "KV cache", max(0, engine.kv_cache), "rollout")
        yield Use("engine", "workspace", ENGINE_WORKSPACE)
    yield Use("engine", "weight transfer", TRANSFER_BUFFERS[backend], "rollout")


def _offloaded(places: Iterable[Place], gpus_per_node: int) -> dict[str, int]:
    """Main memory of the first node in which weights and states wait."""
    host: Counter[str] = Counter()
    for place in places:
        ranks = sum(rank < gpus_per_node for rank in place.ranks)
        for use in place.uses:
            if use.when in ("scoring", "step"):
                host[f"the {use.role}'s {use.what}, offloaded"] += use.bytes * ranks
    return {name: size for name, size in host.items() if size}


def _host(config: RunConfig, models: Models, engine: Engine, backend: str, length: int) -> Iterator[tuple[str, int]]:
    """Main memory of the first node beyond what a process needs anyway."""
    shape, copies = models.shape, {"shm": 1, "gloo": 2}.get(backend, 0)
    if copies:
        yield f"weight transfer ({backend})", copies * models.parameters * itemsize(config.model.dtype)
    if config.rollout.sleep and engine.gpus:
        yield "weights of the sleeping engine", engine.weights * engine.gpus
    sparse = sum(is_sparse(shape, layer) for layer in range(shape.num_layers))
    if sparse and models.algorithm.needs_rollouts:
        tokens = config.batch.prompts_per_step * config.rollout.group_size * length
        bytes_an_id = 1 if shape.num_moe_experts <= 256 else 2
        yield "routes of one rollout, if recorded", tokens * sparse * shape.moe_router_topk * bytes_an_id
