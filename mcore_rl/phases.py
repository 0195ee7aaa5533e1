"""The phases of one step, each a function of the run and what the phase before it returned. Called on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mcore_rl.config import RunConfig, due
from mcore_rl.data.packing import Sample, pack_mini_batch, pad, split_mini_batches
from mcore_rl.data.preferences import PairIds
from mcore_rl.functional.reduce import metric_means
from mcore_rl.model.checkpoint import Progress
from mcore_rl.model.forward import Model, forward_backward, forward_only
from mcore_rl.model.optimizer import Training
from mcore_rl.parallel.collectives import max_over_ranks, on_rank_0, sum_over_ranks
from mcore_rl.parallel.groups import Groups
from mcore_rl.rollout.engine import RolloutError
from mcore_rl.routing import router_weighted
from mcore_rl.run import Run
from mcore_rl.types import LossOutput, PackedBatch, PolicyOutput, SamplingParams
from mcore_rl.weights.sync import export_hf

Metrics = dict[str, float]
MiniBatches = list[list[PackedBatch]]


def rest_engine(run: Run) -> None:
    """Leave the engine's GPU memory to the trainer until weights are sent, where the configuration asks for that."""
    if run.plan.samples and run.plan.config.rollout.sleep:
        on_rank_0(run.groups, lambda: run.engine.sleep())  # every rank waits: the engine may be on its GPU too


def read_examples(run: Run, done: Progress) -> tuple[list[Sample], Progress, Metrics]:
    """This step's given responses: one an example (SFT), or chosen and rejected after each other (preference pairs)."""
    task, count = run.plan.task, run.plan.config.batch.prompts_per_step
    numbers = range(done.prompts_seen, done.prompts_seen + count)
    if "pairs" in run.plan.algorithm.needs:
        samples = [s for i in numbers for s in pair_samples(task.pair_example(i))]
    else:
        samples = [given_sample(*task.sft_example(i)) for i in numbers]
    metrics = {"response/length_mean": sum(s.num_response for s in samples) / len(samples)}
    return samples, replace(done, prompts_seen=done.prompts_seen + count), metrics


def given_sample(prompt: tuple[int, ...], response: tuple[int, ...]) -> Sample:
    """A response that no engine sampled."""
    return Sample((*prompt, *response), len(response), 0.0, (0.0,) * len(response))


def pair_samples(pair: PairIds) -> list[Sample]:
    """[chosen, rejected] of one preference pair."""
    prompt, chosen, rejected = pair
    return [given_sample(prompt, chosen), given_sample(prompt, rejected)]


def pack(run: Run, samples: list[Sample], step: int, mini_batches: int, unit: int) -> MiniBatches:
    """[mini_batch][micro_batch] of this rank, with the loss weights of each global mini-batch.

    Args:
        unit: this many consecutive samples stay in one micro-batch.
    """
    parts = split_mini_batches(len(samples), mini_batches, step_seed(run.plan.config, step), unit)
    return pack_parts(run, [[samples[i] for i in part] for part in parts], unit)


def pack_parts(run: Run, parts: list[list[Sample]], unit: int = 1, groups: Groups | None = None) -> MiniBatches:
    """`pack` of mini-batches that are given, in the given order; for the ranks of `groups`, or those of the run."""
    config, groups = run.plan.config, groups or run.groups
    layout = groups.layout
    packed = [
        pack_mini_batch(
            part,
            run.plan.algorithm,
            rank=groups.coords.dp,
            num_ranks=layout.dp,
            budget=config.batch.micro_batch_tokens,
            max_response=config.rollout.max_response_tokens,
            multiple=layout.batch_multiple,
            segment_multiple=layout.segment_multiple,
            rounds=layout.pp if layout.vpp > 1 else 1,
            unit=unit,
        )
        for part in parts
    ]
    # pipeline stages exchange tensors of one shape
    longest = max(b.token_ids.numel() for part in packed for b in part) if layout.pp > 1 else 1
    return [[pad(b, longest).to(groups.device) for b in part] for part in packed]


def largest(differences: list[torch.Tensor]) -> float:
    """The largest absolute value in any of the tensors, NaN if one holds a NaN, 0 if there are no elements."""
    return torch.cat([torch.zeros(1), *(d.detach().flatten().cpu().float().abs() for d in differences)]).max().item()


def update(run: Run, mini_batches: MiniBatches, step: int) -> Metrics:
    """One optimizer step a mini-batch, `epochs` times over, of the critic and, after its warm-up, of the policy."""
    config, algorithm = run.plan.config, run.plan.algorithm
    metrics: Metrics = {}
    rounds = mini_batches * config.batch.epochs
    if run.critic is not None:

        def value_loss(batch: PackedBatch, out: PolicyOutput) -> LossOutput:
            return algorithm.value_loss(batch, out.values)

        metrics |= optimise(run, run.trained["critic"], run.critic, rounds, value_loss, "critic")
    if run.critic is None or step >= config.critic.warmup_steps:
        after = updates_exporter(run, step)
        metrics |= optimise(run, run.trained["policy"], run.policy, rounds, algorithm.loss, "policy", after)
    positions = float(sum(b.token_ids.numel() for part in mini_batches for b in part))
    totals = sum_over_ranks(run.groups, {"positions": positions * config.batch.epochs}, contributes=reports(run))
    return {**metrics, "num_positions": totals["positions"]}


