"""How good the policy is at what was held out of training. Called on every rank."""

from __future__ import annotations

from dataclasses import replace

from mcore_rl.functional.reduce import metric_means
from mcore_rl.model.forward import forward_only
from mcore_rl.parallel.collectives import on_rank_0, sum_over_ranks
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan, rollout_sampling
from mcore_rl.roles.models import Models
from mcore_rl.rollout.collect import evaluate as evaluate_policy
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.step.batches import Metrics, deal, on_rank_0_alone, pair_samples
from mcore_rl.step.scoring import score
from mcore_rl.step.updating import add


def evaluate(plan: Plan, groups: Groups, models: Models, engine: RolloutEngine | None) -> Metrics:
    """Accuracy on held-out prompts, with one sampled response each; of held-out pairs, the share ranked right."""
    metrics = sampled_accuracy(plan, groups, engine) if plan.config.evaluate.sample else {}
    if "pairs" in plan.algorithm.needs:
        metrics |= pairs_ranked(plan, groups, models)
    return metrics


def sampled_accuracy(plan: Plan, groups: Groups, engine: RolloutEngine | None) -> Metrics:
    """What `ask` finds, on every rank."""
    return on_rank_0(groups, lambda: ask(engine, plan))


def pairs_ranked(plan: Plan, groups: Groups, models: Models) -> Metrics:
    """The preference loss's metrics on held-out pairs, as "eval/pairs_*"."""
    algorithm = plan.algorithm
    pairs = plan.task.eval_pairs(plan.config.evaluate.prompts)
    samples = [s for pair in pairs for s in pair_samples(pair)]
    share = deal(plan, groups, on_rank_0_alone(groups, samples), unit=algorithm.unit)
    ((batches,), _) = score(plan, groups, models, share)
    sums: Metrics = {}
    for batch, out in zip(batches, forward_only(models.policy, batches)):
        add(sums, algorithm.loss(batch, out).metrics)
    means = metric_means(sum_over_ranks(groups, sums, contributes=groups.reports))
    return {f"eval/{name.replace('/', '_')}": x for name, x in means.items() if name.startswith("pairs/")}


def ask(engine: RolloutEngine, plan: Plan) -> Metrics:
    """Accuracy of an engine on a plan's held-out prompts: each is answered once, at the evaluation temperature."""
    config = plan.config
    params = replace(rollout_sampling(config), n=1, temperature=config.evaluate.temperature)
    prompts, seed = config.evaluate.prompts, config.seed
    return evaluate_policy(engine, plan.task, plan.reward, params, num_prompts=prompts, seed=seed)
