"""What the loop asks of a source of prompts."""

from __future__ import annotations

from mcore_rl.data.preferences import PairIds, RealExample
from mcore_rl.types import Prompt


class Task:
    """A source of prompts.

    Attributes:
        name: as in `data.task`.
        reward_default: reward spec that fits the task, what `reward: auto` stands for.
        max_prompt_tokens: longest prompt the task can return.
        num_examples: of the training data; None where it is endless.
    """

    name: str
    reward_default: str = "exact_match"
    max_prompt_tokens: int
    num_examples: int | None = None

    def train_prompt(self, index: int) -> Prompt:
        """Training prompt number `index` (from 0, without end)."""
        raise NotImplementedError

    def eval_prompts(self, n: int) -> list[Prompt]:
        """The first `n` held-out prompts; fewer where the task has no more."""
        raise NotImplementedError

    def sft_example(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt token ids, reference response token ids with the end token) of training example `index`.

        Raises:
            ValueError: the task has no reference responses.
        """
        raise ValueError(f"task {self.name!r} has no reference responses for SFT; use digit_sort or a file that has")

    def pair_example(self, index: int) -> PairIds:
        """Preference pair `index` of the training data.

        Raises:
            ValueError: the task has no preference pairs.
        """
        pairs = self.train_pairs()
        return pairs[index % len(pairs)]

    def train_pairs(self) -> list[PairIds]:
        """All preference pairs of the training data; raises as `pair_example`."""
        raise ValueError(f"task {self.name!r} has no preference pairs; use data.task=file with chosen and rejected")

    def eval_pairs(self, n: int) -> list[PairIds]:
        """The first `n` held-out preference pairs."""
        return []

    def real_example(self, index: int) -> RealExample:
        """What a discriminator may take for real, of the training prompt of the same `index`.

        Raises:
            ValueError: the task has no reference responses.
        """
        return RealExample(*self.sft_example(index))

    def eval_real_examples(self, n: int) -> list[RealExample]:
        """The first `n` held-out ones."""
        raise ValueError(f"task {self.name!r} has no held-out reference responses; use digit_constraints or a file")

    def extract_answer(self, response: str) -> str | None:
        """The part of a response that is compared with the answer; None if there is none."""
        return response.strip()

    def score(self, prompt: Prompt, response: str) -> float:
        """The task's own scorer.

        Raises:
            ValueError: the task has none.
        """
        raise ValueError(
            f"task {self.name!r} has no scorer of its own; "
            "use reward=exact_match, math_verify, regex:PATTERN or module:function"
        )
