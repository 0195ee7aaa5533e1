"""The user's prompt files as a task."""

from __future__ import annotations

import functools
import random
from typing import Any

from mcore_rl.config import DataConfig
from mcore_rl.data.preferences import PairIds, RealExample, encode_pair, encode_real
from mcore_rl.data.prompts import Example, encode_response, load_examples
from mcore_rl.data.task import Task
from mcore_rl.types import Prompt


class FileTask(Task):
    """Prompts of `data.train_file`, shuffled anew every epoch, and of `data.eval_file` in the file's order."""

    name = "file"

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Any,
        seed: int,
        limit: int | None,
        response_key: str = "response",
        answer_after: str | None = None,
    ):
        if data.train_file is None:
            raise ValueError("data.task=file needs data.train_file, a .jsonl or .parquet file of prompts")
        if data.eval_file is None:
            raise ValueError("data.task=file needs data.eval_file, prompts in the same form that training never sees")
        self.tokenizer, self.seed, self.response_key, self.answer_after = tokenizer, seed, response_key, answer_after
        self.train = load_examples(data.train_file, data, tokenizer, response_key, limit)
        self.held_out = load_examples(data.eval_file, data, tokenizer, response_key, limit)
        self.max_prompt_tokens = max(len(example.prompt.token_ids) for example in (*self.train, *self.held_out))
        self.num_examples, self.system_prompt = len(self.train), data.system_prompt
        self.order = functools.lru_cache(maxsize=2)(self._shuffled)

    def train_prompt(self, index: int) -> Prompt:
        return self._example(index).prompt

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [example.prompt for example in self.held_out[:n]]

    def sft_example(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        example = self._example(index)
        if example.response is None:
            raise ValueError(
                f"{example.prompt.id} has no reference response for SFT; add the key {self.response_key!r} (or name it "
                "with data.params.response_key), or end its messages with the assistant's"
            )
        return example.prompt.token_ids, encode_response(self.tokenizer, example.response)

    def extract_answer(self, response: str) -> str | None:
        if self.answer_after is None:
            return response.strip()
        return response.rpartition(self.answer_after)[2].strip() if self.answer_after in response else None

    def pair_example(self, index: int) -> PairIds:
        return encode_pair(self.tokenizer, self._example(index).prompt)

    def train_pairs(self) -> list[PairIds]:
        return [encode_pair(self.tokenizer, example.prompt) for example in self.train]

    def eval_pairs(self, n: int) -> list[PairIds]:
        return [encode_pair(self.tokenizer, example.prompt) for example in self.held_out[:n]]

    def real_example(self, index: int) -> RealExample:
        return encode_real(self.tokenizer, self._example(index), self.system_prompt)

    def eval_real_examples(self, n: int) -> list[RealExample]:
        return [encode_real(self.tokenizer, example, self.system_prompt) for example in self.held_out[:n]]

    def _example(self, index: int) -> Example:
        epoch, position = divmod(index, len(self.train))
        return self.train[self.order(epoch)[position]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.train)))
        random.Random(f"file/{self.seed}/{epoch}").shuffle(order)
        return order
