"""From a configuration to its plan: everything that can be checked without starting anything."""

from __future__ import annotations

from transformers import AutoTokenizer, PretrainedConfig

from mcore_rl import algorithms
from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig
from mcore_rl.data.real_fake import check_examples
from mcore_rl.data.task import Task
from mcore_rl.data.tasks import build_task
from mcore_rl.model.build import read_hf_config
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.check_models import check_reference, check_routing, check_scorers
from mcore_rl.planning.lint import lint
from mcore_rl.planning.plan import Plan, samples_anything
from mcore_rl.rollout.placement import resolve
from mcore_rl.rollout.rewards import load_reward
from mcore_rl.weights.families import is_scorer
from mcore_rl.weights.stored import check_weights


def make_plan(config: RunConfig, world: int) -> Plan:
    """Check everything that can be checked without starting anything.

    Raises:
        ValueError: the algorithm, layout, model folder, data or reward does not fit, with the fix.
    """
    algorithm = algorithms.load(config.algorithm.name, **config.algorithm.fields)
    layout = ParallelLayout.from_config(config.parallel, world)
    hf_config = read_hf_config(config.model.path)
    if is_scorer(hf_config):
        raise ValueError(f"model.path={config.model.path!r} is a sequence classifier; a policy needs a ...ForCausalLM")
    layout.validate_model(hf_config)
    check_weights(config.model.path, hf_config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    room = hf_config.max_position_embeddings - config.rollout.max_response_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_response_tokens={config.rollout.max_response_tokens} leaves no room for a prompt: "
            f"the model has {hf_config.max_position_embeddings} positions; lower it"
        )
    task = build_task(config.data, tokenizer, config.seed, max_model_tokens=room)
    _check_sizes(config, algorithm, hf_config, task)
    longest = (task.max_prompt_tokens or room) + config.rollout.max_response_tokens
    if "discriminator" in algorithm.needs:
        longest = max(longest, check_examples(config, task))
    check_scorers(config, algorithm, layout, tokenizer, longest)
    check_routing(config, algorithm, hf_config)
    errors = [f"{f.key}: {f.message}" for f in lint(config, algorithm) if f.level == "error"]
    if errors:
        raise ValueError("; ".join(errors))
    if "pairs" in algorithm.needs:
        task.train_pairs()
    check_reference(config, algorithm, hf_config, world)
    if config.optimizer.name == "sgd" and config.parallel.distributed_optimizer:
        raise ValueError(
            "optimizer.name='sgd' with parallel.distributed_optimizer=true: Megatron's distributed optimizer shards "
            "Adam only; set optimizer.name=adam or parallel.distributed_optimizer=false"
        )
    resolve(config.rollout, config.weight_sync, world)
    reward = load_reward(config.reward, task) if samples_anything(config, algorithm) else None
    return Plan(config, layout, hf_config, tokenizer, algorithm, task, reward)


def _check_sizes(config: RunConfig, algorithm: Algorithm, hf_config: PretrainedConfig, task: Task) -> None:
    batch, rollout, optimizer = config.batch, config.rollout, config.optimizer
    samples = batch.prompts_per_step * (rollout.group_size if algorithm.needs_rollouts else 1)
    if batch.mini_batches > samples:
        raise ValueError(
            f"batch.mini_batches={batch.mini_batches}: a step has {samples} samples and each mini-batch needs one; "
            "lower it or raise batch.prompts_per_step"
        )
    longest, positions = task.max_prompt_tokens or 0, hf_config.max_position_embeddings
    if rollout.max_model_len is not None and not longest < rollout.max_model_len <= positions:
        raise ValueError(
            f"rollout.max_model_len={rollout.max_model_len}: must be more than the longest prompt ({longest} tokens) "
            f"and at most the model's {positions} positions; null is what prompts and responses need"
        )
    if outside := [token for token in rollout.stop_token_ids if not 0 <= token < hf_config.vocab_size]:
        raise ValueError(f"rollout.stop_token_ids={outside}: the model's vocabulary is 0..{hf_config.vocab_size - 1}")
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(f"optimizer.min_lr={optimizer.min_lr:g}: must be at most optimizer.lr={optimizer.lr:g}")


def check_run_folder(config: RunConfig) -> None:
    """Make the run's folder. Raises ValueError where that fails or a new run would overwrite an old one."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run folder {str(config.run_dir)!r} cannot be made: {error.strerror}; choose another output_dir or name"
        ) from error
    metrics = config.run_dir / "metrics.jsonl"
    if not config.resume and metrics.exists() and metrics.stat().st_size > 0:
        raise ValueError(
            f"run folder {str(config.run_dir)!r} already holds a run; continue it with resume=true, "
            "choose another name=..., or remove it"
        )
