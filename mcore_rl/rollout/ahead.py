"""Batches that the engine generates while the trainer works, and how much of that time the trainer did not wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mcore_rl.config import RolloutConfig
from mcore_rl.data.task import Task
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.threads import in_thread
from mcore_rl.types import BatchAhead, Prompt, RolloutGroup, SamplingParams

Generate = Callable[[Sequence[Prompt], int], Sequence[RolloutGroup]]
Interval = tuple[float, float]  # seconds of one clock


def open_ahead(
    engine: RolloutEngine, params: SamplingParams, rollout: RolloutConfig, task: Task, held: Sequence[BatchAhead]
) -> RolloutsAhead:
    """What the engine generates ahead, `rollout.max_staleness` permitting; begins with the batches of a checkpoint."""
    rollouts = RolloutsAhead(
        lambda prompts, seed: engine.generate(prompts, params, seed), background=rollout.max_staleness > 0
    )
    for batch in held:
        prompts = (task.train_prompt(batch.first_prompt + i) for i in range(len(batch.groups)))
        rollouts.hold(batch.step, [replace(g, prompt=p) for g, p in zip(batch.groups, prompts)])
    return rollouts


@dataclass(frozen=True)
class Generated:
    """A batch, and when the engine began and ended with it (0, 0: it comes from a checkpoint)."""

    groups: tuple[RolloutGroup, ...]
    interval: Interval = (0.0, 0.0)
    overlap_s: float = 0.0  # of that time the trainer was doing something else than waiting for rollouts

    @property
    def seconds(self) -> float:
        return self.interval[1] - self.interval[0]


class RolloutsAhead:
    """The batches that have been asked for, by the step that will train on them. Lives on rank 0.

    Args:
        generate: the groups of some prompts and a seed.
        background: generate in threads from `start` on; else in `take`, as a synchronous loop does.
    """

    def __init__(self, generate: Generate, background: bool):
        self._generate, self._background = generate, background
        self._batches: dict[int, Callable[[], Generated]] = {}  # each waits for its batch
        self._waits: list[Interval] = []

    def start(self, step: int, prompts: Sequence[Prompt], seed: int) -> None:
        """Ask for the batch of a step."""

        def work() -> Generated:
            began = time.perf_counter()
            groups = tuple(self._generate(prompts, seed))
            return Generated(groups, (began, time.perf_counter()))

        self._batches[step] = in_thread(work).result if self._background else work

    def hold(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """A batch that was generated before, by a run that this one continues."""
        self._batches[step] = lambda: Generated(tuple(groups))

    def take(self, step: int) -> Generated:
        """The batch of a step, once. Raises what generating it raised."""
        with self._waiting():
            batch = self._batches.pop(step)()
        began, ended = batch.interval
        self._waits = [wait for wait in self._waits if wait[1] > began]  # later batches begin later
        return Generated(batch.groups, batch.interval, batch.seconds - time_within(began, ended, self._waits))

    def finish(self) -> dict[int, tuple[RolloutGroup, ...]]:
        """Wait until nothing is being generated; the batches that wait to be taken."""
        with self._waiting():
            return {step: batch().groups for step, batch in self._batches.items()}

    def now(self, prompts: Sequence[Prompt], seed: int) -> list[RolloutGroup]:
        """Groups that the trainer waits for."""
        with self._waiting():
            return list(self._generate(prompts, seed))

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waits.append((began, time.perf_counter()))


def time_within(began: float, ended: float, intervals: Sequence[Interval]) -> float:
    """How much of [began, ended] lies in intervals that do not overlap each other.

    Example:
        >>> time_within(1.0, 5.0, [(0.0, 2.0), (4.0, 4.5), (6.0, 7.0)])
        1.5
    """
    return sum(max(0.0, min(ended, b) - max(began, a)) for a, b in intervals)
