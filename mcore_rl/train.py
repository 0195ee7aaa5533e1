"""The training loop. torchrun --nproc-per-node N -m mcore_rl.train CONFIG key.sub=value ...

One step: collect -> pack -> score -> update -> sync -> evaluate -> log -> checkpoint. All ranks run all of it; the
rollout engine hangs on rank 0, which tells the others what it generated.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from mcore_rl.config import RunConfig, load_config
from mcore_rl.data.packing import Sample, pack_mini_batch, pad, samples_of, split_mini_batches
from mcore_rl.launch import exit_code, tell
from mcore_rl.metrics import Timers, progress_display
from mcore_rl.model.checkpoint import Progress, save_checkpoint
from mcore_rl.model.forward import forward_backward, forward_only
from mcore_rl.parallel.collectives import max_over_ranks, on_rank_0, sum_over_ranks
from mcore_rl.report import write_report
from mcore_rl.rollout.collect import collect
from mcore_rl.rollout.collect import evaluate as evaluate_policy
from mcore_rl.run import (
    Run,
    check_run_folder,
    evaluation_sampling,
    make_plan,
    on_rank_0_only,
    open_run,
    rollout_sampling,
    world_size,
)
from mcore_rl.types import PackedBatch, SamplingParams
from mcore_rl.weights.sync import export_hf

Metrics = dict[str, float]
MiniBatches = list[list[PackedBatch]]


def train(config: RunConfig) -> Path:
    """Run a configuration to its end and return the run's folder. Called on every rank."""
    check_run_folder(config)
    with open_run(make_plan(config, world_size())) as run:
        rl = run.plan.algorithm.needs_rollouts
        done = run.start
        sync_weights(run, done.policy_version)
        if done.step == 0:
            log_step(run, 0, evaluate(run))
        timers = Timers()
        with progress_display(config, done.step, enabled=run.log is not None) as display:
            while done.step < config.steps:
                with timers("collect"):
                    samples, prompts_used, collected = (collect_rollouts if rl else read_examples)(run, done)
                with timers("pack"):
                    mini_batches = pack(run, samples, done.step, config.batch.mini_batches)
                with timers("score"):
                    mini_batches, compared = score_old(run, mini_batches) if rl else (mini_batches, {})
                with timers("update"):
                    updated = update(run, mini_batches)
                done = Progress(done.step + 1, done.prompts_seen + prompts_used, done.policy_version + 1)
                metrics = {**collected, **compared, **updated}
                if rl or due(config, config.evaluate.every, done.step):
                    with timers("sync"):
                        metrics |= sync_weights(run, done.policy_version)
                if due(config, config.evaluate.every, done.step):
                    with timers("evaluate"):
                        metrics |= evaluate(run)
                metrics["train/tokens_per_s"] = metrics.pop("num_positions") / timers.seconds["update"]
                metrics |= timers.metrics()
                log_step(run, done.step, metrics)
                display.update(done.step, metrics)
                timers = Timers()  # what saving takes is logged with the next step
                stop = metrics.get("eval/accuracy", -1.0) >= (config.evaluate.stop_at_accuracy or 2.0)
                if stop or due(config, config.checkpoint.every, done.step):
                    with timers("checkpoint"):
                        checkpoint(run, done)
                if stop:
                    break
        finish(run)
    return config.run_dir


def due(config: RunConfig, every: int, step: int) -> bool:
    """Every `every` steps (0: never), and at the last one."""
    return step == config.steps or (every > 0 and step % every == 0)


def collect_rollouts(run: Run, done: Progress) -> tuple[list[Sample], int, Metrics]:
    """Sample and score this step's responses on rank 0; every rank gets all of them."""
    config, plan = run.plan.config, run.plan

    def on_engine():
        start = time.perf_counter()
        collected = collect(
            run.engine,
            plan.task,
            plan.reward,
            plan.algorithm,
            rollout_sampling(config),
            cursor=done.prompts_seen,
            num_prompts=config.batch.prompts_per_step,
            seed=step_seed(config, done.step),
        )
        return collected, time.perf_counter() - start

    collected, seconds = on_rank_0(run.groups, on_engine)
    rewards = torch.tensor(collected.raw_rewards)
    responses = [t for g in collected.groups for t in g.trajectories]
    lengths = torch.tensor([float(len(t.response_ids)) for t in responses])
    metrics = {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        "response/length_mean": lengths.mean().item(),
        "response/truncated_frac": sum(t.finish_reason == "length" for t in responses) / len(responses),
        "rollout/tokens_per_s": lengths.sum().item() / seconds,
        "rollout/kept_frac": len(collected.groups) / collected.prompts_used,
    }
    return samples_of(collected.groups, plan.algorithm), collected.prompts_used, metrics


