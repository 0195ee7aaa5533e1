"""The probe: a fixed set of answers that every model scores, read from a rollout file or sampled for given prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.measure.stats import Answers

Tokens = tuple[int, ...]
Sampler = Callable[[Sequence[Tokens]], list[list[Tokens]]]  # answers to each prompt


@dataclass(frozen=True)
class Probe:
    """S answers and their prompts.

    Attributes:
        sequences: prompt and answer tokens.
        prompt_lengths: tokens of each sequence that are its prompt.
        prompt_ids: [S] int64, which prompt each sequence answers: 0, 1, ..
        rewards: [S], or None if nobody judged the answers.
    """

    sequences: tuple[Tokens, ...]
    prompt_lengths: tuple[int, ...]
    prompt_ids: Tensor
    rewards: Tensor | None = None

    @property
    def answers(self) -> Answers:
        """Of the scored tokens: those of the answers."""
        lengths = torch.tensor([len(s) - p for s, p in zip(self.sequences, self.prompt_lengths)])
        return Answers(torch.arange(len(lengths)).repeat_interleave(lengths), self.prompt_ids)

    @property
    def rows(self) -> Tensor:
        """[N] of each scored token, the position of the token before it among all tokens laid end to end: the
        routes there are what its log-prob comes from."""
        starts = torch.tensor([0, *map(len, self.sequences)]).cumsum(0).tolist()
        return torch.cat(
            [
                torch.arange(start + p - 1, start + len(s) - 1)
                for start, s, p in zip(starts, self.sequences, self.prompt_lengths)
            ]
        )

    def scored(self, logprobs: Sequence[Tensor]) -> Tensor:
        """[N] log-probs of the answers' tokens, from those of every next token of each sequence."""
        return torch.cat([row[p - 1 :] for row, p in zip(logprobs, self.prompt_lengths)])

    @property
    def advantages(self) -> Tensor:
        """[S] (reward - mean) / (std + 1e-6) over the answers to the same prompt.

        Raises:
            ValueError: no rewards, or no prompt whose answers differ in reward.
        """
        if self.rewards is None:
            raise ValueError("no rewards: give `reward` in the rollout file or `answer` in the prompts file")
        count = torch.bincount(self.prompt_ids).double()
        rewards = self.rewards.double()

        def mean(x: Tensor) -> Tensor:
            return (torch.zeros_like(count).index_add(0, self.prompt_ids, x) / count)[self.prompt_ids]

        centred = rewards - mean(rewards)
        if not centred.any():
            raise ValueError(
                "the answers to every prompt have equal rewards, so that every gradient is zero; "
                "sample more answers a prompt (--answers) or take prompts that are sometimes answered right"
            )
        std = (mean(centred.square()) * (count / (count - 1).clamp_min(1))[self.prompt_ids]).sqrt()
        return centred / (std + 1e-6)

    def subset(self, keep: Sequence[int]) -> Probe:
        """The sequences `keep`, in that order; prompts are numbered anew."""
        _, prompt_ids = self.prompt_ids[list(keep)].unique(return_inverse=True)
        rewards = None if self.rewards is None else self.rewards[list(keep)]
        sequences, lengths = ([xs[i] for i in keep] for xs in (self.sequences, self.prompt_lengths))
        return Probe(tuple(sequences), tuple(lengths), prompt_ids, rewards)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file.

    Raises:
        ValueError: no such file, a line that is no object, nothing in it.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(row, dict) or "prompt" not in row:
                raise ValueError(f'{path}:{number} must be an object with "prompt", a text or a list of token ids')
            rows.append(row)
    if not rows:
        raise ValueError(f"{str(path)!r} is empty; a line is an object with `prompt`")
    return rows


def encode(tokenizer: Any, text: str | list[int], special: bool) -> Tokens:
    """Token ids of a text; a list of ids is taken as it is."""
    return tuple(tokenizer.encode(text, add_special_tokens=special) if isinstance(text, str) else text)


def probe_of_rollouts(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> Probe:
    """From rows of `prompt`, `response` (texts or token ids) and, in all rows or in none, `reward`.

    A text response is closed by the end-of-sequence token unless `finish_reason` is "length".

    Raises:
        ValueError: a row without a response, an empty one, or rewards in some rows only.
    """
    sequences, lengths, prompts, rewards = [], [], {}, []
    ids = []
    for number, row in enumerate(rows, 1):
        prompt = encode(tokenizer, row["prompt"], special=True)
        response = encode(tokenizer, row.get("response", []), special=False)
        if isinstance(row.get("response"), str) and row.get("finish_reason") != "length":
            response = (*response, tokenizer.eos_token_id)
        if not response or not prompt:
            raise ValueError(f"row {number} of the rollout file has no `response` or an empty prompt")
        sequences.append(prompt + response)
        lengths.append(len(prompt))
        ids.append(prompts.setdefault(prompt, len(prompts)))
        rewards.append(row.get("reward"))
    known = [r for r in rewards if r is not None]
    if known and len(known) < len(rewards):
        raise ValueError(f"{len(rewards) - len(known)} rows of the rollout file have no `reward`, the others have one")
    judged = torch.tensor(known, dtype=torch.float64) if known else None
    return Probe(tuple(sequences), tuple(lengths), torch.tensor(ids), judged)


def sampled_probe(rows: Sequence[Mapping[str, Any]], tokenizer: Any, sampler: Sampler) -> Probe:
    """Answers of a model to rows of `prompt` and, in all rows or in none, `answer`.

    The reward is 1 where the answer's text is exactly `answer`, else 0.
    """
    prompts = [encode(tokenizer, row["prompt"], special=True) for row in rows]
    wanted = [row.get("answer") for row in rows]
    sequences, lengths, ids, rewards = [], [], [], []
    for i, (prompt, answers) in enumerate(zip(prompts, sampler(prompts))):
        for answer in answers:
            sequences.append(prompt + answer)
            lengths.append(len(prompt))
            ids.append(i)
            rewards.append(float(tokenizer.decode(answer, skip_special_tokens=True).strip() == wanted[i]))
    judged = torch.tensor(rewards, dtype=torch.float64) if all(w is not None for w in wanted) else None
    return Probe(tuple(sequences), tuple(lengths), torch.tensor(ids), judged)
