"""A rollout engine against the trainer at equal weights, measured: who samples is given, so any engine can be asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.measure.compare import Estimates, exactly, prefixed
from moe.measure.flips import flip_statistics
from moe.measure.mismatch import by_probability, masked_shares, mismatch_statistics, split
from moe.measure.probe import Probe, Tokens, read_rows
from moe.measure.stats import Answers, estimates, joint, mean_of, ratio_of
from moe.record import hf
from moe.record.trace import RoutingTrace
from moe.studies.setting import Asked, load_tokenizer, model_facts
from moe.studies.study import Study


@dataclass(frozen=True)
class EngineAnswer:
    """One answer of a rollout engine.

    Attributes:
        tokens: of the answer. logprobs: as many, of the distribution that was sampled from.
        expert_ids: [n - 1, L, K] of prompt and answer, n tokens, or None.
    """

    tokens: Tokens
    logprobs: tuple[float, ...]
    expert_ids: Tensor | None


class Engine(Protocol):
    """A rollout engine that samples at temperature 1: `num_answers` answers to each prompt, all of that `rounds` times
    over with the same seed."""

    def __call__(
        self,
        model: str,
        dtype: str,
        prompts: Sequence[Tokens],
        num_answers: int,
        max_tokens: int,
        seed: int,
        rounds: int,
    ) -> list[list[list[EngineAnswer]]]: ...


def mismatch_study(
    asked: Asked, model_path: Path, engine: Engine, dtypes: Sequence[str] = ("float32", "bfloat16")
) -> Study:
    """D9: a rollout engine in each of `dtypes` against transformers in `asked.dtype`, on its own routes and on the
    engine's.

    Raises:
        ValueError: the engine returned no routes, or no such model or file.
    """
    started = time.monotonic()
    if asked.prompts is None:
        raise ValueError("the engine samples the answers itself: give --prompts, not --rollouts")
    rows = read_rows(asked.prompts)[: asked.limit]
    tokenizer = load_tokenizer(model_path, rows)
    model = hf.load_model(model_path, getattr(torch, asked.dtype))
    prompts = [
        tuple(tokenizer.encode(r["prompt"])) if isinstance(r["prompt"], str) else tuple(r["prompt"]) for r in rows
    ]
    found, tokens = {}, 0
    for dtype in dtypes:
        asked.say(f"engine in {dtype}: {asked.answers} answers to each of {len(prompts)} prompts, twice")
        answered, again = engine(str(model_path), dtype, prompts, asked.answers, asked.max_tokens, asked.seed, rounds=2)
        measured, tokens = _mismatch(model, prompts, answered, asked.draws)
        found |= prefixed(f"mismatch/{dtype}", measured | _repeat_floor(answered, again))
    facts = {
        "old": str(model_path),
        "prompts": len(prompts),
        "answers": len(prompts) * asked.answers,
        "answer tokens": tokens,
        **model_facts(model),
        "trainer": f"transformers, {asked.dtype}",
        "seed": asked.seed,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }
    return Study("mismatch", asked.command, facts, found)


def _repeat_floor(first: list[list[EngineAnswer]], again: list[list[EngineAnswer]]) -> Estimates:
    """floor/..: the same engine, weights, prompts and seeds twice."""
    pairs = [pair for answers in zip(first, again) for pair in zip(*answers)]
    same = [(a, b) for a, b in pairs if a.tokens == b.tokens]
    worst = max((abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs)), default=0.0)
    return {"floor/abs_max": exactly(worst), "floor/other_answers": exactly(1 - len(same) / len(pairs))}


@torch.no_grad()
def _mismatch(
    model: Any, prompts: Sequence[Tokens], answered: list[list[EngineAnswer]], draws: int
) -> tuple[dict, int]:
    flat = [(i, answer) for i, answers in enumerate(answered) for answer in answers]
    if any(answer.expert_ids is None for _, answer in flat):
        raise ValueError("the engine returned no routes, so nothing can be replayed; open it with return_routes")
    probe = Probe(
        tuple(prompts[i] + answer.tokens for i, answer in flat),
        tuple(len(prompts[i]) for i, _ in flat),
        torch.tensor([i for i, _ in flat]),
    )
    answers = probe.answers
    free, own, _ = hf.forward_with_logits(model, probe.sequences, None)
    ids = own.expert_ids.clone()
    for start, (_, answer) in zip(own.cu_seqlens.tolist(), flat):  # the last token was never computed: its own route
        ids[start : start + len(answer.expert_ids)] = answer.expert_ids.to(ids.dtype)
    engine_routes = RoutingTrace(ids, None, None, own.num_experts, own.cu_seqlens)
    replayed = hf.forward_with_logits(model, probe.sequences, engine_routes)[0]
    engine = torch.tensor([x for _, answer in flat for x in answer.logprobs], dtype=torch.float64)
    trainer, on_engine = (probe.scored(x).double() for x in (free, replayed))
    found = {}
    for name, logprobs in (("free", trainer), ("replayed", on_engine)):
        statistics = mismatch_statistics(logprobs, engine, answers) | masked_shares(logprobs, engine, answers)
        statistics |= by_probability(logprobs, engine, answers)
        found |= prefixed(name, estimates(statistics, draws))
        found[f"{name}/abs_max"] = exactly((logprobs - engine).abs().max())
    flips = flip_statistics(ids[probe.rows], own.expert_ids[probe.rows], answers.token_prompts)
    found |= prefixed("flips", estimates(flips, draws))
    return found | _split(trainer, on_engine, engine, answers, draws), len(engine)


def _split(trainer: Tensor, on_engine: Tensor, engine: Tensor, answers: Answers, draws: int) -> Estimates:
    """share_routing: what routing adds to the mean square of d; free_over_replayed/k3."""
    numeric, _ = split(trainer, on_engine, engine)
    whole = trainer - engine
    statistics = {
        "share_routing": ratio_of(whole.square() - numeric.square(), whole.square(), answers.token_prompts),
        "free_over_replayed/k3": joint(
            [mean_of(d.expm1() - d, answers.token_prompts) for d in (whole, numeric)], lambda v: v[..., 0] / v[..., 1]
        ),
    }
    return estimates(statistics, draws)