def read_examples(run: Run, done: Progress) -> tuple[list[Sample], int, Metrics]:
    """This step's reference responses (SFT)."""
    count = run.plan.config.batch.prompts_per_step
    samples = []
    for i in range(count):
        prompt, response = run.plan.task.sft_example(done.prompts_seen + i)
        samples.append(Sample((*prompt, *response), len(response), 0.0, (0.0,) * len(response)))
    return samples, count, {"response/length_mean": sum(s.num_response for s in samples) / count}


def pack(run: Run, samples: list[Sample], step: int, mini_batches: int) -> MiniBatches:
    """[mini_batch][micro_batch] of this rank, with the loss weights of each global mini-batch."""
    config, layout = run.plan.config, run.groups.layout
    parts = split_mini_batches(len(samples), mini_batches, step_seed(config, step))
    packed = [
        pack_mini_batch(
            [samples[i] for i in part],
            run.plan.algorithm,
            rank=run.groups.coords.dp,
            num_ranks=layout.dp,
            budget=config.batch.micro_batch_tokens,
            max_response=config.rollout.max_response_tokens,
            multiple=layout.tp,
            rounds=layout.pp if layout.vpp > 1 else 1,
        )
        for part in parts
    ]
    # pipeline stages exchange tensors of one shape
    longest = max(b.token_ids.numel() for part in packed for b in part) if layout.pp > 1 else 1
    return [[pad(b, longest).to(run.groups.device) for b in part] for part in packed]


def score_old(run: Run, mini_batches: MiniBatches) -> tuple[MiniBatches, Metrics]:
    """Fill in old (and reference) log-probs and compare the trainer's with the rollout engine's."""
    flat = [b for part in mini_batches for b in part]
    old = forward_only(run.policy, flat)
    flat = [replace(b, old_logprobs=o.logprobs) for b, o in zip(flat, old)] or flat
    if run.reference is not None:
        reference = forward_only(run.reference, flat)
        flat = [replace(b, ref_logprobs=o.logprobs) for b, o in zip(flat, reference)] or flat
    metrics = mismatch(run, flat)
    batches = iter(flat)
    return [[next(batches) for _ in part] for part in mini_batches], metrics


def mismatch(run: Run, batches: list[PackedBatch]) -> Metrics:
    """How far the trainer's log-probs are from the engine's, d = log pi_old - log mu, over all response tokens."""
    d = torch.cat([(b.old_logprobs - b.rollout_logprobs)[b.loss_mask] for b in batches]).double()
    contributes = reports(run)
    sums = {"n": float(d.numel()), "k3": (d.exp() - 1 - d).sum().item(), "abs": d.abs().sum().item()}
    totals = sum_over_ranks(run.groups, sums, contributes=contributes)
    worst = max_over_ranks(run.groups, d.abs().max().item() if contributes and d.numel() else 0.0)
    return {
        "mismatch/k3": totals["k3"] / totals["n"],
        "mismatch/abs_mean": totals["abs"] / totals["n"],
        "mismatch/abs_max": worst,
    }


def update(run: Run, mini_batches: MiniBatches) -> Metrics:
    """One optimizer step a mini-batch, `epochs` times over."""
    sums: Metrics = {"loss": 0.0}
    norms, lr = [], 0.0
    for mini_batch in mini_batches * run.plan.config.batch.epochs:
        run.training.zero_grad()
        for result in forward_backward(run.policy, mini_batch, run.plan.algorithm.loss):
            sums["loss"] += result.loss.item()
            for name, value in result.metrics.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        grad_norm, lr = run.training.step()
        norms.append(grad_norm)
    sums["positions"] = float(sum(b.token_ids.numel() for part in mini_batches for b in part))
    totals = sum_over_ranks(run.groups, sums, contributes=reports(run))
    tokens, positions = totals.pop("num_tokens"), totals.pop("positions")
    loss = totals.pop("loss") / len(norms)
    return {
        "policy/loss": loss,
        **{name: value / tokens for name, value in totals.items()},
        "optimizer/grad_norm_mean": sum(norms) / len(norms),
        "optimizer/grad_norm_max": max(norms),
        "optimizer/lr": lr,
        "num_positions": positions * run.plan.config.batch.epochs,
    }