def updates_exporter(run: Run, step: int) -> Callable[[int], object] | None:
    """Of `moe.export_every`: leaves the policy as updates/step_N/K after optimizer step K of training step N."""
    config = run.plan.config
    if not due(config.moe.export_every, step + 1):
        return None
    return lambda k: export_hf(run.exporter, config.run_dir / f"updates/step_{step + 1:06d}/{k}", config.model.path)


def adapt_kl(run: Run, metrics: Metrics, num_samples: int) -> Run:
    """The run with the KL coefficient of the next step."""
    algorithm = run.plan.algorithm.adapt_kl(metrics.get("policy/kl_rollout", 0.0), num_samples)
    return replace(run, plan=replace(run.plan, algorithm=algorithm))


def optimise(
    run: Run,
    training: Training,
    model: Model,
    mini_batches: MiniBatches,
    loss: Callable[[PackedBatch, PolicyOutput], LossOutput],
    name: str,
    after: Callable[[int], object] | None = None,
) -> Metrics:
    """Optimizer steps of one model; its losses and metrics averaged over them. `after` is told each one's number."""
    sums: Metrics = {"num_loss": 0.0}
    norms, lr = [], 0.0
    moe = run.plan.config.moe
    for mini_batch in mini_batches:
        if moe.router_shift and name == "policy":
            mini_batch = router_weighted(run.policy, mini_batch, moe.router_shift_floor)
        training.zero_grad()
        for result in forward_backward(model, mini_batch, loss):
            sums["num_loss"] += result.loss.item()
            add(sums, result.metrics)
        grad_norm, lr = training.step()
        norms.append(grad_norm)
        if after is not None:
            after(len(norms))
    totals = sum_over_ranks(run.groups, sums, contributes=reports(run))
    optimizer = "optimizer" if name == "policy" else f"{name}_optimizer"
    return {
        f"{name}/loss": totals.pop("num_loss") / len(norms),
        **metric_means(totals),
        f"{optimizer}/grad_norm_mean": sum(norms) / len(norms),
        f"{optimizer}/grad_norm_max": max(norms),
        f"{optimizer}/lr": lr,
    }


def add(sums: Metrics, metrics: dict[str, torch.Tensor]) -> None:
    """Add a batch's metrics to the sums so far."""
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + value.item()


def sync_weights(run: Run, version: int) -> Metrics:
    """Send the policy to the engine, which checks that every tensor arrived, then see that both give the same log-probs
    on a probe batch.

    Where two experts are chosen within rounding of each other, trainer and engine may differ although their weights are
    the same, on a few sequences in thousands; so a probe that fails is repeated with others: wrong weights fail again.

    Raises:
        RolloutError: a tensor is not the trainer's, or not in the engine as it was sent, and is named; or log-probs
            differ by more than `weight_sync.max_logprob_diff` on both probes. On every rank.
    """
    config = run.plan.config
    if run.transfer is None:
        return {}
    start = time.perf_counter()
    if config.rollout.sleep and torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine wakes up, and finds what this process only keeps in reserve taken
    seconds = run.transfer.send(version)
    metrics = {"weight_sync/seconds": time.perf_counter() - start}
    metrics |= {f"weight_sync/seconds_{phase}": taken for phase, taken in seconds.items()}
    if config.weight_sync.probe_prompts == 0:
        return metrics
    allowed, diffs = config.weight_sync.max_logprob_diff, []
    while not diffs or not diffs[-1] <= allowed:
        if len(diffs) == 2:
            raise RolloutError(
                f"weight sync of policy version {version} is wrong: on two probes of "
                f"{config.weight_sync.probe_prompts} sequences the rollout engine's log-probs differ from the "
                f"trainer's by up to {diffs[0]:.3g} and {diffs[1]:.3g}, allowed is "
                f"weight_sync.max_logprob_diff={allowed:g}. fp32 differs by about 1e-5, bf16 by up to 1"
            )
        diffs.append(probe_difference(run, len(diffs)))
    metrics["weight_sync/seconds_probe"] = time.perf_counter() - start - metrics["weight_sync/seconds"]
    return {**metrics, "weight_sync/logprob_max_diff": diffs[-1], "weight_sync/repeated_probes": len(diffs) - 1}


def probe_difference(run: Run, number: int) -> float:
    """The largest difference between the engine's and the trainer's log-probs on probe batch `number` (0, 1, ...)."""
    config = run.plan.config
    length = min(config.weight_sync.probe_tokens, config.rollout.max_response_tokens)
    params = SamplingParams(temperature=config.rollout.temperature, max_tokens=length)
    count = config.weight_sync.probe_prompts
    prompts = run.plan.task.eval_prompts(count * (number + 1))[-count:]
    groups = on_rank_0(run.groups, lambda: run.engine.generate(prompts, params, seed=config.seed + number))
    samples = [
        Sample((*t.prompt_ids, *t.response_ids), len(t.response_ids), 0.0, t.rollout_logprobs)
        for g in groups
        for t in g.trajectories
    ]
    (batches,) = pack_parts(run, [samples])
    scored = forward_only(replace(run.policy, temperature=config.rollout.temperature), batches)
    diffs = [(o.logprobs - b.rollout_logprobs)[b.loss_mask] for b, o in zip(batches, scored)]
    return max_over_ranks(run.groups, largest(diffs))


def reports(run: Run) -> bool:
    """Whether this rank's token sums count: of the ranks that know the same numbers, one a micro-batch."""
    return run.groups.reports


def step_seed(config: RunConfig, step: int) -> int:
    """A seed for everything random in one step, far from every other step's and run's."""
    return (config.seed * 1_000_003 + step) * 1_000
