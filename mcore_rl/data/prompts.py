"""Prompts of the user's files: JSONL or parquet rows of text or chat, encoded, with mistakes named by line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from mcore_rl.config import DataConfig
from mcore_rl.types import Prompt

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A prompt of a file and, where the row holds one, the response to imitate."""

    prompt: Prompt
    response: str | None


def encode(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    """Token ids of `text`; `special` lets the tokenizer add what it puts around a text (a beginning-of-sequence token).

    Raises:
        ValueError: the vocabulary does not cover the text.
    """
    try:
        return tuple(tokenizer.encode(text, add_special_tokens=special))
    except Exception as error:  # noqa: BLE001  the tokenizers library raises nothing narrower
        message = f"the tokenizer cannot encode {text[:80]!r}: {error}; use a tokenizer whose vocabulary covers it"
        raise ValueError(message) from error


def encode_response(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a reference response, closed by the end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to close a response; set it in tokenizer_config.json")
    return (*encode(tokenizer, text, special=False), tokenizer.eos_token_id)


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The tokenizer's chat template over `messages`, ready for the assistant's turn."""
    if not tokenizer.chat_template:
        raise ValueError(
            "chat messages (or data.system_prompt) need a chat template and the tokenizer has none; "
            "add chat_template.jinja to the model's folder or use plain text prompts"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


def render(
    tokenizer: Any, content: str | Sequence[Mapping[str, str]], system_prompt: str | None
) -> tuple[str, tuple[int, ...]]:
    """(text the model sees, its token ids) of a plain text or of chat messages.

    Plain text stays plain unless there is a system prompt: then it is the user's turn of a chat. A row's own system
    message wins over `system_prompt`.
    """
    if isinstance(content, str) and system_prompt is None:
        return content, encode(tokenizer, content, special=True)
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    text = render_chat(tokenizer, messages)
    return text, encode(tokenizer, text, special=False)  # the template wrote the special tokens


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a .jsonl or .parquet file; place is `file:line` (parquet: `file:row`), counted from 1.

    Blank lines of JSONL are skipped.

    Raises:
        ValueError: missing or empty file, unknown suffix, malformed JSON, a line that is not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompt file {str(path)!r} does not exist; correct data.train_file or data.eval_file")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"prompt file {str(path)!r} has the suffix {path.suffix!r}; allowed are {', '.join(readers)}")
    empty = True
    for number, row in readers[path.suffix](path):
        empty = False
        yield f"{path.name}:{number}", row
    if empty:
        raise ValueError(f"prompt file {str(path)!r} is empty; it needs one object a line with at least a prompt")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                message = f"{path}:{number}: malformed JSON: {error}; each line must be one JSON object in UTF-8"
                raise ValueError(message) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object, got {_shown(row)}")
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"prompt file {str(path)!r} is not a parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def load_examples(
    path: str | Path, data: DataConfig, tokenizer: Any, response_key: str, limit: int | None
) -> list[Example]:
    """Every row of a prompt file, encoded and checked.

    A row is a prompt at `data.prompt_key` (a text, or a list of {role, content}), optionally an answer at
    `data.answer_key` and a reference response at `response_key`. In a chat that ends with an assistant message, that
    message is the response. The other columns become `Prompt.metadata`.

    Args:
        limit: most tokens a prompt may have; None for no limit.

    Raises:
        ValueError: naming file and line: what `read_rows` raises, a missing key, a wrong type, a prompt that is
            empty or too long, an answer that only some rows have.
    """
    examples = []
    for place, row in read_rows(path):
        try:
            examples.append(_example(place, row, data, tokenizer, response_key, limit))
        except ValueError as error:
            raise ValueError(f"{Path(path).parent / place}: {error}") from error
        if (examples[-1].prompt.answer is None) != (examples[0].prompt.answer is None):
            raise ValueError(
                f"{Path(path).parent / place}: key {data.answer_key!r} must be in every row or in none, but "
                f"{examples[0].prompt.id} and this row differ; keys here: {', '.join(row)}"
            )
    return examples


def _example(
    place: str, row: dict[str, Any], data: DataConfig, tokenizer: Any, response_key: str, limit: int | None
) -> Example:
    content, reply = split_reply(checked_content(row, data.prompt_key))
    response = row.get(response_key, reply)
    if response is not None and not isinstance(response, str):
        raise ValueError(f"{response_key!r} must be text, got {_shown(response)}")
    text, token_ids = render(tokenizer, content, data.system_prompt)
    if limit is not None and len(token_ids) > limit:
        raise ValueError(
            f"prompt has {len(token_ids)} tokens, more than the {limit} that data.max_prompt_tokens or the model "
            "allows; shorten or drop it"
        )
    metadata = {k: v for k, v in row.items() if k not in (data.prompt_key, data.answer_key, response_key)}
    return Example(Prompt(place, token_ids, text, row.get(data.answer_key), metadata), response)


def checked_content(row: dict[str, Any], key: str) -> str | list[dict[str, str]]:
    """The prompt of a row: a text that is not empty, or checked chat messages."""
    if key not in row:
        raise ValueError(f"key {key!r} is missing; keys here: {', '.join(row) or 'none'}; set data.prompt_key to one")
    content = row[key]
    if not isinstance(content, (str, list)):
        raise ValueError(f"{key!r} must be text or a list of messages, got {_shown(content)}")
    if not content:
        raise ValueError(f"{key!r} is empty; a prompt needs at least one token")
    for number, message in enumerate(content if isinstance(content, list) else ()):
        known = isinstance(message, dict) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{key!r}, message {number}: expected {{'role': one of {', '.join(ROLES)}, 'content': text}}, "
                f"got {_shown(message)}"
            )
    return content


def split_reply(content: str | list[dict[str, str]]) -> tuple[str | list[dict[str, str]], str | None]:
    """A chat without the assistant message that ends it, and that message."""
    if isinstance(content, str) or content[-1]["role"] != "assistant":
        return content, None
    if len(content) == 1:
        raise ValueError("the only message is the assistant's; a prompt needs a user or system message before it")
    return content[:-1], content[-1]["content"]


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"
