"""Digits under constraints: a task whose answers a rule checks, with preferential prompts for a discriminator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mcore_rl.data.preferences import RealExample
from mcore_rl.data.prompts import encode, encode_response
from mcore_rl.data.splits import DRAWS, EVAL, TRAIN, first, split_of
from mcore_rl.data.task import Task
from mcore_rl.types import Prompt

DIGITS = "0123456789"
RISING, FALLING = "+", "/"


@dataclass(frozen=True)
class Constraints:
    """What a string of digits has to satisfy.

    Attributes:
        length: digits. order: "+" none smaller than the one before it, "/" none larger, "" any.
        forbidden: digits that must not occur, in rising order. required: digits that must.

    Example:
        >>> c = Constraints(6, order="+", forbidden="37", required="5")
        >>> c.text, c.broken("011255"), c.broken("731255")
        ('6,+,-37,*5=', (), ('order', 'forbidden'))
    """

    length: int
    order: str = ""
    forbidden: str = ""
    required: str = ""

    @property
    def text(self) -> str:
        """The prompt: constraints between commas, closed by an equals sign."""
        others = (self.order, self.forbidden and "-" + self.forbidden, self.required and "*" + self.required)
        return ",".join([str(self.length), *filter(None, others)]) + "="

    def broken(self, answer: str) -> tuple[str, ...]:
        """Names of the constraints that `answer` breaks; "digits" alone where it is not made of digits."""
        if not answer or set(answer) - set(DIGITS):
            return ("digits",)
        in_order = {"": answer, RISING: "".join(sorted(answer)), FALLING: "".join(sorted(answer, reverse=True))}
        checks = {
            "length": len(answer) == self.length,
            "order": answer == in_order[self.order],
            "forbidden": not set(answer) & set(self.forbidden),
            "required": set(self.required) <= set(answer),
        }
        return tuple(name for name, holds in checks.items() if not holds)


class DigitConstraints(Task):
    """Write digits that satisfy what the prompt states: prompt `6,+,-37,*5=`, for example with the response `011255`.

    Constraints are drawn at random, the real answer to them uniformly where no order is asked for. The rejected prompt
    of a real answer has one constraint changed or inserted so that the answer breaks it. Prompts belong to the training
    or the evaluation set by their text. The reward is 1 where everything holds.
    """

    name = "digit_constraints"
    reward_default = "task_score"

    def __init__(self, tokenizer: Any, seed: int, limit: int | None, min_length: int = 4, max_length: int = 8):
        if not all(type(n) is int for n in (min_length, max_length)) or not 2 <= min_length <= max_length <= 64:
            raise ValueError(
                f"data.params.min_length={min_length!r} and max_length={max_length!r}: must be whole numbers, "
                "2 <= min_length <= max_length <= 64"
            )
        self.tokenizer, self.seed, self.lengths = tokenizer, seed, range(min_length, max_length + 1)
        longest = Constraints(max_length, RISING, "012", "3").text
        self.max_prompt_tokens = len(longest) + tokenizer.num_special_tokens_to_add()  # at most one token a character
        if limit is not None and self.max_prompt_tokens > limit:
            raise ValueError(
                f"digit_constraints prompts take up to {self.max_prompt_tokens} tokens, the limit is {limit}; "
                "raise data.max_prompt_tokens"
            )

    def train_prompt(self, index: int) -> Prompt:
        return self._prompt(f"{TRAIN}/{index}", self._drawn(TRAIN, index)[0])

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [self._prompt(f"{EVAL}/{i}", self._drawn(EVAL, i)[0]) for i in range(n)]

    def sft_example(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        constraints, answer, _ = self._drawn(TRAIN, index)
        return encode(self.tokenizer, constraints.text, special=True), encode_response(self.tokenizer, answer)

    def real_example(self, index: int) -> RealExample:
        return self._real(TRAIN, index)

    def eval_real_examples(self, n: int) -> list[RealExample]:
        return [self._real(EVAL, i) for i in range(n)]

    def score(self, prompt: Prompt, response: str) -> float:
        return float(not prompt.metadata["constraints"].broken(response))

    def _prompt(self, place: str, constraints: Constraints) -> Prompt:
        text = constraints.text
        return Prompt(
            f"{self.name}/{place}",
            encode(self.tokenizer, text, special=True),
            text,
            metadata={"constraints": constraints},
        )

    def _real(self, split: str, index: int) -> RealExample:
        constraints, answer, rejected = self._drawn(split, index)
        prompt, other = (encode(self.tokenizer, c.text, special=True) for c in (constraints, rejected))
        response = encode_response(self.tokenizer, answer)
        return RealExample(prompt, response, ((other, response),))

    def _drawn(self, split: str, index: int) -> tuple[Constraints, str, Constraints]:
        """(constraints, an answer that meets them, constraints that it does not meet) number `index` of a split."""
        rng = random.Random(f"{self.name}/{self.lengths}/{self.seed}/{split}/{index}")
        what = f"{self.name} {split} prompt {index}"
        drawn = (draw_constraints(rng, self.lengths) for _ in range(DRAWS))
        constraints = first((c for c in drawn if split_of(c.text, one_in=8) == split), what)
        answer = draw_answer(rng, constraints)
        changed = (change(rng, constraints, self.lengths) for _ in range(DRAWS))
        # an evaluation prompt is no rejected one in training; there are too few neighbours to ask for the reverse too
        allowed = (c for c in changed if split == EVAL or split_of(c.text, one_in=8) == TRAIN)
        rejected = first((c for c in allowed if c.broken(answer)), what)
        return constraints, answer, rejected


def draw_constraints(rng: random.Random, lengths: range) -> Constraints:
    """A length, and each of the others or not."""
    forbidden = "".join(sorted(rng.sample(DIGITS, rng.randint(0, 3))))
    required = rng.choice([d for d in DIGITS if d not in forbidden]) if rng.random() < 0.5 else ""
    return Constraints(rng.choice(lengths), rng.choice(["", RISING, FALLING]), forbidden, required)


def draw_answer(rng: random.Random, constraints: Constraints) -> str:
    """Allowed digits at random, the required one in a random place, sorted where an order is asked for."""
    digits = rng.choices([d for d in DIGITS if d not in constraints.forbidden], k=constraints.length)
    if constraints.required:
        digits[rng.randrange(len(digits))] = constraints.required
    if constraints.order:
        digits.sort(reverse=constraints.order == FALLING)
    return "".join(digits)


def change(rng: random.Random, constraints: Constraints, lengths: range) -> Constraints:
    """One constraint changed or inserted; an answer may still meet all of them."""

    def forbidden(c: Constraints) -> Constraints:
        digits = [d for d in DIGITS if d != c.required]
        return replace(c, forbidden="".join(sorted(rng.sample(digits, rng.randint(1, 3)))))

    def required(c: Constraints) -> Constraints:
        return replace(c, required=rng.choice([d for d in DIGITS if d not in c.forbidden]))

    changes: list[Callable[[Constraints], Constraints]] = [
        lambda c: replace(c, length=rng.choice(lengths)),
        lambda c: replace(c, order=rng.choice([RISING, FALLING])),
        forbidden,
        required,
    ]
    return rng.choice(changes)(constraints)
