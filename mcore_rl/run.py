"""Everything that lives as long as a run: groups, models, rollout engine, weight sync, logs. Opened and closed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from mcore_rl.config import RunConfig, dump_config
from mcore_rl.launch import RunFailure, exit_code, tell
from mcore_rl.logs.metrics import RunLog
from mcore_rl.model.checkpoint import Progress, load_checkpoint
from mcore_rl.model.forward import Scorer
from mcore_rl.model.optimizer import build_training
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.collectives import on_rank_0_only, require_equal
from mcore_rl.parallel.groups import Groups, explain_timeouts
from mcore_rl.planning.lint import lint
from mcore_rl.planning.plan import Plan, holds_reference, returns_routes, rollout_sampling, total_updates
from mcore_rl.planning.threads import Threads, cpu_threads
from mcore_rl.roles.critic import critic_training
from mcore_rl.roles.discriminator import discriminator_training
from mcore_rl.roles.models import Models
from mcore_rl.roles.policy import as_policy, load_chunks, router_header, with_routers
from mcore_rl.roles.reference import following, load_reference
from mcore_rl.roles.reward_model import reward_scorer
from mcore_rl.rollout.ahead import RolloutsAhead, open_ahead
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.transfer.transfer import WeightTransfer, connect
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.weights.sync import WeightExporter


@dataclass(frozen=True)
class Run:
    """A running configuration on this rank; every phase of a step is given the parts that it uses.

    Attributes:
        engine, rollouts: on rank 0 of a run that samples. transfer: on every rank of one. log: on rank 0.
        start: where the loop begins.
    """

    plan: Plan
    groups: Groups
    models: Models
    exporter: WeightExporter
    engine: RolloutEngine | None
    rollouts: RolloutsAhead | None
    transfer: WeightTransfer | None
    log: RunLog | None
    start: Progress


@contextmanager
def open_run(plan: Plan) -> Iterator[Run]:
    """Start process groups, model, optimizer, engine and logs; close all of them whatever happens."""
    config = plan.config
    with ExitStack() as stack, _failure_told_first(), explain_timeouts(config.parallel.timeout_s):
        torch.set_num_threads(local_threads(config).ranks)
        groups = process_groups.init(plan.layout, config.parallel.timeout_s, config.seed)
        stack.callback(process_groups.destroy)
        require_equal(groups, "the configuration", dump_config(config))
        models = load_models(plan, groups)
        start = _load_start(config, models, groups) if config.resume else Progress()
        if start.kl_coef is not None:
            plan = replace(plan, algorithm=plan.algorithm.with_kl_coef(start.kl_coef))
        exporter = WeightExporter(models.policy.chunks, plan.hf_config, groups)
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
            _tell_start(plan, models, start)
        sampling = rollout_sampling(config)
        rollouts = engine and open_ahead(engine, sampling, config.rollout, plan.task, start.ahead)
        yield Run(plan, groups, models, exporter, engine, rollouts, transfer, log, start)


def _load_start(config: RunConfig, models: Models, groups: Groups) -> Progress:
    """Loads the newest checkpoint into the models, where there is one."""
    frozen = following(config, models.reference)
    return load_checkpoint(config.run_dir / "checkpoints", models.trained, groups, frozen) or Progress()


def local_threads(config: RunConfig) -> Threads:
    """Of this host's processes."""
    return cpu_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def load_models(plan: Plan, groups: Groups) -> Models:
    """Every model that the run needs, from its folder, those that are trained with their optimizers."""
    config = plan.config
    chunks = load_chunks(plan, groups, config.model.path)
    reference = load_reference(plan, groups) if holds_reference(config, plan.algorithm) else None
    updates = total_updates(config)
    trained = {"policy": build_training(chunks, config.optimizer, config.parallel, updates)}
    if "critic" in plan.algorithm.needs:
        trained["critic"] = critic_training(config, groups, updates)
    if "discriminator" in plan.algorithm.needs:
        trained["discriminator"] = discriminator_training(config, groups)
    critic, discriminator = (
        Scorer(trained[role].chunks, groups) if role in trained else None for role in ("critic", "discriminator")
    )
    policy = with_routers(as_policy(plan, groups, trained["policy"].chunks), config)
    return Models(trained, policy, reference, critic, discriminator, reward_scorer(config, groups))


@contextmanager
def _failure_told_first() -> Iterator[None]:
    """Say why this rank fails before anything is closed: that takes a while, and torchrun ends a rank soon after any
    other has ended.
    """
    try:
        yield
    except RunFailure:
        raise
    except Exception as error:
        tell(error)
        raise RunFailure(exit_code(error)) from error


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
        threads=local_threads(config).engine,
    )


def _open_log(plan: Plan, start: Progress) -> RunLog:
    (plan.config.run_dir / "config.yaml").write_text(dump_config(plan.config))
    return RunLog(plan.config.run_dir, plan.config, resume_step=start.step if plan.config.resume else None)


def _tell_start(plan: Plan, models: Models, start: Progress) -> None:
    config = plan.config
    header = router_header(config, models.trained["policy"].chunks[0].config)
    threads = local_threads(config)
    cores = "" if torch.cuda.is_available() else f"threads: {threads.ranks} a rank, {threads.engine} an engine worker"
    for line in filter(None, (header, cores, *lint(config, plan.algorithm))):
        print(line, flush=True)
    if config.resume:
        where = f"continues after step {start.step}" if start.step else "has no checkpoint, begins at step 0"
        print(f"{config.name}: {where}", flush=True)
