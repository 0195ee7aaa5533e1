"""The discriminator's own learning: a warm-up before the first step, and updates after the policy's.

What it says of responses is in `scoring.judge`. Within a step it never changes between the first score and the policy's
last update: no batch has rewards of two versions. Called on every rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from mcore_rl.algorithms.gapo import GAPO
from mcore_rl.collecting import answers
from mcore_rl.data.packing import Sample
from mcore_rl.data.real_fake import DiscriminatorState, Labelled, draw_batch
from mcore_rl.functional.discriminator import KINDS, Normaliser
from mcore_rl.model.checkpoint import Progress
from mcore_rl.phases import Metrics, optimise, pack_parts, rest_engine, step_seed, sync_weights
from mcore_rl.run import Run
from mcore_rl.scoring import judge, scored_sample
from mcore_rl.types import LossOutput, PackedBatch, PolicyOutput

WARMUP_SEEDS = 500  # added to the first step's seed; no step samples so many times


def warm_up_discriminator(run: Run, done: Progress) -> tuple[Progress, Metrics]:
    """Let it learn from the data and from responses of the untrained policy, until it is good enough to teach.

    A round samples responses to new prompts, measures, and trains. The last measurement is returned.
    """
    config, metrics = run.plan.config, {}
    if run.discriminator is None:
        return done, metrics
    target, count = config.discriminator.warmup_accuracy, config.batch.prompts_per_step
    for round_ in range(config.discriminator.warmup_rounds):
        prompts = [run.plan.task.train_prompt(done.prompts_seen + i) for i in range(count)]
        groups = answers(run, prompts, step_seed(config, 0) + WARMUP_SEEDS + round_)
        _, state, metrics = judge(run, groups, done.discriminator, done.prompts_seen)
        metrics["discriminator/warmup_rounds"] = round_ + 1
        rest_engine(run)
        if state.accuracy < target:
            state, trained = learn(run, state, config.discriminator.warmup_steps)
            metrics |= trained
        state = remember(run, state, done.prompts_seen)
        done = replace(done, prompts_seen=done.prompts_seen + count, discriminator=state)
        if config.rollout.sleep:
            sync_weights(run, done.policy_version)
        if run.log is not None:
            print(f"discriminator, warm-up {round_ + 1}: {state.accuracy:.3f} right on held-out sequences", flush=True)
        if state.accuracy >= target:
            break
    return done, metrics


def update_discriminator(run: Run, done: Progress) -> tuple[Progress, Metrics]:
    """The updates that are due after this step's policy updates; see `GAPO.steps_due`."""
    if run.discriminator is None:
        return done, {}
    algorithm: GAPO = run.plan.algorithm
    state, metrics = learn(run, done.discriminator, algorithm.steps_due(done.discriminator.accuracy))
    return replace(done, discriminator=remember(run, state, done.prompts_seen)), metrics


def learn(run: Run, state: DiscriminatorState, updates: int) -> tuple[DiscriminatorState, Metrics]:
    """Optimizer steps on real against rejected and generated sequences; "discriminator/train_*" are their means.

    The normaliser begins anew: scores of one version do not compare with those of another.
    """
    if updates == 0:
        return state, {}
    plan, config, parts = run.plan, run.plan.config.discriminator, []
    after = state
    for i in range(updates):
        rng = random.Random(f"discriminator/{plan.config.seed}/{state.updates + i}")
        batch, after = draw_batch(plan.task, after, config, rng)
        parts.append([sample_of(x) for x in batch])
    algorithm: GAPO = plan.algorithm
    unit = 2 if algorithm.discriminator_objective == "bradley_terry" else 1
    mini_batches = pack_parts(run, parts, unit)
    loss = discriminator_loss(algorithm, config.batch_size)
    metrics = optimise(run, run.trained["discriminator"], run.discriminator, mini_batches, loss, "discriminator")
    of_kinds = {name: metrics.pop(name) for name in list(metrics) if name.split("/")[0] in KINDS}
    renamed = {f"discriminator/train_{name.replace('/', '_')}": x for name, x in of_kinds.items()}
    return replace(after, updates=state.updates + updates, normaliser=Normaliser()), metrics | renamed


def remember(run: Run, state: DiscriminatorState, prompts_seen: int) -> DiscriminatorState:
    """The step's responses go into the buffer."""
    rng = random.Random(f"discriminator/{run.plan.config.seed}/buffer/{prompts_seen}")
    return state.remembered(run.plan.config.discriminator.buffer_size, rng)


def sample_of(labelled: Labelled) -> Sample:
    """Its kind travels in the place of its advantage."""
    return scored_sample(labelled.token_ids, float(labelled.kind))


def discriminator_loss(algorithm: GAPO, num_sequences: int) -> Callable[[PackedBatch, PolicyOutput], LossOutput]:
    """The share that a micro-batch has in the loss of `num_sequences`, the whole mini-batch."""

    def loss(batch: PackedBatch, out: PolicyOutput) -> LossOutput:
        scores = out.values[batch.loss_mask]
        kinds = batch.advantages[batch.loss_mask].long()
        return algorithm.discriminator_loss(scores, kinds, scores.new_full(scores.shape, 1 / num_sequences))

    return loss
