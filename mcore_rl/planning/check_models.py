"""Checks of what a configuration says of its models: scorers, reference, routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.cuda import is_available
from transformers import AutoTokenizer, PretrainedConfig

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.model.build import read_hf_config
from mcore_rl.parallel.layout import EXPERT_FIELDS, ParallelLayout
from mcore_rl.planning.plan import reference_layout, returns_routes
from mcore_rl.rollout.engine import TOKENIZER_FILES
from mcore_rl.weights.families import is_scorer
from mcore_rl.weights.stored import check_weights


def check_scorer(
    key: str, path: str, layout: ParallelLayout, tokenizer: Any, *, positions: int, has_head: bool = False
) -> PretrainedConfig:
    """Check the folder of a model that scores what the policy writes.

    Args:
        key: of the configuration, for the messages. tokenizer: the policy's.
        positions: longest sequence it will read.
        has_head: a policy's folder will not do, as a new head says nothing.

    Raises:
        ValueError: no supported model, no sequence classifier or not of one score, another tokenizer, too few tokens or
            positions, or a layout that does not divide it.
    """
    hf_config = read_hf_config(path, key)
    if has_head and not is_scorer(hf_config):
        raise ValueError(
            f"{key}={path!r} is a {hf_config.architectures[0]}, which has no score head; a reward needs one that was "
            "trained: a ...ForSequenceClassification with one label"
        )
    if is_scorer(hf_config) and hf_config.num_labels != 1:
        raise ValueError(f"{key}={path!r} has num_labels={hf_config.num_labels}; a score is one number, num_labels=1")
    if hf_config.vocab_size < len(tokenizer):
        raise ValueError(f"{key}={path!r} knows {hf_config.vocab_size} tokens, the policy writes {len(tokenizer)}")
    if hf_config.max_position_embeddings < positions:
        raise ValueError(
            f"{key}={path!r} has {hf_config.max_position_embeddings} positions and prompts with their responses take "
            f"up to {positions}; lower data.max_prompt_tokens or rollout.max_response_tokens"
        )
    if any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        if AutoTokenizer.from_pretrained(path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{key}={path!r} has another tokenizer than the policy; it reads the policy's token ids")
    layout.validate_model(hf_config)
    check_weights(path, hf_config)
    return hf_config


def check_scorers(
    config: RunConfig, algorithm: Algorithm, layout: ParallelLayout, tokenizer: Any, positions: int
) -> None:
    """`check_scorer` of those that are read from folders of their own."""
    if config.reward_model.path is not None:
        key, path = "reward_model.path", config.reward_model.path
        check_scorer(key, path, layout, tokenizer, positions=positions, has_head=True)
    for role, section in (("critic", config.critic), ("discriminator", config.discriminator)):
        if role in algorithm.needs and section.path is not None:
            check_scorer(f"{role}.path", section.path, layout, tokenizer, positions=positions)


def check_reference(config: RunConfig, algorithm: Algorithm, hf_config: PretrainedConfig, world: int) -> None:
    """Raises ValueError where what is said of the reference does not fit the model, the ranks or the algorithm."""
    own = config.reference
    if own.path is not None:
        if "reference" not in algorithm.needs:
            raise ValueError(
                f"reference.path={own.path!r} is never read: with algorithm.kl_coef=0 there is no reference"
            )
        check_weights(own.path, hf_config)
    if own.update_every and own.precompute and "pairs" in algorithm.needs:
        raise ValueError(
            f"reference.update_every={own.update_every} with reference.precompute=true: log-probs that are computed "
            "before training cannot follow the policy; set reference.precompute=false"
        )
    reference_layout(config, hf_config, world)


def check_routing(config: RunConfig, algorithm: Algorithm, hf_config: Any) -> None:
    """Raises ValueError where a dense model is asked for routes, an algorithm without rollouts for replay, or an engine
    that cannot return routes for them."""
    mode, rollout = config.moe.routing_replay, config.rollout
    asked = {
        f"moe.routing_replay={mode!r}": mode != "none",
        f"moe.log_every={config.moe.log_every}": config.moe.log_every > 0,
        f"moe.record_every={config.moe.record_every}": config.moe.record_every > 0,
        "rollout.return_routes=true": rollout.return_routes,
        "moe.router_shift=true": config.moe.router_shift,
        "model.freeze_router=true": config.model.freeze_router,
    }
    if not any(getattr(hf_config, name, None) for name in EXPERT_FIELDS):
        if settings := ", ".join(setting for setting, is_set in asked.items() if is_set):
            raise ValueError(f"{settings}: {hf_config.model_type} has no experts; drop it")
    if mode != "none" and not algorithm.needs_rollouts:
        raise ValueError(
            f"moe.routing_replay={mode!r}: algorithm.name={config.algorithm.name!r} samples no rollouts, so no "
            "policy before the step whose routes could be taken again; set it to none"
        )
    if mode == "old" and algorithm.old_logprobs == "rollout":
        raise ValueError(
            "moe.routing_replay='old' takes the routes of the pass before the step, which algorithm.old_logprobs="
            "'rollout' leaves out; set routing_replay to 'rollout' or old_logprobs to 'trainer'"
        )
    if returns_routes(config) and rollout.partial:
        raise ValueError(
            "rollout.partial=true: where weights change in the middle of a response, the engine computes what it had "
            "said before again, and its routes are those of the new weights; set partial to false, or both "
            "moe.routing_replay=rollout and rollout.return_routes off"
        )
    if config.moe.router_shift and (not algorithm.needs_rollouts or algorithm.old_logprobs == "rollout"):
        raise ValueError(
            f"moe.router_shift=true: under algorithm.name={config.algorithm.name!r} and its old_logprobs no pass of "
            "the policy before the step is made to compare its routers with; set it to false"
        )
    one_worker = rollout.tensor_parallel_size == 1 or rollout.placement == "server" or is_available()
    if returns_routes(config) and not one_worker:
        raise ValueError(
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size}: on a CPU vLLM returns routes from engines "
            "of one worker only, which moe.routing_replay=rollout and rollout.return_routes need; set it to 1"
        )
