"""Where prompts come from: `digit_sort`, `digit_constraints`, any reasoning-gym task, or the user's files.

A task is a pure function of (seed, index): a run resumes with nothing but the integer of its next prompt, and
every rank can ask for the same prompt. Prompts of the evaluation set are never prompts of the training set.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import random
from collections.abc import Iterable
from typing import Any

from mcore_rl.config import DataConfig
from mcore_rl.data.constraints import DigitConstraints
from mcore_rl.data.file_task import FileTask
from mcore_rl.data.preferences import RealExample
from mcore_rl.data.prompts import encode, encode_response, render
from mcore_rl.data.splits import DRAWS, EVAL, TRAIN, first, split_of
from mcore_rl.data.task import Task
from mcore_rl.types import Prompt

GYM_PROMPT_TOKENS = 1024  # longer questions are drawn again, unless data.max_prompt_tokens says otherwise


def build_task(data: DataConfig, tokenizer: Any, seed: int, max_model_tokens: int | None = None) -> Task:
    """The task that `data.task` names.

    Args:
        tokenizer: of the policy (transformers interface).
        seed: the run's; training and evaluation prompts are functions of it.
        max_model_tokens: tokens the model has room for in a prompt, a second bound beside `data.max_prompt_tokens`.

    Raises:
        ValueError: unknown task or parameter (names the nearest), a file's mistakes with their line, prompts that do
            not fit the model.
    """
    limit = min((n for n in (data.max_prompt_tokens, max_model_tokens) if n is not None), default=None)
    if data.task == "digit_sort":
        return DigitSort(tokenizer, seed, limit, **_checked(data.params, {"n", "min_n"}, data.task))
    if data.task == "digit_constraints":
        return DigitConstraints(tokenizer, seed, limit, **_checked(data.params, DigitConstraints.params, data.task))
    if data.task == "file":
        return FileTask(
            data, tokenizer, seed, limit, **_checked(data.params, {"response_key", "answer_after"}, data.task)
        )
    if data.task.startswith("reasoning_gym/"):
        return ReasoningGym(data, tokenizer, seed, limit)
    known = ["digit_sort", "digit_constraints", "file", *(f"reasoning_gym/{name}" for name in _gym_names())]
    raise ValueError(
        f"data.task={data.task!r} is unknown; {_nearest(data.task, known)} "
        "allowed are digit_sort, digit_constraints, file and reasoning_gym/NAME"
    )


class DigitSort(Task):
    """Sort `n` digits, or from `min_n` to `n` of them: prompt `6104=`, response `#0146`.

    A digit string belongs to the evaluation set if its checksum says so, whatever the seed: a policy warmed up with
    one seed has seen no evaluation prompt of a run with another.
    """

    name = "digit_sort"

    def __init__(self, tokenizer: Any, seed: int, limit: int | None, n: int = 16, min_n: int | None = None):
        if not isinstance(n, int) or isinstance(n, bool) or not 2 <= n <= 512:
            raise ValueError(f"data.params.n={n!r}: must be a whole number of digits between 2 and 512")
        min_n = n if min_n is None else min_n
        if not isinstance(min_n, int) or isinstance(min_n, bool) or not 2 <= min_n <= n:
            raise ValueError(f"data.params.min_n={min_n!r}: must be a whole number of digits between 2 and n={n}")
        self.tokenizer, self.seed, self.n, self.min_n = tokenizer, seed, n, min_n
        self.max_prompt_tokens = n + 1 + tokenizer.num_special_tokens_to_add()  # at most one token a character
        if limit is not None and self.max_prompt_tokens > limit:
            raise ValueError(
                f"digit_sort prompts of n={n} digits take up to {self.max_prompt_tokens} tokens, the limit is {limit}; "
                "lower data.params.n or raise data.max_prompt_tokens"
            )

    def train_prompt(self, index: int) -> Prompt:
        return self._prompt(TRAIN, index)

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [self._prompt(EVAL, index) for index in range(n)]

    def sft_example(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._solved(TRAIN, index)

    def eval_real_examples(self, n: int) -> list[RealExample]:
        return [RealExample(*self._solved(EVAL, i)) for i in range(n)]

    def _solved(self, split: str, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prompt = self._prompt(split, index)
        return prompt.token_ids, encode_response(self.tokenizer, f"#{prompt.answer}")

    def extract_answer(self, response: str) -> str | None:
        return response.rpartition("#")[2].strip() if "#" in response else None

    def _prompt(self, split: str, index: int) -> Prompt:
        rng = random.Random(f"digit_sort/{self.n}/{self.seed}/{split}/{index}")
        n = self.n if self.min_n == self.n else rng.randint(self.min_n, self.n)
        drawn = ("".join(rng.choices("0123456789", k=n)) for _ in range(DRAWS))
        digits = first((d for d in drawn if split_of(d, one_in=8) == split), f"{self.name} {split} prompt {index}")
        text = digits + "="
        answer = "".join(sorted(digits))
        return Prompt(f"digit_sort/{split}/{index}", encode(self.tokenizer, text, special=True), text, answer)


class ReasoningGym(Task):
    """A procedural task of the reasoning-gym library with its scorer; a chat where the tokenizer has a chat template.

    `data.params` are the fields of the task's own configuration. A question belongs to the evaluation set if its
    checksum says so. The answer is what stands in the last <answer> tag, or the whole response if there is no tag.
    """

    reward_default = "reasoning_gym"
    # these draw from sets of strings, whose order changes with every interpreter (measured on version 0.1.25)
    hash_dependent = (
        "isomorphic_strings", "knight_swap", "list_functions",
        "polynomial_multiplication", "ransom_note", "word_ladder",
    )  # fmt: skip
    block = 256  # items a generator is made for: some tasks prepare all of their `size` items at once

    def __init__(self, data: DataConfig, tokenizer: Any, seed: int, limit: int | None):
        self.name = data.task
        self.gym_name = data.task.removeprefix("reasoning_gym/")
        if self.gym_name not in _gym_names():
            near = _nearest(self.gym_name, _gym_names())
            raise ValueError(f"data.task={data.task!r} is not one of reasoning-gym's {len(_gym_names())} tasks; {near}")
        if self.gym_name in self.hash_dependent and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(
                f"{data.task} draws from Python sets, so its prompts differ between processes unless the order of sets "
                "is fixed; start the run with PYTHONHASHSEED=0 in its environment"
            )
        self.tokenizer, self.seed, self.system_prompt = tokenizer, seed, data.system_prompt
        self.params = self._checked_params(data.params)
        self.max_prompt_tokens = GYM_PROMPT_TOKENS if limit is None else limit
        self.generator = functools.lru_cache(maxsize=8)(self._make_generator)  # held by this task, freed with it
        self.scorer = self.generator(0)

    def train_prompt(self, index: int) -> Prompt:
        return self._prompt(TRAIN, index)

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [self._prompt(EVAL, index) for index in range(n)]

    def score(self, prompt: Prompt, response: str) -> float:
        from reasoning_gym.utils import extract_answer

        tagged = extract_answer(response)
        answer = response.strip() if tagged is None else tagged
        try:
            return float(self.scorer.score_answer(answer, prompt.metadata["entry"]))
        except Exception:  # noqa: BLE001  several scorers raise on text that is no answer (prime_factorization: "abc")
            return 0.0

    def _prompt(self, split: str, index: int) -> Prompt:
        drawn = (self._draw(split, index, draw) for draw in range(DRAWS))
        what = f"{self.name} {split} prompt {index} of at most {self.max_prompt_tokens} tokens"
        return first((prompt for prompt in drawn if prompt is not None), what)

    def _draw(self, split: str, index: int, draw: int) -> Prompt | None:
        block, offset = divmod(index, self.block)
        rng = random.Random(f"{self.name}/{self.seed}/{split}/{block}/{draw}")
        entry = self.generator(rng.randrange(2**31))[offset]
        if split_of(entry["question"], one_in=4) != split:
            return None
        question = entry["question"]
        content = [{"role": "user", "content": question}] if self.tokenizer.chat_template else question
        text, token_ids = render(self.tokenizer, content, self.system_prompt)
        if len(token_ids) > self.max_prompt_tokens:
            return None
        return Prompt(f"{self.name}/{split}/{index}", token_ids, text, entry["answer"], {"entry": entry})

    def _make_generator(self, seed: int) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(self.gym_name, seed=seed, size=self.block, **self.params)
        except (AssertionError, TypeError, ValueError) as error:  # how the library refuses its parameters
            raise ValueError(f"{self.name} refuses data.params={self.params}: {error}") from error

    def _checked_params(self, params: dict[str, Any]) -> dict[str, Any]:
        from reasoning_gym.composite import DatasetSpec
        from reasoning_gym.factory import DATASETS

        fields = {field.name for field in dataclasses.fields(DATASETS[self.gym_name][1])} - {"seed", "size"}
        params = _checked(params, fields, self.name)
        if self.gym_name == "composite" and isinstance(params.get("datasets"), list):
            params["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}, **spec}) for spec in params["datasets"]]
        return params


def _checked(params: dict[str, Any], allowed: Iterable[str], task: str) -> dict[str, Any]:
    allowed = sorted(allowed)
    for key in params:
        if key not in allowed:
            raise ValueError(
                f"data.params.{key} is unknown to task {task!r}; {_nearest(key, allowed)} allowed: {', '.join(allowed)}"
            )
    return dict(params)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "nothing known is near;"


def _gym_names() -> list[str]:
    import reasoning_gym.factory  # takes a second; the other tasks do without

    return sorted(reasoning_gym.factory.DATASETS)
