"""What a discriminator's scores become: rewards, state and metrics, by hand."""

from types import SimpleNamespace

import pytest
import torch

from mcore_rl.algorithms import load
from mcore_rl.config import DataConfig, parse_config
from mcore_rl.data.real_fake import DiscriminatorState, Fake
from mcore_rl.data.tasks import build_task
from mcore_rl.functional.discriminator import Normaliser
from mcore_rl.step import judging
from mcore_rl.types import RolloutGroup, Trajectory
from tools.make_demo_model import make_tokenizer


def judged(monkeypatch, scores, rule, state=None, **fields):
    """Two groups of two responses with these scores; of held-out sequences, real ones score 1 and rejected ones -1."""
    task = build_task(DataConfig(task="digit_constraints"), make_tokenizer(), 0)
    config = parse_config({"name": "x", "model": {"path": "m"}, "discriminator": {"eval_examples": 4}})
    plan = SimpleNamespace(task=task, config=config, algorithm=load("gapo", **fields))
    answers = iter(torch.tensor(x, dtype=torch.float64) for x in (scores, [1.0] * 4 + [-1.0] * 4))
    monkeypatch.setattr(judging, "sequence_scores", lambda *_: next(answers))
    responses = [Trajectory((5,), (i, 1), (0.0, 0.0), "stop", 0, reward=r) for i, r in enumerate(rule)]
    groups = [RolloutGroup(task.train_prompt(7 + i), tuple(responses[2 * i : 2 * i + 2])) for i in range(2)]
    first, state = SimpleNamespace(rank=0), state or DiscriminatorState()
    groups, state, metrics = judging.judge(plan, first, None, groups, state, first_example=7)
    return [t for g in groups for t in g.trajectories], state, metrics


def test_rewards_are_scores_over_all_that_this_version_scored(monkeypatch):
    """Scores 2 and 4 were seen before: mean 1 and variance 5 of 2, 4, -1, 3, -2, 0."""
    before = DiscriminatorState(normaliser=Normaliser(2, 3.0, 2.0), updates=5)
    got, state, metrics = judged(monkeypatch, [-1.0, 3.0, -2.0, 0.0], [0, 1, 1, 0], before)
    variance = (1 + 9 + 4 + 4 + 9 + 1) / 6
    assert [t.reward for t in got] == pytest.approx([(s - 1) / variance**0.5 for s in (-1, 3, -2, 0)])
    assert [t.rule_reward for t in got] == [0, 1, 1, 0]
    assert state.normaliser.count == 6 and metrics["discriminator/score_std"] == pytest.approx(variance**0.5)
    assert state.fresh == (Fake(7, (0, 1)), Fake(7, (1, 1)), Fake(8, (2, 1)), Fake(8, (3, 1)))
    assert metrics["discriminator/updates"] == 5


def test_accuracy_decides_and_the_rule_only_watches(monkeypatch):
    _, state, metrics = judged(monkeypatch, [-1.0, 3.0, -2.0, 0.0], [0, 1, 1, 0])
    # real 1, rejected 1, fake (1 + 0 + 1 + 1/2) / 4
    assert state.accuracy == metrics["discriminator/accuracy"] == pytest.approx((1 + 0.5 * 2.5 / 4 + 0.5) / 2)
    assert metrics["discriminator/audit_auc"] == 0.5  # 3 above both, -2 above none
    other, _, without = judged(monkeypatch, [-1.0, 3.0, -2.0, 0.0], [0, 0, 0, 0])
    assert "discriminator/audit_auc" not in without
    assert [t.reward for t in other] == [t.reward for t in judged(monkeypatch, [-1.0, 3.0, -2.0, 0.0], [1] * 4)[0]]


def test_raw_scores_are_only_clipped(monkeypatch):
    got, _, _ = judged(monkeypatch, [-1.0, 30.0, -2.0, 0.0], [0] * 4, normalise_reward=False)
    assert [t.reward for t in got] == [-1.0, 10.0, -2.0, 0.0]
