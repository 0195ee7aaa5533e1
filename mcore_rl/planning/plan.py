"""A checked configuration, and what follows from one without starting anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.data.task import Task
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.types import Prompt, SamplingParams, Trajectory


@dataclass(frozen=True)
class Plan:
    """What can be known before a process group, a model or an engine exists; `planning.check.make_plan` makes it."""

    config: RunConfig
    layout: ParallelLayout
    hf_config: PretrainedConfig
    tokenizer: Any
    algorithm: Algorithm
    task: Task
    reward: Callable[[Prompt, Trajectory], float] | None

    @property
    def samples(self) -> bool:
        """Whether the run samples anything: only then it has an engine and a reward."""
        return self.reward is not None


def world_size() -> int:
    """Trainer ranks, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def total_updates(config: RunConfig) -> int:
    """Optimizer steps of the whole run."""
    return config.steps * config.batch.mini_batches * config.batch.epochs


def rollout_sampling(config: RunConfig) -> SamplingParams:
    """How training responses are sampled."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.group_size,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_response_tokens,
        stop_token_ids=tuple(rollout.stop_token_ids),
        stop=tuple(rollout.stop),
    )


def samples_anything(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether a run has an engine at all: to train on what it samples, or to be evaluated by it."""
    return algorithm.needs_rollouts or config.evaluate.sample


def returns_routes(config: RunConfig) -> bool:
    """Whether the rollout engine must say which experts it used."""
    return config.rollout.return_routes or config.moe.routing_replay == "rollout"


def precomputes_reference(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether all that the reference will be asked is known before training, see `roles.given_logprobs`."""
    return "pairs" in algorithm.needs and config.reference.precompute


def holds_reference(config: RunConfig, algorithm: Algorithm) -> bool:
    """Whether a reference model is there during the training."""
    return "reference" in algorithm.needs and not precomputes_reference(config, algorithm)


def reference_layout(config: RunConfig, hf_config: PretrainedConfig, world: int) -> ParallelLayout:
    """Raises ValueError where it does not fit the ranks or the model."""
    own = config.reference.parallel
    try:
        layout = ParallelLayout.from_config(own or config.parallel, world)
        layout.validate_model(hf_config)
    except ValueError as error:
        raise ValueError(f"reference.parallel: {error}" if own else str(error)) from None
    return layout
