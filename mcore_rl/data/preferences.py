"""Preference pairs of prompt files: the columns `chosen` and `rejected` beside the prompt."""

from __future__ import annotations

from typing import Any

from mcore_rl.data.prompts import encode_response
from mcore_rl.types import Prompt

PairIds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # token ids of prompt, chosen, rejected


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


def _response(prompt: Prompt, key: str) -> str:
    value = prompt.metadata.get(key)
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = value[-1].get("content")
    if not isinstance(value, str):
        got = "nothing" if value is None else f"{type(value).__name__} {str(value)[:80]!r}"
        raise ValueError(
            f"{prompt.id}: preference pairs need {key!r}, a text or messages that end with the assistant's; got {got}"
        )
    return value
