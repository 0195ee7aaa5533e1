"""The rollout engine against the trainer at equal weights: how far apart, and how much of it is routing."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.measure.stats import Answers, Statistic, mean_of, ratio_of, stack

THRESHOLDS = (1.1, 1.5, 2.0, 5.0)
ICEPOP = (0.5, 5.0)  # token ratios kept, arXiv 2510.18855
MIS_GEO = (0.999, 1.002)  # geometric mean ratios kept
PROBABILITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)  # edges of the engine's probability of the sampled token


def split(trainer: Tensor, on_engine_routes: Tensor, engine: Tensor) -> tuple[Tensor, Tensor]:
    """d = log p_trainer - log p_engine as (numeric, routing) [N]; they sum to d.

    Args:
        trainer: log-probs of the trainer on its own routes.
        on_engine_routes: log-probs of the trainer on the engine's routes.
        engine: log-probs the engine gave.
    """
    return on_engine_routes - engine, trainer - on_engine_routes


def mismatch_statistics(trainer: Tensor, engine: Tensor, answers: Answers) -> dict[str, Statistic]:
    """Distances between two sets of log-probs of the same tokens, sampled by the engine.

    Returns:
        k1, k3: estimates of KL(engine || trainer); k3_reverse: of the other direction, by importance weights.
        abs_mean: mean |d| in nats. prob_abs_mean: mean |difference of probabilities|. beyond_TAU: share of tokens with
        max(ratio, 1 / ratio) > TAU. answers_beyond_e: share of answers with some |d| > 1. pearson: correlation of the
        probabilities. Probabilities apart by more than 0.01 on average, or beyond_2 above 0.1, are called trouble.
    """
    trainer, engine = trainer.double(), engine.double()
    d, prompts = trainer - engine, answers.token_prompts
    p, q = trainer.exp(), engine.exp()
    worst = torch.zeros(len(answers.prompt_ids), dtype=torch.float64)
    worst = worst.scatter_reduce(0, answers.answer_ids, d.abs(), "amax")

    def correlation(s: Tensor) -> Tensor:
        one, x, y, xx, yy, xy = (s[..., i] for i in range(6))
        x, y = x / one, y / one
        return (xy / one - x * y) / ((xx / one - x.square()) * (yy / one - y.square())).sqrt()

    return {
        "k1": mean_of(-d, prompts),
        "k3": mean_of(d.expm1() - d, prompts),
        "k3_reverse": mean_of(d.exp() * ((-d).expm1() + d), prompts),
        "abs_mean": mean_of(d.abs(), prompts),
        "prob_abs_mean": mean_of((p - q).abs(), prompts),
        **{f"beyond_{tau:g}": mean_of((d.abs() > torch.tensor(tau).log()).double(), prompts) for tau in THRESHOLDS},
        "answers_beyond_e": mean_of((worst > 1).double(), answers.prompt_ids),
        "pearson": Statistic(stack(torch.ones(len(p)), p, q, p.square(), q.square(), p * q), prompts, correlation),
    }


def masked_shares(trainer: Tensor, engine: Tensor, answers: Answers) -> dict[str, Statistic]:
    """Share of tokens that corrections at their usual bounds would drop: IcePop by the token's ratio, MIS by the
    geometric mean over its answer."""
    d, prompts = trainer.double() - engine.double(), answers.token_prompts
    found = {}
    for name, log_ratio, (low, high) in (
        ("icepop", d, ICEPOP),
        ("mis_geo", answers.spread(answers.mean(d)), MIS_GEO),
    ):
        outside = (log_ratio.exp() < low) | (log_ratio.exp() > high)
        found[f"masked/{name}"] = mean_of(outside.double(), prompts)
    return found


def by_probability(trainer: Tensor, engine: Tensor, answers: Answers) -> dict[str, Statistic]:
    """bin/LOW-HIGH/abs_mean and /share: mean |d| of the tokens whose probability under the engine lies there, and how
    many they are; an empty bin is left out. Rare tokens differ more, and decide the largest ratios."""
    d, p, prompts = (trainer.double() - engine.double()).abs(), engine.double().exp(), answers.token_prompts
    found = {}
    for low, high in zip(PROBABILITIES, PROBABILITIES[1:]):
        inside = ((p > low) & (p <= high if high < 1 else p > low)).double()
        if inside.any():
            found[f"bin/{low:g}-{high:g}/abs_mean"] = ratio_of(d * inside, inside, prompts)
            found[f"bin/{low:g}-{high:g}/share"] = mean_of(inside, prompts)
    return found
