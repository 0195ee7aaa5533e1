"""The discriminator's own learning: a warm-up before the first step, and updates after the policy's.

What it says of responses is in `judging.judge`. Within a step it never changes between the first score and the policy's
last update: no batch has rewards of two versions. Called on every rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from mcore_rl.algorithms.gapo import GAPO
from mcore_rl.config import RunConfig
from mcore_rl.data.real_fake import DiscriminatorState, draw_batch
from mcore_rl.data.sequences import Sequences
from mcore_rl.functional.discriminator import KINDS, Normaliser
from mcore_rl.model.checkpoint import Progress
from mcore_rl.parallel.collectives import on_rank_0
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.roles.models import Models
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.transfer.transfer import WeightTransfer
from mcore_rl.step.batches import Metrics, bare, deal, packed, step_seed
from mcore_rl.step.collecting import answers
from mcore_rl.step.judging import judge, scored_sample
from mcore_rl.step.syncing import rest_engine, sync_weights
from mcore_rl.step.updating import optimise
from mcore_rl.types import LossOutput, PackedBatch, PolicyOutput

WARMUP_SEEDS = 500  # added to the first step's seed; no step samples so many times


def warm_up_discriminator(
    plan: Plan,
    groups: Groups,
    models: Models,
    engine: RolloutEngine | None,
    transfer: WeightTransfer | None,
    done: Progress,
) -> tuple[Progress, Metrics]:
    """Let it learn from the data and from responses of the untrained policy, until it is good enough to teach.

    A round samples responses to new prompts, measures, and trains. The last measurement is returned.
    """
    config, metrics = plan.config, {}
    if models.discriminator is None:
        return done, metrics
    target, count = config.discriminator.warmup_accuracy, config.batch.prompts_per_step
    for round_ in range(config.discriminator.warmup_rounds):
        seen = done.prompts_seen
        rollouts = answers(plan, groups, engine, seen, step_seed(config, 0) + WARMUP_SEEDS + round_)
        _, state, metrics = judge(plan, groups, models.discriminator, rollouts, done.discriminator, seen)
        metrics["discriminator/warmup_rounds"] = round_ + 1
        rest_engine(plan, groups, engine)
        if state.accuracy < target:
            state, trained = learn(plan, groups, models, state, config.discriminator.warmup_steps)
            metrics |= trained
        state = remember(config, state, seen)
        done = replace(done, prompts_seen=seen + count, discriminator=state)
        if config.rollout.sleep:
            sync_weights(plan, groups, models.policy, engine, transfer, done.policy_version)
        if groups.rank == 0:
            print(f"discriminator, warm-up {round_ + 1}: {state.accuracy:.3f} right on held-out sequences", flush=True)
        if state.accuracy >= target:
            break
    return done, metrics


def update_discriminator(plan: Plan, groups: Groups, models: Models, done: Progress) -> tuple[Progress, Metrics]:
    """The updates that are due after this step's policy updates; see `GAPO.steps_due`."""
    if models.discriminator is None:
        return done, {}
    algorithm: GAPO = plan.algorithm
    state, metrics = learn(plan, groups, models, done.discriminator, algorithm.steps_due(done.discriminator.accuracy))
    return replace(done, discriminator=remember(plan.config, state, done.prompts_seen)), metrics


def learn(
    plan: Plan, groups: Groups, models: Models, state: DiscriminatorState, updates: int
) -> tuple[DiscriminatorState, Metrics]:
    """Optimizer steps on real against rejected and generated sequences; "discriminator/train_*" are their means.

    The normaliser begins anew: scores of one version do not compare with those of another.
    """
    if updates == 0:
        return state, {}
    config, drawn = plan.config.discriminator, []

    def draw() -> int:
        after = state
        for i in range(updates):
            rng = random.Random(f"discriminator/{plan.config.seed}/{state.updates + i}")
            batch, after = draw_batch(plan.task, after, config, rng)
            drawn.extend(scored_sample(x.token_ids, x.kind) for x in batch)
        return after.examples_seen

    examples_seen = on_rank_0(groups, draw)
    algorithm: GAPO = plan.algorithm
    unit = 2 if algorithm.discriminator_objective == "bradley_terry" else 1
    share = deal(plan, groups, Sequences.of(drawn), [config.batch_size] * updates, unit)
    mini_batches = [bare(packed(groups, share.mine, parts)) for parts in share.mini_batches]
    loss = discriminator_loss(algorithm, config.batch_size)
    training = models.trained["discriminator"]
    metrics = optimise(groups, training, models.discriminator, mini_batches, loss, "discriminator")
    of_kinds = {name: metrics.pop(name) for name in list(metrics) if name.split("/")[0] in KINDS}
    renamed = {f"discriminator/train_{name.replace('/', '_')}": x for name, x in of_kinds.items()}
    after = replace(state, updates=state.updates + updates, examples_seen=examples_seen, normaliser=Normaliser())
    return after, metrics | renamed


def remember(config: RunConfig, state: DiscriminatorState, prompts_seen: int) -> DiscriminatorState:
    """The step's responses go into the buffer."""
    rng = random.Random(f"discriminator/{config.seed}/buffer/{prompts_seen}")
    return state.remembered(config.discriminator.buffer_size, rng)


def discriminator_loss(algorithm: GAPO, num_sequences: int) -> Callable[[PackedBatch, PolicyOutput], LossOutput]:
    """The share that a micro-batch has in the loss of `num_sequences`, the whole mini-batch."""

    def loss(batch: PackedBatch, out: PolicyOutput) -> LossOutput:
        scores = out.values[batch.loss_mask]
        kinds = batch.labels[batch.segment_ids[batch.loss_mask]]
        return algorithm.discriminator_loss(scores, kinds, scores.new_full(scores.shape, 1 / num_sequences))

    return loss
