"""How good the policy is at what was held out of training. Called on every rank."""

from __future__ import annotations

from dataclasses import replace

from mcore_rl.functional.reduce import metric_means
from mcore_rl.model.forward import forward_only
from mcore_rl.parallel.collectives import on_rank_0, sum_over_ranks
from mcore_rl.phases import Metrics, add, pack_parts, pair_samples, reports
from mcore_rl.prescoring import score_old
from mcore_rl.rollout.collect import evaluate as evaluate_policy
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.run import Plan, Run, rollout_sampling


def evaluate(run: Run) -> Metrics:
    """Accuracy on held-out prompts, with one sampled response each; of held-out pairs, the share ranked right."""
    metrics = sampled_accuracy(run) if run.plan.config.evaluate.sample else {}
    if "pairs" in run.plan.algorithm.needs:
        metrics |= pairs_ranked(run)
    return metrics


def sampled_accuracy(run: Run) -> Metrics:
    """What `ask` finds, on every rank."""
    return on_rank_0(run.groups, lambda: ask(run.engine, run.plan))


def pairs_ranked(run: Run) -> Metrics:
    """The preference loss's metrics on held-out pairs, as "eval/pairs_*"."""
    algorithm = run.plan.algorithm
    pairs = run.plan.task.eval_pairs(run.plan.config.evaluate.prompts)
    samples = [s for pair in pairs for s in pair_samples(pair)]
    ((batches,), _) = score_old(run, pack_parts(run, [samples], algorithm.unit))
    sums: Metrics = {}
    for batch, out in zip(batches, forward_only(run.policy, batches)):
        add(sums, algorithm.loss(batch, out).metrics)
    means = metric_means(sum_over_ranks(run.groups, sums, contributes=reports(run)))
    return {f"eval/{name.replace('/', '_')}": x for name, x in means.items() if name.startswith("pairs/")}


def ask(engine: RolloutEngine, plan: Plan) -> Metrics:
    """Accuracy of an engine on a plan's held-out prompts: each is answered once, at the evaluation temperature."""
    config = plan.config
    params = replace(rollout_sampling(config), n=1, temperature=config.evaluate.temperature)
    prompts, seed = config.evaluate.prompts, config.seed
    return evaluate_policy(engine, plan.task, plan.reward, params, num_prompts=prompts, seed=seed)
