"""One rank of one layout: one step of every algorithm, of a critic and of a discriminator, and trajectories through the
loop's own phases.

Run by `tests/invariance/test_training_layouts.py`, on its ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from frozen_rollout import gather_logprobs, gradients, make_labelled, make_samples  # noqa: E402
from worlds import each_world  # noqa: E402

from mcore_rl import algorithms  # noqa: E402
from mcore_rl.config import OptimizerConfig, RunConfig, parse_config  # noqa: E402
from mcore_rl.data.scores import Scores  # noqa: E402
from mcore_rl.data.sequences import Sequences  # noqa: E402
from mcore_rl.model import optimizer as optimizer_module  # noqa: E402
from mcore_rl.model.build import build_model, read_hf_config  # noqa: E402
from mcore_rl.model.forward import Policy, Scorer, forward_backward  # noqa: E402
from mcore_rl.model.heads import as_scorer  # noqa: E402
from mcore_rl.model.optimizer import build_training  # noqa: E402
from mcore_rl.parallel import groups as process_groups  # noqa: E402
from mcore_rl.parallel.collectives import sum_over_ranks  # noqa: E402
from mcore_rl.parallel.layout import ParallelLayout  # noqa: E402
from mcore_rl.planning.plan import reference_layout
from mcore_rl.roles.models import Models  # noqa: E402
from mcore_rl.roles.reference import update_reference
from mcore_rl.step.batches import bare, deal, packed, share_of_step
from mcore_rl.step.discriminating import discriminator_loss  # noqa: E402
from mcore_rl.step.judging import scored_sample  # noqa: E402
from mcore_rl.step.scoring import mini_batches_of, score  # noqa: E402
from mcore_rl.step.updating import update
from mcore_rl.types import WeightedBatch  # noqa: E402
from mcore_rl.weights.hf_read import load_hf  # noqa: E402
from mcore_rl.weights.shards import megatron_shards  # noqa: E402
from mcore_rl.weights.sync import WeightExporter  # noqa: E402

STEPS = 5
KL = dict(kl_coef=0.05, entropy_coef=0.01)  # in every algorithm that has them, so that those terms are compared too
# So that some tokens are clipped after small steps; no ratio is within 1e-4 of the bounds, where rounding would decide.
CLIP = dict(clip_low=0.07, clip_high=0.07)
TRAJECTORIES = {"grpo": KL | CLIP, "gspo": {}, "ppo": dict(kl_coef=0.05) | CLIP}
# Adam with a small eps turns the rounding noise of its first steps into steps of full size.
OPTIMIZERS = {"sgd": dict(name="sgd", lr=0.2, clip_grad=0.5), "adam": dict(lr=1e-3, eps=1e-3, clip_grad=0.5)}


class PaddedLayout(ParallelLayout):
    """Every sequence fills the room of the longest one: a padded batch."""

    segment_multiple = batch_multiple = 24


def run_case(case: dict[str, Any], groups) -> None:
    """Everything that is compared, of one layout, into `case["out"]`."""
    if case.get("padded"):
        groups = replace(groups, layout=PaddedLayout(**vars(groups.layout)))
    config = config_of(case)
    if config.parallel.overlap_grad_reduce:  # many buckets, of which the first are sent while others are computed
        optimizer_module.DistributedDataParallelConfig = partial(
            optimizer_module.DistributedDataParallelConfig, bucket_size=5_000
        )
    policy = trained_policy(config, groups, "adam")
    if config.parallel.overlap_grad_reduce and config.parallel.pp == 1:  # stages behind the first have one for all
        assert len(policy.training.chunks[0].bucket_groups) > 3
    found: dict[str, Any] = {"steps": one_step_each(config, groups, policy), "trajectories": {}}
    optimizers = case.get("optimizers") or ["adam" if config.parallel.distributed_optimizer else "sgd"]
    for optimizer in optimizers:
        for name, fields in TRAJECTORIES.items():
            found["trajectories"][name, optimizer] = trajectory(config, groups, name, fields, optimizer)
    if groups.rank == 0:
        torch.save(found, case["out"])


def config_of(case: dict[str, Any]) -> RunConfig:
    axes = {name: size for name, size in case["layout"].items() if name != "dp"}
    return parse_config(
        {
            "name": "layouts",
            "model": {"path": case["source"], "recompute": case.get("recompute", "none")},
            "parallel": axes | {key: case.get(key, False) for key in ("distributed_optimizer", "overlap_grad_reduce")},
            "batch": {"micro_batch_tokens": case["budget"], "mini_batches": 2, "logprob_chunk_tokens": 7},
            "rollout": {"temperature": 0.8, "max_response_tokens": 16},
            "reference": {"update_every": 3, "parallel": case.get("reference")},
        }
    )


# ------------------------------------------------------------------------------------------------------------- models


def trained_policy(config: RunConfig, groups, optimizer: str) -> SimpleNamespace:
    """A policy as it is on disk, its optimizer and its exporter."""
    hf_config = read_hf_config(config.model.path)
    chunks = build_model(hf_config, config.model, groups)
    load_hf(config.model.path, megatron_shards(chunks, hf_config, groups))
    training = build_training(chunks, OptimizerConfig(**OPTIMIZERS[optimizer]), config.parallel, total_steps=100)
    return SimpleNamespace(
        chunks=chunks,
        training=training,
        exporter=WeightExporter(chunks, hf_config, groups),
        model=as_policy(config, groups, training.chunks),
    )


def as_policy(config: RunConfig, groups, chunks) -> Policy:
    batch = config.batch
    vocab_size = read_hf_config(config.model.path).vocab_size
    return Policy(chunks, groups, vocab_size, config.rollout.temperature, batch.logprob_chunk_tokens)


def frozen_policy(config: RunConfig, groups) -> Policy:
    """A reference that is not where the policy starts, in the case's layout for it."""
    hf_config = read_hf_config(config.model.path)
    if config.reference.parallel is not None:
        layout = reference_layout(config, hf_config, groups.world_size)
        groups = process_groups.another(groups, layout, timeout_s=60)
    with groups.active():
        chunks = build_model(hf_config, config.model, groups)
    load_hf(config.model.path, megatron_shards(chunks, hf_config, groups))
    for weight in (p for chunk in chunks for p in chunk.parameters()):
        weight.data.mul_(0.97)
    return as_policy(config, groups, chunks)


