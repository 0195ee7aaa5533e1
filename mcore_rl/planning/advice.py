"""Changes of a configuration that make it fit, each tried through the estimate itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mcore_rl.config import RunConfig
from mcore_rl.planning.estimate import Estimate, Hardware

Plan = Callable[[RunConfig, int], Estimate]  # (configuration, ranks) -> its estimate; ValueError if it is invalid
_LEAST_GAIN = 0.05  # of what is missing: a change that gives less is not worth its cost


@dataclass(frozen=True)
class Change:
    """One override, and what is still missing once it and all before it are made."""

    words: str
    missing_bytes: float


def advice(planned: Estimate, plan: Plan) -> list[Change]:
    """Changes, cheapest first, that together make it fit; as far as they help where nothing does."""
    config, world, best, taken = planned.config, planned.layout.world_size, planned, []
    while best.excess_bytes > 0 and len(taken) < 20:
        step = _first_that_helps(best, plan, config, world)
        if step is None:
            break
        words, config, world, best = step
        taken = [change for change in taken if change.words.split("=")[0] != words.split("=")[0]]
        taken.append(Change(words, best.excess_bytes))
    return taken


def _first_that_helps(now: Estimate, plan: Plan, config: RunConfig, world: int):
    for words, changed, ranks in _changes(config, world, now.hardware):
        try:
            then = plan(changed, ranks)
        except ValueError:
            continue
        if now.excess_bytes - then.excess_bytes > _LEAST_GAIN * now.excess_bytes:
            return words, changed, ranks, then
    return None


def _changes(config: RunConfig, world: int, hardware: Hardware) -> Iterator[tuple[str, RunConfig, int]]:
    """(words, configuration, ranks), in the order of what they cost in speed."""
    model, parallel, batch, rollout = config.model, config.parallel, config.batch, config.rollout
    share, engine_tp = rollout.gpu_memory_utilization, 2 * rollout.tensor_parallel_size
    alone = rollout.sleep or rollout.placement == "server"
    choices = [
        ("parallel", "distributed_optimizer", True, not parallel.distributed_optimizer),
        ("model", "dtype", "bfloat16", model.dtype == "float32"),
        ("rollout", "tensor_parallel_size", engine_tp, engine_tp <= hardware.gpus_per_node),
        ("reference", "offload", True, not config.reference.offload),
        ("reward_model", "offload", True, not config.reward_model.offload),
        ("rollout", "sleep", True, not rollout.sleep and rollout.placement != "server"),
        ("rollout", "gpu_memory_utilization", round(share + 0.1, 2), alone and share < 0.85),
        ("batch", "micro_batch_tokens", batch.micro_batch_tokens // 2, batch.micro_batch_tokens >= 2048),
        ("batch", "logprob_chunk_tokens", batch.logprob_chunk_tokens // 2, batch.logprob_chunk_tokens >= 512),
        ("model", "recompute", "full", model.recompute != "full"),
        ("optimizer", "offload", True, not config.optimizer.offload),
        ("parallel", "ep", 2 * parallel.ep, True),
        ("parallel", "tp", 2 * parallel.tp, 2 * parallel.tp <= hardware.gpus_per_node),
        ("parallel", "pp", 2 * parallel.pp, True),
    ]
    for section, key, value, applies in choices:
        if applies:
            changed = getattr(config, section).model_copy(update={key: value})
            words = f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"
            yield words, config.model_copy(update={section: changed}), world
    yield f"--world-size={2 * world}", config, 2 * world
    if rollout.placement != "server":
        served = rollout.model_copy(update={"placement": "server", "server_url": "http://HOST:8000", "sleep": False})
        yield "rollout.placement=server", config.model_copy(update={"rollout": served}), world
