"""What commands that score answers begin with: models, and answers that were read from a file or are sampled."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe.measure.probe import Probe, Sampler, probe_of_rollouts, read_rows, sampled_probe
from moe.measure.sweep import require_same_architecture
from moe.record import hf

Say = Callable[[str], None]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Asked:
    """What is asked of every command that scores answers.

    Attributes:
        prompts: JSONL of `prompt` and, for rewards, `answer`. rollouts: JSONL of `prompt`, `response`, `reward`.
        limit: prompts taken. answers: sampled for each. max_tokens: of an answer.
        draws: of the bootstrap. dtype: of the weights; float64 makes small steps measurable.
    """

    command: str
    prompts: Path | None = None
    rollouts: Path | None = None
    limit: int = 96
    answers: int = 8
    max_tokens: int = 256
    seed: int = 0
    draws: int = 1000
    dtype: str = "float64"
    say: Say = field(default=print, compare=False)

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.rollouts is None):
            raise ValueError(
                "give either --prompts FILE (JSONL with `prompt` and, for rewards, `answer`; answers are sampled from "
                "the old policy) or --rollouts FILE (JSONL with `prompt`, `response` and, for rewards, `reward`)"
            )


@dataclass(frozen=True)
class Setting:
    """The old policy and the answers that all models score."""

    asked: Asked
    old_path: Path
    old: Any
    tokenizer: Any
    rows: list[dict[str, Any]]  # of the prompts or of the rollouts
    probe: Probe
    started: float

    def facts(self, **more: Any) -> dict[str, Any]:
        """What was looked at, for the report."""
        probe, lengths = self.probe, self.probe.answers.lengths
        return {
            "old": str(self.old_path),
            **more,
            "prompts": int(probe.prompt_ids.max()) + 1,
            "answers": len(probe.sequences),
            "answer tokens": int(lengths.sum()),
            "longest answer": int(lengths.max()),
            "rewards": "none" if probe.rewards is None else f"mean {probe.rewards.double().mean():.3g}",
            **model_facts(self.old),
            "dtype": self.asked.dtype,
            "seed": self.asked.seed,
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - self.started),
        }


def model_facts(model: Any) -> dict[str, Any]:
    routers = hf.routers_of(model)
    shape = (
        f"{len(routers)} MoE layers, {routers[0].num_experts} experts, top-{routers[0].top_k}" if routers else "dense"
    )
    return {"model": shape, "parameters": sum(p.numel() for p in model.parameters())}


def open_setting(asked: Asked, old_path: Path) -> Setting:
    """Load the old policy, and read its answers or let it give them.

    Raises:
        ValueError: no such model or file, or a file that does not fit.
    """
    started = time.monotonic()
    rows = read_rows(asked.prompts or asked.rollouts)
    old = hf.load_model(old_path, getattr(torch, asked.dtype))
    tokenizer = load_tokenizer(old_path, rows)
    if asked.rollouts is not None:
        rows = _of_first_prompts(rows, asked.limit)
        probe = probe_of_rollouts(rows, tokenizer)
    else:
        rows = rows[: asked.limit]
        asked.say(f"sampling {asked.answers} answers to each of {len(rows)} prompts from {old_path}")
        probe = sampled_probe(rows, tokenizer, sampler_of(old, asked, asked.seed))
    return Setting(asked, old_path, old, tokenizer, rows, by_prompt(probe), started)


def load_tokenizer(path: Path, rows: Sequence[dict[str, Any]]) -> Any:
    """The tokenizer of a HF folder; None where there is none and every text is given as token ids.

    Raises:
        ValueError: there is none, and a text.
    """
    from transformers import AutoTokenizer

    if any((path / name).is_file() for name in TOKENIZER_FILES):  # without any, transformers makes an empty one
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    if any(isinstance(row.get(key), str) for row in rows for key in ("prompt", "response")):
        raise ValueError(f"{str(path)!r} has no tokenizer; give prompts and responses as token ids")
    return None


def sampler_of(model: Any, asked: Asked, seed: int) -> Sampler:
    return lambda prompts: hf.sample(model, prompts, asked.answers, asked.max_tokens, seed)


def _of_first_prompts(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    known: dict[str, int] = {}
    return [row for row in rows if known.setdefault(json.dumps(row["prompt"]), len(known)) < limit]


def by_prompt(probe: Probe) -> Probe:
    """The same answers with those to one prompt after each other."""
    return probe.subset(probe.prompt_ids.argsort(stable=True).tolist())


def load_new(setting: Setting, path: Path) -> Any:
    """A later policy. Raises ValueError where its architecture is another, or its weights are not finite."""
    new = hf.load_model(path, getattr(torch, setting.asked.dtype))
    require_same_architecture(setting.old.state_dict(), new.state_dict())
    for name, weight in new.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{str(path)!r}: weight {name} holds NaN or infinity")
    return new