def trained_critic(config: RunConfig, groups, optimizer: str) -> SimpleNamespace:
    """The backbone with a head that says something."""
    hf_config = as_scorer(read_hf_config(config.model.path))
    chunks = build_model(hf_config, config.model, groups)
    shards = megatron_shards(chunks, hf_config, groups)
    load_hf(config.model.path, [s for s in shards if s.hf_name != "score.weight"])
    for shard in (s for s in shards if s.hf_name == "score.weight"):
        shard.view.copy_(0.1 * torch.arange(shard.view.numel()).sin().view_as(shard.view))
    training = build_training(chunks, OptimizerConfig(**OPTIMIZERS[optimizer]), config.parallel, total_steps=100)
    exporter = WeightExporter(chunks, hf_config, groups)
    return SimpleNamespace(chunks=chunks, training=training, exporter=exporter, model=Scorer(training.chunks, groups))


# --------------------------------------------------------------------------------------------------------------- steps


def one_step_each(config: RunConfig, groups, policy: SimpleNamespace) -> dict[str, Any]:
    """Sums of the loss and of every metric, and gradients, by algorithm, "critic", and objective of GAPO."""
    grpo = frozen_batches(config, groups, algorithms.load("grpo"))
    found: dict[str, Any] = {"logprobs": gather_logprobs(policy.model, grpo, groups)}
    for name in algorithms.available():
        fields = {} if "pairs" in algorithms.load(name).needs else KL
        algorithm = algorithms.load(name, **fields)
        batches = frozen_batches(config, groups, algorithm)
        found[name] = accumulated(config, groups, policy, batches, algorithm.loss)
    ppo, critic = algorithms.load("ppo"), trained_critic(config, groups, "adam")
    batches = [replace(b, values=b.advantages, returns=b.old_logprobs) for b in grpo]
    found["critic"] = accumulated(config, groups, critic, batches, lambda b, out: ppo.value_loss(b, out.values))
    for objective, unit in (("bce", 1), ("bradley_terry", 2)):
        gapo = algorithms.load("gapo", discriminator_objective=objective)
        samples = [scored_sample(x.token_ids, x.kind) for x in make_labelled()]
        owned = Sequences.of(samples if groups.rank == 0 else [])
        share = deal(SimpleNamespace(config=config, algorithm=gapo), groups, owned, unit=unit)
        batches = bare(packed(groups, share.mine, share.mini_batches[0]))
        discriminator = trained_critic(config, groups, "adam")
        loss = discriminator_loss(gapo, len(make_labelled()))
        found[objective] = accumulated(config, groups, discriminator, batches, loss)
    return found


