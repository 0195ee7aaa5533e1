"""Digits under constraints: a task whose answers a rule checks, with preferential prompts for a discriminator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mcore_rl.data.preferences import RealExample
from mcore_rl.data.prompts import encode, encode_response
from mcore_rl.data.splits import DRAWS, EVAL, TRAIN, first, split_of
from mcore_rl.data.task import Task
from mcore_rl.types import Prompt

DIGITS = "0123456789"
RISING, FALLING = "+", "/"
TRIES = 64  # at a neighbour that an answer breaks


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
    of a real answer has one constraint replaced by another of its kind, which the answer breaks. Prompts belong to the
    training or the evaluation set by their text. The reward is 1 where everything holds. Of `params`, `order` and
    `required` say whether a prompt may ask for these.
    """

    name = "digit_constraints"
    reward_default = "task_score"
    params = ("min_length", "max_length", "min_forbidden", "max_forbidden", "order", "required")

    def __init__(
        self,
        tokenizer: Any,
        seed: int,
        limit: int | None,
        min_length: int = 4,
        max_length: int = 8,
        min_forbidden: int = 0,
        max_forbidden: int = 3,
        order: bool = True,
        required: bool = True,
    ):
        _check_range("length", min_length, max_length, 2, 64)
        _check_range("forbidden", min_forbidden, max_forbidden, 0, 8)
        for name, value in (("order", order), ("required", required)):
            if type(value) is not bool:
                raise ValueError(f"data.params.{name}={value!r}: must be true or false")
        self.tokenizer, self.seed = tokenizer, seed
        self.space = Space(range(min_length, max_length + 1), range(min_forbidden, max_forbidden + 1), order, required)
        longest = Constraints(max_length, RISING if order else "", DIGITS[:max_forbidden], "9" if required else "").text
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
        rng = random.Random(f"{self.name}/{self.space}/{self.seed}/{split}/{index}")
        # an evaluation prompt is no rejected one in training; there are too few neighbours to ask for the reverse too
        others = {TRAIN} if split == TRAIN else {TRAIN, EVAL}

        def example() -> tuple[Constraints, str, Constraints | None]:
            constraints = self.space.draw(rng)
            if split_of(constraints.text, one_in=8) != split:
                return constraints, "", None
            answer = draw_answer(rng, constraints)
            neighbours = self.space.neighbours(rng, constraints)
            fits = (c for c in neighbours if c.broken(answer) and split_of(c.text, one_in=8) in others)
            return constraints, answer, next(fits, None)

        drawn = (example() for _ in range(DRAWS))
        return first((x for x in drawn if x[2]), f"{self.name} {split} prompt {index}")


@dataclass(frozen=True)
class Space:
    """What prompts ask for: lengths, how many digits they forbid, whether they may ask for an order or a digit."""

    lengths: range
    num_forbidden: range
    order: bool
    required: bool

    def draw(self, rng: random.Random) -> Constraints:
        """A length, and each of the others or not."""
        forbidden = "".join(sorted(rng.sample(DIGITS, rng.choice(self.num_forbidden))))
        order = rng.choice(["", RISING, FALLING]) if self.order else ""
        required = self.required and rng.random() < 0.5
        digit = rng.choice([d for d in DIGITS if d not in forbidden]) if required else ""
        return Constraints(rng.choice(self.lengths), order, forbidden, digit)

    def neighbours(self, rng: random.Random, constraints: Constraints) -> Iterator[Constraints]:
        """Constraints that differ in one, all of a kind chosen at random; some are met by the same answers.

        One is replaced by another of its kind that is as strict, none is inserted: prompts that ask for more would be
        the rejected ones, and a discriminator would learn that, which says nothing of an answer.
        """
        c = constraints
        unforbidden, unrequired = ([d for d in DIGITS if d not in taken] for taken in (c.forbidden, c.required))
        kinds: list[Callable[[], Constraints]] = []
        if len(self.lengths) > 1:
            kinds.append(lambda: replace(c, length=rng.choice(self.lengths)))
        if c.order:
            kinds.append(lambda: replace(c, order=FALLING if c.order == RISING else RISING))
        if c.forbidden:
            kinds.append(lambda: replace(c, forbidden="".join(sorted(rng.sample(unrequired, len(c.forbidden))))))
        if c.required:
            kinds.append(lambda: replace(c, required=rng.choice(unforbidden)))
        if kinds:
            kind = rng.choice(kinds)
            yield from (kind() for _ in range(TRIES))


def draw_answer(rng: random.Random, constraints: Constraints) -> str:
    """Allowed digits at random, the required one in a random place, sorted where an order is asked for."""
    digits = rng.choices([d for d in DIGITS if d not in constraints.forbidden], k=constraints.length)
    if constraints.required:
        digits[rng.randrange(len(digits))] = constraints.required
    if constraints.order:
        digits.sort(reverse=constraints.order == FALLING)
    return "".join(digits)


def _check_range(name: str, least: object, most: object, low: int, high: int) -> None:
    if not all(type(n) is int for n in (least, most)) or not low <= least <= most <= high:
        raise ValueError(
            f"data.params.min_{name}={least!r} and max_{name}={most!r}: must be whole numbers, "
            f"{low} <= min_{name} <= max_{name} <= {high}"
        )
