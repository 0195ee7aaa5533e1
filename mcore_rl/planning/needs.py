"""What every kind of rank of a run on GPUs needs: from a configuration and its models to an estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.estimate import Engine, Estimate, Hardware, Models, Place, Schedule, Use
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