def frozen_batches(config: RunConfig, groups, algorithm) -> list[WeightedBatch]:
    """This rank's micro-batches, with log-probs that are not the policy's."""
    plan = SimpleNamespace(config=config, algorithm=algorithm)
    share = deal(plan, groups, owned_samples(groups), unit=algorithm.unit)
    (batches,) = mini_batches_of(groups, share, Scores.of(share.mine, groups.device))
    return [replace(b, old_logprobs=b.rollout_logprobs, ref_logprobs=b.rollout_logprobs + 0.1) for b in batches]


def owned_samples(groups) -> Sequences:
    """The rollout, on rank 0."""
    return Sequences.of(make_samples() if groups.rank == 0 else [])


def accumulated(config: RunConfig, groups, model: SimpleNamespace, batches, loss: Callable) -> dict[str, Any]:
    model.training.zero_grad()
    sums = {"loss": 0.0}
    for result in forward_backward(model.model, batches, loss):
        sums["loss"] += result.loss.item()
        for key, value in result.metrics.items():
            sums[key] = sums.get(key, 0.0) + value.item()
    found: dict[str, Any] = {"sums": sum_over_ranks(groups, sums, contributes=groups.reports)}
    if not config.parallel.distributed_optimizer:  # there each rank holds the reduced gradient of its own part only
        found["grads"] = gradients(model.chunks, model.exporter)
    return found


def trajectory(config: RunConfig, groups, name: str, fields: dict[str, Any], optimizer: str) -> dict[str, Any]:
    """Metrics of every step of the loop's own scoring and updating, and the weights they lead to."""
    run = open_run(config, groups, name, fields, optimizer)
    return {"steps": [one_step(run, step) for step in range(STEPS)], "weights": weights_of(run)}


def open_run(config: RunConfig, groups, name: str, fields: dict[str, Any], optimizer: str) -> SimpleNamespace:
    """As much of a `mcore_rl.run.Run` as scoring and updating a given rollout take."""
    algorithm, policy = algorithms.load(name, **fields), trained_policy(config, groups, optimizer)
    critic = trained_critic(config, groups, optimizer) if "critic" in algorithm.needs else None
    models = {"policy": policy} | ({"critic": critic} if critic else {})
    return SimpleNamespace(
        plan=SimpleNamespace(config=config, algorithm=algorithm, hf_config=read_hf_config(config.model.path)),
        groups=groups,
        models=Models(
            trained={role: model.training for role, model in models.items()},
            policy=policy.model,
            reference=frozen_policy(config, groups) if "reference" in algorithm.needs else None,
            critic=critic and critic.model,
        ),
        exporters={role: model.exporter for role, model in models.items()},
    )


def one_step(run: SimpleNamespace, step: int) -> dict[str, float]:
    """Metrics of a step of two mini-batches: in the second the policy has left that of the old log-probs."""
    plan, groups, models = run.plan, run.groups, run.models
    mini_batches, scored = score(plan, groups, models, share_of_step(plan, groups, owned_samples(groups), step))
    metrics = scored | update(plan, groups, models, run.exporters["policy"], mini_batches, step)
    update_reference(plan, models.policy, models.reference, step + 1)
    del metrics["num_positions"]  # how much is filled up is the layout's
    return metrics


def weights_of(run: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {
        f"{role}/{name}": tensor.clone()
        for role, exporter in run.exporters.items()
        for name, tensor in exporter
        if tensor is not None
    }


if __name__ == "__main__":
    each_world(sys.argv[1], run_case)
