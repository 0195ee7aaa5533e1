"""Preferences: two responses to a prompt, or one response with a prompt it fits and one it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mcore_rl.data.prompts import Example, checked_content, encode_response, render, split_reply
from mcore_rl.types import Prompt

PairIds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # token ids of prompt, chosen, rejected


@dataclass(frozen=True)
class RealExample:
    """What a discriminator learns from the data: a prompt with a response that fits it, and what does not.

    Example: the response (7, 1) fits the prompt (5, 6), and does not fit the prompt (5, 8)
        >>> RealExample((5, 6), (7, 1), rejected=(((5, 8), (7, 1)),)).sequence
        (5, 6, 7, 1)
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]  # closed by the end-of-sequence token, as a generated one
    rejected: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()  # (prompt, response)

    @property
    def sequence(self) -> tuple[int, ...]:
        return (*self.prompt, *self.response)


def encode_pair(tokenizer: Any, prompt: Prompt) -> PairIds:
    """Token ids of a row's prompt and of its two responses, each closed by the end-of-sequence token.

    A response is a text, or chat messages of which the last, the assistant's, is taken.

    Raises:
        ValueError: naming the row: a missing key, a wrong type, or two equal responses.
    """
    chosen, rejected = (_response(prompt, key) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise ValueError(f"{prompt.id}: chosen and rejected are the same response, {chosen[:80]!r}; drop the row")
    return prompt.token_ids, encode_response(tokenizer, chosen), encode_response(tokenizer, rejected)


def encode_real(tokenizer: Any, example: Example, system_prompt: str | None) -> RealExample:
    """A row's prompt and response (or `chosen`) as real; as not, its `rejected_prompt` and `rejected`, if it has them.

    Raises:
        ValueError: naming the row: no response, a wrong type, or nothing that differs from the real one.
    """
    prompt, given = example.prompt, example.prompt.metadata
    response = encode_response(tokenizer, example.response or _response(prompt, "chosen"))
    rejected = []
    if given.get("rejected_prompt") is not None:
        content, _ = split_reply(checked_content(given, "rejected_prompt"))
        rejected.append((render(tokenizer, content, system_prompt)[1], response))
    if given.get("rejected") is not None:
        rejected.append((prompt.token_ids, encode_response(tokenizer, _response(prompt, "rejected"))))
    if (prompt.token_ids, response) in rejected:
        raise ValueError(f"{prompt.id}: what is rejected is the same as what is real; drop the row")
    return RealExample(prompt.token_ids, response, tuple(rejected))


def _response(prompt: Prompt, key: str) -> str:
    value = prompt.metadata.get(key)
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = value[-1].get("content")
    if not isinstance(value, str):
        got = "nothing" if value is None else f"{type(value).__name__} {str(value)[:80]!r}"
        raise ValueError(
            f"{prompt.id}: preferences need {key!r}, a text or messages that end with the assistant's; got {got}"
        )
    return value
