"""The training loop. torchrun --nproc-per-node N -m mcore_rl.train CONFIG key.sub=value ...

One step: collect (`collecting`) -> pack -> score -> update -> sync (`phases`) -> evaluate (`evaluating`)
-> log -> checkpoint. GAPO's discriminator learns in between (`discriminating`).
All ranks run all of it; the rollout engine hangs on rank 0, which tells the others what it generated. With
`rollout.max_staleness` it generates the batches of coming steps meanwhile.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mcore_rl.collecting import collect_rollouts, finish_rollouts, start_rollouts, with_rollouts
from mcore_rl.config import RunConfig, due, load_config
from mcore_rl.discriminating import update_discriminator, warm_up_discriminator
from mcore_rl.evaluating import evaluate
from mcore_rl.launch import exit_code, tell
from mcore_rl.memory import held_parameters, peak_gb
from mcore_rl.metrics import Timers, progress_display
from mcore_rl.model.checkpoint_writer import CheckpointWriter
from mcore_rl.phases import (
    Metrics,
    adapt_kl,
    pack,
    read_examples,
    rest_engine,
    sync_weights,
    update,
)
from mcore_rl.policies import following
from mcore_rl.prescoring import score_old
from mcore_rl.reference import update_reference, with_reference
from mcore_rl.report import write_report
from mcore_rl.router_watch import router_alarms, router_metrics, watch_routers
from mcore_rl.run import Run, check_run_folder, make_plan, on_rank_0_only, open_run, world_size
from mcore_rl.scorers import export_discriminator
from mcore_rl.weights.sync import export_hf


def train(config: RunConfig) -> Path:
    """Run a configuration to its end and return the run's folder. Called on every rank."""
    check_run_folder(config)
    with open_run(make_plan(config, world_size())) as run:
        rl = run.plan.algorithm.needs_rollouts
        run = with_reference(run)
        done, checkpoints = run.start, checkpoint_writer(run)
        sync_weights(run, done.policy_version)
        if done.step == 0:
            done, warmed_up = warm_up_discriminator(run, done)
            log_step(run, 0, evaluate(run) | held_parameters(run) | warmed_up)
        timers = Timers()
        with progress_display(config, done.step, enabled=run.log is not None) as display:
            while done.step < config.steps:
                with timers("collect"):
                    done = start_rollouts(run, done)
                    samples, done, collected = (collect_rollouts if rl else read_examples)(run, done)
                rest_engine(run)
                with timers("pack"):
                    unit = run.plan.algorithm.unit
                    mini_batches = pack(run, samples, done.step, config.batch.mini_batches, unit)
                with timers("score"):
                    mini_batches, scored = score_old(run, mini_batches)
                with timers("moe"):
                    watched = watch_routers(run, mini_batches, done.step)
                with timers("update"):
                    updated = update(run, mini_batches, done.step)
                with timers("discriminator"):
                    done, discriminated = update_discriminator(run, done)
                with timers("moe"):
                    routed = router_metrics(run, watched, done.step)
                metrics = {**collected, **scored, **updated, **discriminated, **routed}
                run = adapt_kl(run, metrics, len(samples))
                done = done.after_step(run.plan.algorithm.kl_coef)
                with timers("reference"):
                    update_reference(run, done.step)
                with timers("collect"):
                    finish_rollouts(run)
                if rl or due_or_last(config, config.evaluate.every, done.step):
                    with timers("sync"):
                        metrics |= sync_weights(run, done.policy_version)
                if due_or_last(config, config.evaluate.every, done.step):
                    with timers("evaluate"):
                        metrics |= evaluate(run)
                metrics["train/tokens_per_s"] = metrics.pop("num_positions") / timers.seconds["update"]
                metrics |= timers.metrics() | {"memory/trainer_peak_gb": peak_gb(run.groups)}
                metrics |= router_alarms(run, metrics, done.step)
                log_step(run, done.step, metrics)
                display.update(done.step, metrics)
                timers = Timers()  # what saving takes is logged with the next step
                checkpoints.poll()
                stop = metrics.get("eval/accuracy", -1.0) >= (config.evaluate.stop_at_accuracy or 2.0)
                if stop or due_or_last(config, config.checkpoint.every, done.step):
                    with timers("checkpoint"):
                        checkpoints.save(with_rollouts(run, done))
                if stop:
                    break
        checkpoints.wait()
        finish(run)
    return config.run_dir


def due_or_last(config: RunConfig, every: int, step: int) -> bool:
    """Every `every` steps (0: never), and at the last one."""
    return step == config.steps or due(every, step)


def checkpoint_writer(run: Run) -> CheckpointWriter:
    """Into checkpoints/ of the run's folder."""
    config = run.plan.config
    own = {"critic": config.critic.path, "discriminator": config.discriminator.path}
    hf_dirs = {name: own.get(name) or config.model.path for name in run.trained}
    folder, frozen = config.run_dir / "checkpoints", following(config, run.reference)
    return CheckpointWriter(folder, run.trained, run.groups, config.checkpoint, hf_dirs, frozen)


def log_step(run: Run, step: int, metrics: Metrics) -> None:
    """One line of metrics.jsonl; rank 0 only."""
    if run.log is not None:
        run.log.log(step, metrics, phase=run.plan.config.algorithm.get("name", "grpo"))


def finish(run: Run) -> None:
    """Leave the final policy and discriminator as HF folders, and the report."""
    config = run.plan.config
    if config.checkpoint.export_hf:
        export_hf(run.exporter, config.run_dir / "hf", config.model.path)
        if run.discriminator is not None:
            export_discriminator(config, run.trained["discriminator"], run.groups)
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
