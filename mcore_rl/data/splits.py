"""Training and evaluation prompts of generated tasks, told apart by their text."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import TypeVar

TRAIN, EVAL = "train", "eval"
DRAWS = 256  # tries at a prompt, as long as it is in the wrong split or too long
T = TypeVar("T")


def split_of(text: str, one_in: int) -> str:
    """The split a prompt belongs to, by its text alone; one prompt in `one_in` is held out."""
    return EVAL if zlib.crc32(text.encode()) % one_in == 0 else TRAIN


def first(accepted: Iterator[T], what: str) -> T:
    """The first of them. Raises ValueError where there is none."""
    for item in accepted:
        return item
    raise ValueError(
        f"no {what} was found in {DRAWS} draws: raise data.max_prompt_tokens, or choose data.params with more "
        "different prompts, so that some can be held out for the evaluation"
    )
