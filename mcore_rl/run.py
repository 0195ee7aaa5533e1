"""Everything that lives as long as a run: groups, models, rollout engine, weight sync, logs. Opened and closed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PretrainedConfig

from mcore_rl import algorithms
from mcore_rl.algorithms.base import Algorithm
from mcore_rl.config import RunConfig, dump_config
from mcore_rl.data.real_fake import check_examples
from mcore_rl.data.tasks import Task, build_task
from mcore_rl.launch import tell
from mcore_rl.lint import lint
from mcore_rl.metrics import RunLog
from mcore_rl.model.build import read_hf_config
from mcore_rl.model.checkpoint import Progress, load_checkpoint
from mcore_rl.model.forward import Policy, Scorer
from mcore_rl.model.optimizer import Training, build_training
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.collectives import on_rank_0, require_equal
from mcore_rl.parallel.groups import Groups, explain_timeouts
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.policies import as_policy, check_reference, following, holds_reference, load_chunks, load_reference
from mcore_rl.rollout.ahead import RolloutsAhead, open_ahead
from mcore_rl.rollout.collect import Reward
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.placement import resolve, samples_anything
from mcore_rl.rollout.rewards import load_reward
from mcore_rl.rollout.vllm_engine import open_engine
from mcore_rl.rollout.weight_transfer import WeightTransfer, connect
from mcore_rl.routing import check_routing, returns_routes, router_header, with_routers
from mcore_rl.scorers import check_scorers, critic_training, discriminator_training, reward_scorer
from mcore_rl.types import SamplingParams
from mcore_rl.weights.families import is_scorer
from mcore_rl.weights.stored import check_weights
from mcore_rl.weights.sync import WeightExporter

if TYPE_CHECKING:
    from mcore_rl.reference import GivenLogprobs


@dataclass(frozen=True)
class Plan:
    """A checked configuration: what can be known before a process group, a model or an engine exists."""

    config: RunConfig
    layout: ParallelLayout
    hf_config: PretrainedConfig
    tokenizer: Any
    algorithm: Algorithm
    task: Task
    reward: Reward | None

    @property
    def samples(self) -> bool:
        """Whether the run samples anything: only then it has an engine and a reward."""
        return self.reward is not None


@dataclass(frozen=True)
class Run:
    """A running configuration on this rank. `engine`, `rollouts` and `log` exist on rank 0 only; without sampling
    there are no `engine` and no `transfer`."""

    plan: Plan
    groups: Groups
    trained: dict[str, Training]  # "policy" and those of "critic", "discriminator" it needs: what a checkpoint holds
    policy: Policy
    reference: Policy | None
    reference_logprobs: GivenLogprobs | None  # instead of the model, where all it will be asked is known
    critic: Scorer | None
    discriminator: Scorer | None  # its score is the reward, the rule's an audit
    reward_model: Scorer | None  # its score is the reward, the rule's an audit
    exporter: WeightExporter
    engine: RolloutEngine | None
    rollouts: RolloutsAhead | None
    transfer: WeightTransfer | None
    log: RunLog | None
    start: Progress


def world_size() -> int:
    """Trainer ranks, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_plan(config: RunConfig, world: int) -> Plan:
    """Check everything that can be checked without starting anything.

    Raises:
        ValueError: the algorithm, layout, model folder, data, reward or run folder does not fit, with the fix.
    """
    fields = dict(config.algorithm)
    algorithm = algorithms.load(fields.pop("name", "grpo"), **fields)
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


@contextmanager
def open_run(plan: Plan) -> Iterator[Run]:
    """Start process groups, model, optimizer, engine and logs; close all of them whatever happens."""
    config = plan.config
    with ExitStack() as stack, _failure_told_first(), explain_timeouts(config.parallel.timeout_s):
        groups = process_groups.init(plan.layout, config.parallel.timeout_s, config.seed)
        stack.callback(process_groups.destroy)
        require_equal(groups, "the configuration", dump_config(config))
        chunks = load_chunks(plan, groups, config.model.path)
        reference = load_reference(plan, groups) if holds_reference(config, plan.algorithm) else None
        training = build_training(chunks, config.optimizer, config.parallel, total_updates(config))
        trained = {"policy": training}
        if "critic" in plan.algorithm.needs:
            trained["critic"] = critic_training(config, groups, total_updates(config))
        if "discriminator" in plan.algorithm.needs:
            trained["discriminator"] = discriminator_training(config, groups)
        critic, discriminator = (
            Scorer(trained[role].chunks, groups) if role in trained else None for role in ("critic", "discriminator")
        )
        folder = config.run_dir / "checkpoints"
        frozen = following(config, reference)
        start = (load_checkpoint(folder, trained, groups, frozen) if config.resume else None) or Progress()
        if start.kl_coef is not None:
            plan = replace(plan, algorithm=plan.algorithm.with_kl_coef(start.kl_coef))
        exporter = WeightExporter(chunks, plan.hf_config, groups)
        engine = transfer = None
        if plan.samples:
            engine = on_rank_0_only(groups, lambda: open_plan_engine(plan))
            if engine is not None:
                stack.callback(engine.close)
            transfer = connect(engine, exporter, config.weight_sync, groups)
            stack.callback(transfer.close)
        log = on_rank_0_only(groups, lambda: _open_log(plan, start))
        if log is not None:
            stack.callback(log.close)
            for line in filter(None, (router_header(config, chunks[0].config), *lint(config, plan.algorithm))):
                print(line, flush=True)
            if config.resume:
                where = f"continues after step {start.step}" if start.step else "has no checkpoint, begins at step 0"
                print(f"{config.name}: {where}", flush=True)
        policy = with_routers(as_policy(plan, groups, training.chunks), config)
        yield Run(
            plan=plan,
            groups=groups,
            trained=trained,
            policy=policy,
            reference=reference,
            reference_logprobs=None,
            critic=critic,
            discriminator=discriminator,
            reward_model=reward_scorer(config, groups),
            exporter=exporter,
            engine=engine,
            rollouts=engine and open_ahead(engine, rollout_sampling(config), config.rollout, plan.task, start.ahead),
            transfer=transfer,
            log=log,
            start=start,
        )


@contextmanager
def _failure_told_first() -> Iterator[None]:
    """Say why this rank fails before anything is closed: that takes a while, and torchrun ends a rank soon after any
    other has ended.
    """
    try:
        yield
    except Exception as error:
        tell(error)
        raise


def on_rank_0_only(groups: Groups, make):
    """`make()` on rank 0, None elsewhere; a failure on rank 0 is raised on every rank."""
    made = []
    on_rank_0(groups, lambda: made.append(make()))
    return made[0] if made else None


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


def open_plan_engine(plan: Plan) -> RolloutEngine:
    """The rollout engine that the configuration asks for."""
    config = plan.config
    return open_engine(
        config.rollout,
        config.weight_sync,
        model_path=config.model.path,
        model_dtype=config.model.dtype,
        max_prompt_tokens=plan.task.max_prompt_tokens
        or plan.hf_config.max_position_embeddings - config.rollout.max_response_tokens,
        world_size=plan.layout.world_size,
        seed=config.seed,
        return_routes=returns_routes(config),
    )


def _open_log(plan: Plan, start: Progress) -> RunLog:
    (plan.config.run_dir / "config.yaml").write_text(dump_config(plan.config))
    return RunLog(plan.config.run_dir, plan.config, resume_step=start.step if plan.config.resume else None)
