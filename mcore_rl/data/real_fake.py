"""What a discriminator is trained on: real examples of the data against rejected and generated ones, new and old."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcore_rl.config import DiscriminatorConfig, RunConfig
from mcore_rl.data.task import Task
from mcore_rl.functional.discriminator import KINDS, Normaliser
from mcore_rl.types import same_fields

REAL, REJECTED, FAKE = range(len(KINDS))
ENDLESS_TASK_SAMPLE = 64  # examples of a generated task that are checked before a run


@dataclass(frozen=True, eq=False)
class Fake:
    """A generated response.

    Example:
        >>> Fake(example=3, response=(7, 1)).response.tolist()
        [7, 1]
    """

    example: int  # index of its prompt in the task's training data
    response: NDArray[np.int32]  # [T_resp]

    def __post_init__(self) -> None:
        object.__setattr__(self, "response", np.asarray(self.response, np.int32))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fake) and same_fields(self, other)


@dataclass(frozen=True)
class Labelled:
    """A sequence of prompt and response; `kind` is an index into `functional.discriminator.KINDS`."""

    token_ids: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class DiscriminatorState:
    """Where a discriminator stands, beside its weights and optimizer; all of it is in a checkpoint.

    Attributes:
        updates: optimizer steps so far, the version that scores.
        examples_seen: data cursor of the rejected examples.
        accuracy: held out, of the last measurement.
        normaliser: of the scores since the last update.
        fresh: responses of this step, not trained on yet. buffer: of earlier steps. Both on rank 0 only.
    """

    updates: int = 0
    examples_seen: int = 0
    accuracy: float = 0.0
    normaliser: Normaliser = Normaliser()
    fresh: tuple[Fake, ...] = ()
    buffer: tuple[Fake, ...] = ()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> DiscriminatorState:
        """The inverse of `dataclasses.asdict`, without responses."""
        return cls(**{**state, "normaliser": Normaliser(**state["normaliser"])})

    def remembered(self, buffer_size: int, rng: random.Random) -> DiscriminatorState:
        """With the fresh responses in the buffer. A full one loses any of its entries, so that old ones fade slowly."""
        known = (*self.buffer, *self.fresh)
        kept = sorted(rng.sample(range(len(known)), min(buffer_size, len(known))))
        return replace(self, fresh=(), buffer=tuple(known[i] for i in kept))


def draw_batch(
    task: Task, state: DiscriminatorState, config: DiscriminatorConfig, rng: random.Random
) -> tuple[list[Labelled], DiscriminatorState]:
    """Sequences of one update, 2i real and 2i + 1 not, and the state with the cursor moved on.

    A generated response stands against the real one to its prompt, a rejected prompt or response against the accepted.
    """
    pairs = config.batch_size // 2
    num_fake = round(pairs * config.fake_share)
    num_old = round(num_fake * config.old_share) if state.buffer else 0
    fakes = rng.choices(state.buffer, k=num_old) if num_old else []
    fakes += _drawn(rng, state.fresh, num_fake - num_old)
    batch = []
    for fake in fakes:
        real = task.real_example(fake.example)
        batch += [Labelled(real.sequence, REAL), Labelled((*real.prompt, *fake.response.tolist()), FAKE)]
    end = state.examples_seen + pairs - num_fake
    for real in map(task.real_example, range(state.examples_seen, end)):
        prompt, response = rng.choice(real.rejected)
        batch += [Labelled(real.sequence, REAL), Labelled((*prompt, *response), REJECTED)]
    return batch, replace(state, examples_seen=end)


def _drawn(rng: random.Random, fakes: Sequence[Fake], count: int) -> list[Fake]:
    """Each once, as long as there are enough."""
    return rng.sample(fakes, count) if count <= len(fakes) else rng.choices(fakes, k=count)


def held_out(task: Task, count: int) -> list[Labelled]:
    """Real and rejected sequences that no discriminator is trained on, of up to `count` examples."""
    examples = task.eval_real_examples(count)
    rejected = [Labelled((*prompt, *response), REJECTED) for e in examples for prompt, response in e.rejected]
    return [Labelled(e.sequence, REAL) for e in examples] + rejected


def check_examples(config: RunConfig, task: Task) -> int:
    """Tokens of the longest real or rejected sequence.

    Raises:
        ValueError: no real examples, none that is rejected where some are asked for, or real responses that the policy
            cannot write.
    """
    count = ENDLESS_TASK_SAMPLE if task.num_examples is None else task.num_examples
    examples = [*map(task.real_example, range(count)), *task.eval_real_examples(config.discriminator.eval_examples)]
    if config.discriminator.fake_share < 1 and not all(e.rejected for e in examples):
        raise ValueError(
            f"discriminator.fake_share={config.discriminator.fake_share:g} asks for rejected prompts or responses, and "
            f"some examples of task {task.name!r} have none (keys rejected_prompt, rejected); add them, or set "
            "discriminator.fake_share=1 to learn from generated responses alone"
        )
    allowed = config.rollout.max_response_tokens
    if (longest := max(len(e.response) for e in examples)) > allowed:
        raise ValueError(
            f"a real response has {longest} tokens and the policy may write rollout.max_response_tokens={allowed}: a "
            "discriminator would only have to count; raise it, or drop the long examples"
        )
    return max(len(p) + len(r) for e in examples for p, r in ((e.prompt, e.response), *e.rejected))