def sync_weights(run: Run, version: int) -> Metrics:
    """Send the policy to the engine, then check what arrived: both must give the same log-probs on a probe batch.

    Raises:
        RuntimeError: they differ by more than `weight_sync.max_logprob_diff`, on every rank.
    """
    config = run.plan.config
    start = time.perf_counter()
    run.transfer.send(version)
    metrics = {"weight_sync/seconds": time.perf_counter() - start}
    if config.weight_sync.probe_prompts == 0:
        return metrics
    length = min(config.weight_sync.probe_tokens, config.rollout.max_response_tokens)
    params = SamplingParams(temperature=config.rollout.temperature, max_tokens=length)
    prompts = run.plan.task.eval_prompts(config.weight_sync.probe_prompts)
    groups = on_rank_0(run.groups, lambda: run.engine.generate(prompts, params, seed=config.seed))
    samples = [
        Sample((*t.prompt_ids, *t.response_ids), len(t.response_ids), 0.0, t.rollout_logprobs)
        for g in groups
        for t in g.trajectories
    ]
    (batches,) = pack(run, samples, step=0, mini_batches=1)
    scored = forward_only(replace(run.policy, temperature=config.rollout.temperature), batches)
    diffs = [(o.logprobs - b.rollout_logprobs)[b.loss_mask].abs() for b, o in zip(batches, scored)]
    worst = max_over_ranks(run.groups, max((d.max().item() for d in diffs if d.numel()), default=0.0))
    if not worst <= config.weight_sync.max_logprob_diff:
        raise RuntimeError(
            f"weight sync of policy version {version} is wrong: on {len(samples)} probe sequences the rollout engine's "
            f"log-probs differ from the trainer's by up to {worst:.3g}, allowed is weight_sync.max_logprob_diff="
            f"{config.weight_sync.max_logprob_diff:g}. fp32 differs by about 1e-5, bf16 by up to 1"
        )
    return {**metrics, "weight_sync/logprob_max_diff": worst}


def evaluate(run: Run) -> Metrics:
    """Accuracy on held-out prompts, with one response each."""
    config, plan = run.plan.config, run.plan
    params = evaluation_sampling(config)

    def on_engine() -> Metrics:
        return evaluate_policy(
            run.engine, plan.task, plan.reward, params, num_prompts=config.evaluate.prompts, seed=config.seed
        )

    return on_rank_0(run.groups, on_engine)


def checkpoint(run: Run, done: Progress) -> None:
    """Write checkpoints/step_N."""
    config = run.plan.config
    save_checkpoint(
        config.run_dir / "checkpoints", run.training, run.groups, done, keep_last=config.checkpoint.keep_last
    )


def log_step(run: Run, step: int, metrics: Metrics) -> None:
    """One line of metrics.jsonl; rank 0 only."""
    if run.log is not None:
        run.log.log(step, metrics, phase=run.plan.config.algorithm.get("name", "grpo"))


def finish(run: Run) -> None:
    """Leave the final policy as a HF folder and the report."""
    config = run.plan.config
    if config.checkpoint.export_hf:
        export_hf(run.exporter, config.run_dir / "hf", config.model.path)
    if config.logging.report:
        on_rank_0_only(run.groups, lambda: write_report(config.run_dir))


def reports(run: Run) -> bool:
    """Whether this rank's token sums count: one rank of every tensor-parallel group of the last pipeline stage."""
    return run.groups.is_pipeline_last and run.groups.coords.tp == 0


def step_seed(config: RunConfig, step: int) -> int:
    """A seed for everything random in one step, far from every other step's and run's."""
    return (config.seed * 1_000_003 + step) * 1_000


def main() -> None:
    """Entry point of every rank."""
    arguments = sys.argv[1:]
    if not arguments:
        raise SystemExit("usage: torchrun --nproc-per-node N -m mcore_rl.train CONFIG.yaml key.sub=value ...")
    try:
        train(load_config(arguments[0], arguments[1:]))
    except Exception as error:  # noqa: BLE001  told in words or with its traceback
        tell(error)
        raise SystemExit(exit_code(error)) from None


if __name__ == "__main__":
    main()
