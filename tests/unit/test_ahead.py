"""Batches ahead, with an engine that the test steps: order, waiting, what a checkpoint brings, overlap of clocks."""

import threading
from types import SimpleNamespace

import pytest

from mcore_rl.config import RolloutConfig
from mcore_rl.model.checkpoint import Progress, read_progress, write_progress
from mcore_rl.rollout.ahead import RolloutsAhead, open_ahead, time_within
from mcore_rl.rollout.engine import RolloutError, token_versions
from mcore_rl.rollout.engine_group import EngineGroup
from mcore_rl.rollout.threads import in_threads
from mcore_rl.types import BatchAhead, Prompt, RolloutGroup, SamplingParams, Trajectory

PROMPTS = [Prompt(str(i), (i,), str(i)) for i in range(3)]


def groups_of(prompts, seed):
    return [RolloutGroup(p, (Trajectory(p.token_ids, (seed,), (0.0,), "stop", 0),)) for p in prompts]


def test_without_background_nothing_happens_before_it_is_taken():
    calls = []
    ahead = RolloutsAhead(lambda p, seed: calls.append(threading.current_thread()) or groups_of(p, seed), False)
    ahead.start(0, PROMPTS, seed=5)
    assert not calls
    taken = ahead.take(0)
    assert taken.groups == tuple(groups_of(PROMPTS, 5)) and taken.overlap_s == pytest.approx(0.0, abs=1e-3)
    assert calls == [threading.main_thread()]


def test_in_the_background_batches_are_taken_in_any_order_and_failures_are_raised_where_they_are_waited_for():
    may_end = {1: threading.Event(), 2: threading.Event()}

    def generate(prompts, seed):
        assert may_end[seed].wait(10)
        if seed == 2:
            raise RolloutError("died")
        return groups_of(prompts, seed)

    ahead = RolloutsAhead(generate, background=True)
    ahead.start(1, PROMPTS, seed=1)
    ahead.start(2, PROMPTS, seed=2)
    may_end[2].set()
    may_end[1].set()
    assert ahead.take(1).groups == tuple(groups_of(PROMPTS, 1))
    for wait in (ahead.finish, lambda: ahead.take(2)):
        with pytest.raises(RolloutError, match="died"):
            wait()


def test_time_that_was_waited_for_does_not_overlap():
    assert time_within(1.0, 5.0, [(0.0, 2.0), (4.0, 4.5), (6.0, 7.0)]) == 1.5
    assert time_within(1.0, 5.0, []) == 0.0 and time_within(1.0, 5.0, [(0.0, 9.0)]) == 4.0


def test_a_checkpoints_batches_come_first_with_the_answers_of_the_task(tmp_path):
    task = SimpleNamespace(train_prompt=lambda i: Prompt(str(i), (i,), str(i), answer=f"answer {i}"))
    stored = tuple(groups_of([Prompt("7", (7,), "7"), Prompt("8", (8,), "8")], 1))
    held = [BatchAhead(step=4, first_prompt=7, groups=stored)]
    progress = Progress(4, 9, 4, ahead=tuple(held))
    write_progress(tmp_path / "rollouts.safetensors", progress)
    assert read_progress(tmp_path / "rollouts.safetensors", progress.without_rollouts()) == progress
    ahead = open_ahead(None, SamplingParams(), RolloutConfig(max_staleness=1), task, held)
    assert [g.prompt.answer for g in ahead.finish()[4]] == ["answer 7", "answer 8"]
    taken = ahead.take(4)
    assert [g.trajectories for g in taken.groups] == [g.trajectories for g in stored] and taken.seconds == 0.0


def test_labels_of_an_engine():
    assert token_versions([("3", 0, 2), ("4", 2, 5)], 5).tolist() == [3, 3, 4, 4, 4]
    for spans in (None, [("default", 0, 5)], [("3", 0, 4)]):
        with pytest.raises(RolloutError, match="of a response of 5 tokens"):
            token_versions(spans, 5)
    t = Trajectory((0,), (5, 6), (0.0, 0.0), "stop", 3)
    assert t.versions.tolist() == [3, 3]
    assert Trajectory((0,), (5, 6), (0.0, 0.0), "stop", (3, 4)).policy_version == 3


class FakeEngine:
    """Answers a prompt when it is told to."""

    weight_backend, placement, num_workers, max_model_len, trainer_host = "shm", "child", 1, 100, "127.0.0.1"

    def __init__(self):
        self.asked, self.may_end = [], threading.Event()

    def sample_groups(self, prompts, params, seeds):
        self.asked += [p.id for p in prompts]
        assert self.may_end.wait(10)
        return groups_of(prompts, seeds[0])


def test_prompts_go_to_the_engine_that_has_least_to_do():
    slow, fast = FakeEngine(), FakeEngine()
    group = EngineGroup([slow, fast])
    fast.may_end.set()
    one = groups_of(PROMPTS, 0)
    waiting = threading.Thread(target=lambda: one.append(group.generate(PROMPTS[:1], SamplingParams(), 0)), daemon=True)
    waiting.start()
    while not slow.asked:
        waiting.join(0.01)
    for i in range(4):  # one after the other: the slow one still has its first
        group.generate([Prompt(f"later {i}", (i,), "")], SamplingParams(), 0)
    assert slow.asked == ["0"] and fast.asked == [f"later {i}" for i in range(4)]
    slow.may_end.set()
    waiting.join(10)


def test_the_first_failure_of_many_calls_is_not_kept_waiting():
    never = threading.Event()
    with pytest.raises(KeyError, match="broken"):
        in_threads([never.wait, lambda: {}["broken"]])
    assert in_threads([lambda i=i: i * i for i in range(20)], at_once=3) == [i * i for i in range(20)]
    never.set()
