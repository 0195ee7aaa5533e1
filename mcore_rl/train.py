"""The training loop. torchrun --nproc-per-node N -m mcore_rl.train CONFIG key.sub=value ...

One step: collect -> pack -> score -> update -> sync -> evaluate -> log -> checkpoint, a file of `mcore_rl.step` each.
GAPO's discriminator learns in between. All ranks run all of it; the rollout engine hangs on rank 0, and every rank
takes its share of what it generated. With `rollout.max_staleness` it generates the batches of coming steps meanwhile.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mcore_rl.config import RunConfig, due, load_config
from mcore_rl.launch import exit_code, tell
from mcore_rl.logs.memory import held_parameters, peak_gb
from mcore_rl.logs.metrics import Timers, progress_display
from mcore_rl.logs.report import write_report
from mcore_rl.model.checkpoint import Progress
from mcore_rl.model.checkpoint_writer import CheckpointWriter
from mcore_rl.parallel.collectives import on_rank_0_only
from mcore_rl.planning.check import check_run_folder, make_plan
from mcore_rl.planning.plan import world_size
from mcore_rl.roles.discriminator import export_discriminator
from mcore_rl.roles.models import Models
from mcore_rl.roles.reference import following, update_reference
from mcore_rl.run import Run, open_run
from mcore_rl.step.batches import Metrics, read_examples, share_of_step
from mcore_rl.step.collecting import collect_rollouts, finish_rollouts, start_rollouts, with_rollouts
from mcore_rl.step.discriminating import update_discriminator, warm_up_discriminator
from mcore_rl.step.evaluating import evaluate
from mcore_rl.step.reference import with_reference
from mcore_rl.step.scoring import score
from mcore_rl.step.syncing import probe_is_due, rest_engine, sync_weights
from mcore_rl.step.updating import adapt_kl, update
from mcore_rl.step.watching import router_alarms, router_metrics, watch_routers
from mcore_rl.weights.sync import export_hf


def train(config: RunConfig) -> Path:
    """Run a configuration to its end and return the run's folder. Called on every rank."""
    check_run_folder(config)
    with open_run(make_plan(config, world_size())) as run:
        plan, groups, engine, transfer, rollouts = run.plan, run.groups, run.engine, run.transfer, run.rollouts
        rl, checkpoints = plan.algorithm.needs_rollouts, checkpoint_writer(run)
        models = with_reference(plan, groups, run.models, started=run.start.step > 0)
        policy, done, timers = models.policy, begin(run, models), Timers()
        with progress_display(config, done.step, enabled=run.log is not None) as display:
            while done.step < config.steps:
                with timers("collect"):
                    if rl:
                        done = start_rollouts(plan, groups, rollouts, done)
                        sequences, done, collected = collect_rollouts(plan, groups, models, rollouts, done)
                    else:
                        sequences, done, collected = read_examples(plan, groups, done)
                rest_engine(plan, groups, engine)
                with timers("pack"):
                    share = share_of_step(plan, groups, sequences, done.step)
                with timers("score"):
                    mini_batches, scored = score(plan, groups, models, share)
                with timers("moe"):
                    watched = watch_routers(config.moe, groups, policy, mini_batches, done.step)
                with timers("update"):
                    updated = update(plan, groups, models, run.exporter, mini_batches, done.step)
                with timers("discriminator"):
                    done, discriminated = update_discriminator(plan, groups, models, done)
                with timers("moe"):
                    routed = router_metrics(config, groups, policy, watched, done.step)
                metrics = {**collected, **scored, **updated, **discriminated, **routed}
                plan = adapt_kl(plan, metrics, len(share.columns))
                done = done.after_step(plan.algorithm.kl_coef)
                with timers("reference"):
                    update_reference(plan, policy, models.reference, done.step)
                with timers("collect"):
                    finish_rollouts(plan, groups, rollouts)
                if rl or due_or_last(config, config.evaluate.every, done.step):
                    with timers("sync"):
                        due_now = probe_is_due(config.weight_sync, done.policy_version, metrics)
                        metrics |= sync_weights(plan, groups, policy, engine, transfer, done.policy_version, due_now)
                if due_or_last(config, config.evaluate.every, done.step):
                    with timers("evaluate"):
                        metrics |= evaluate(plan, groups, models, engine)
                metrics["train/tokens_per_s"] = metrics.pop("num_positions") / timers.seconds["update"]
                metrics |= timers.metrics() | {"memory/trainer_peak_gb": peak_gb(groups)}
                metrics |= router_alarms(config.name, groups, metrics, done.step)
                log_step(run, done.step, metrics)
                display.update(done.step, metrics)
                timers = Timers()  # what saving takes is logged with the next step
                checkpoints.poll()
                stop = metrics.get("eval/accuracy", -1.0) >= (config.evaluate.stop_at_accuracy or 2.0)
                if stop or due_or_last(config, config.checkpoint.every, done.step):
                    with timers("checkpoint"):
                        checkpoints.save(with_rollouts(groups, rollouts, done))
                if stop:
                    break
        checkpoints.wait()
        finish(run)
    return config.run_dir


def begin(run: Run, models: Models) -> Progress:
    """Bring the engine to the policy's weights and, in a new run, see where it starts from."""
    plan, groups, engine, transfer, done = run.plan, run.groups, run.engine, run.transfer, run.start
    sync_weights(plan, groups, models.policy, engine, transfer, done.policy_version)
    if done.step == 0:
        done, warmed_up = warm_up_discriminator(plan, groups, models, engine, transfer, done)
        log_step(run, 0, evaluate(plan, groups, models, engine) | held_parameters(groups, models) | warmed_up)
    return done


def due_or_last(config: RunConfig, every: int, step: int) -> bool:
    """Every `every` steps (0: never), and at the last one."""
    return step == config.steps or due(every, step)


def checkpoint_writer(run: Run) -> CheckpointWriter:
    """Into checkpoints/ of the run's folder."""
    config = run.plan.config
    own = {"critic": config.critic.path, "discriminator": config.discriminator.path}
    hf_dirs = {name: own.get(name) or config.model.path for name in run.models.trained}
    folder, frozen = config.run_dir / "checkpoints", following(config, run.models.reference)
    return CheckpointWriter(folder, run.models.trained, run.groups, config.checkpoint, hf_dirs, frozen)


def log_step(run: Run, step: int, metrics: Metrics) -> None:
    """One line of metrics.jsonl; rank 0 only."""
    if run.log is not None:
        run.log.log(step, metrics, phase=run.plan.config.algorithm.name)


def finish(run: Run) -> None:
    """Leave the final policy and discriminator as HF folders, and the report."""
    config = run.plan.config
    if config.checkpoint.export_hf:
        export_hf(run.exporter, config.run_dir / "hf", config.model.path)
        if run.models.discriminator is not None:
            export_discriminator(config, run.models.trained["discriminator"], run.groups)
    if config.logging.report:
        on_rank_0_only(run.groups, lambda: write_report(config.run_dir))


def main() -> None:
    """Entry point of every rank."""
    arguments = sys.argv[1:]
    if not arguments:
        raise SystemExit("usage: torchrun --nproc-per-node N -m mcore_rl.train CONFIG.yaml key.sub=value ...")
    try:
        train(load_config(arguments[0], arguments[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the launcher tells it
    except Exception as error:  # noqa: BLE001  told in words or with its traceback
        tell(error)
        raise SystemExit(exit_code(error)) from None


if __name__ == "__main__":
    main()
