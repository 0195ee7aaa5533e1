"""The trainer's weights into the rollout engine, and the check that both then say the same."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from mcore_rl.config import WeightSyncConfig
from mcore_rl.data.sequences import Sample, Sequences
from mcore_rl.model.forward import Policy, forward_only
from mcore_rl.parallel.collectives import max_abs_over_ranks, on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.rollout.engine import RolloutEngine, RolloutError
from mcore_rl.rollout.transfer.transfer import WeightTransfer
from mcore_rl.step.batches import Metrics, bare, deal, flat_responses, full_batches
from mcore_rl.types import SamplingParams


def rest_engine(plan: Plan, groups: Groups, engine: RolloutEngine | None) -> None:
    """Leave the engine's GPU memory to the trainer until weights are sent, where the configuration asks for that."""
    if plan.samples and plan.config.rollout.sleep:
        on_rank_0(groups, lambda: engine.sleep())  # every rank waits: the engine may be on its GPU too


def probe_is_due(config: WeightSyncConfig, version: int, metrics: Metrics) -> bool:
    """Whether a sync ends with a probe: the first, every `probe_every`-th, and where the step before it saw trainer and
    engine differ by more than a probe allows, or by what is no number."""
    seen = metrics.get("mismatch/abs_max", 0.0)
    return version % config.probe_every == 0 or not seen <= config.max_logprob_diff


def sync_weights(
    plan: Plan,
    groups: Groups,
    policy: Policy,
    engine: RolloutEngine | None,
    transfer: WeightTransfer | None,
    version: int,
    probe: bool = True,
) -> Metrics:
    """Send the policy to the engine, which checks that every tensor arrived, then, with `probe`, see that both give the
    same log-probs on a probe batch.

    Where two experts are chosen within rounding of each other, trainer and engine may differ although their weights are
    the same, on a few sequences in thousands; so a probe that fails is repeated with others: wrong weights fail again.

    Raises:
        RolloutError: a tensor is not the trainer's, or not in the engine as it was sent, and is named; or log-probs
            differ by more than `weight_sync.max_logprob_diff` on both probes. On every rank.
    """
    config = plan.config
    if transfer is None:
        return {}
    start = time.perf_counter()
    if config.rollout.sleep and torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine wakes up, and finds what this process only keeps in reserve taken
    seconds = transfer.send(version)
    metrics = {"weight_sync/seconds": time.perf_counter() - start}
    metrics |= {f"weight_sync/seconds_{phase}": taken for phase, taken in seconds.items()}
    if config.weight_sync.probe_prompts == 0 or not probe:
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
        diffs.append(probe_difference(plan, groups, policy, engine, len(diffs)))
    metrics["weight_sync/seconds_probe"] = time.perf_counter() - start - metrics["weight_sync/seconds"]
    return {**metrics, "weight_sync/logprob_max_diff": diffs[-1], "weight_sync/repeated_probes": len(diffs) - 1}


def probe_difference(
    plan: Plan, groups: Groups, policy: Policy, engine: RolloutEngine | None, number: int
) -> float:
    """The largest difference between the engine's and the trainer's log-probs on probe batch `number` (0, 1, ...)."""
    config = plan.config
    length = min(config.weight_sync.probe_tokens, config.rollout.max_response_tokens)
    params = SamplingParams(temperature=config.rollout.temperature, max_tokens=length)
    count = config.weight_sync.probe_prompts
    prompts = plan.task.eval_prompts(count * (number + 1))[-count:]
    samples: list[Sample] = []

    def sample() -> None:
        for group in engine.generate(prompts, params, seed=config.seed + number):
            samples.extend(
                Sample(np.append(t.prompt_ids, t.response_ids), len(t.response_ids), 0.0, t.rollout_logprobs)
                for t in group.trajectories
            )

    on_rank_0(groups, sample)
    share = deal(plan, groups, Sequences.of(samples))
    batches = full_batches(plan, groups, share)
    scored = forward_only(replace(policy, temperature=config.rollout.temperature), bare(batches))
    found = flat_responses(share, batches, [o.logprobs for o in scored]).cpu()
    difference = found - torch.from_numpy(share.mine.rollout_logprobs)
    return max_abs_over_ranks(groups, [difference], contributes=groups.is_pipeline_last)
