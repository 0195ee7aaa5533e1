"""Small parts of the phases that need no run."""

import math
from types import SimpleNamespace

import pytest
import torch
from loss_batches import cut, make_batch, make_output

from mcore_rl.algorithms import available, load
from mcore_rl.config import WeightSyncConfig, parse_config
from mcore_rl.data.sequences import Sample, Sequences
from mcore_rl.parallel.collectives import max_abs_over_ranks
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.rollout.engine import RolloutError
from mcore_rl.step import syncing
from mcore_rl.step.batches import deal, full_batches
from mcore_rl.step.scoring import advised_batches, mismatch


def one_rank():
    """The process groups of a run of one rank, as the phases below read them."""
    layout = ParallelLayout()
    return SimpleNamespace(
        world_size=1,
        layout=layout,
        rank=0,
        coords=layout.coords(0),
        is_pipeline_last=True,
        reports=True,
        device=torch.device("cpu"),
    )


def plan_of(algorithm):
    return SimpleNamespace(config=parse_config({"name": "x", "model": {"path": "m"}}), algorithm=algorithm)


def test_largest_does_not_lose_a_nan():
    assert max_abs_over_ranks(one_rank(), [torch.tensor([0.5, -2.0]), torch.tensor([])]) == 2.0
    assert max_abs_over_ranks(one_rank(), []) == 0.0
    assert max_abs_over_ranks(one_rank(), [torch.tensor([3.0])], contributes=False) == 0.0
    for place in (0, 1):
        tensors = [torch.tensor([0.1]), torch.tensor([0.2])]
        tensors[place][0] = math.nan
        assert math.isnan(max_abs_over_ranks(one_rank(), tensors))


def test_mismatch_by_hand_and_without_loss_tokens():
    metrics = mismatch(one_rank(), torch.tensor([0.1, -0.3]), None)
    d = torch.tensor([0.1, -0.3], dtype=torch.float64)
    want = {"mismatch/k3": (d.exp() - 1 - d).mean(), "mismatch/abs_mean": d.abs().mean(), "mismatch/abs_max": 0.3}
    assert metrics.keys() == want.keys()
    assert all(math.isclose(metrics[k], float(v), rel_tol=1e-5) for k, v in want.items())
    assert mismatch(one_rank(), torch.zeros(0), None) == {}
    stale = mismatch(one_rank(), torch.tensor([0.1, -0.3]), torch.tensor([0, 2]))
    assert stale["mismatch/abs_max"] == pytest.approx(0.1) and stale["staleness/abs_max"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "diffs, wrong", [([1e-5], False), ([2e-3, 1e-5], False), ([2e-3, 3e-3], True), ([math.nan, math.nan], True)]
)
def test_a_probe_that_fails_is_repeated_once_with_other_sequences(monkeypatch, diffs, wrong):
    """One expert chosen within rounding of another is no wrong weight; what fails twice is."""
    asked, transfer = [], SimpleNamespace(send=lambda version: {})
    monkeypatch.setattr(syncing, "probe_difference", lambda *_: asked.append(_[-1]) or diffs[_[-1]])
    whole = (plan_of(load("grpo")), one_rank(), None, None, transfer, 7)
    if wrong:
        with pytest.raises(RolloutError, match="weight sync of policy version 7 is wrong: on two probes"):
            syncing.sync_weights(*whole)
    else:
        metrics = syncing.sync_weights(*whole)
        assert metrics["weight_sync/logprob_max_diff"] == 1e-5
        assert metrics["weight_sync/repeated_probes"] == len(diffs) - 1
    assert asked == list(range(len(diffs)))


@pytest.mark.parametrize("name", available())
def test_an_odd_number_of_probe_sequences_is_packed_whole(name):
    """Also where the algorithm trains on pairs, which would leave the last one over."""
    samples = [Sample((5, 6, token), 1, 0.0, (-0.1,)) for token in (1, 2, 3)]
    share = deal(plan_of(load(name)), one_rank(), Sequences.of(samples))
    (packed,) = full_batches(plan_of(load(name)), one_rank(), share)
    assert sorted(packed.batch.targets[packed.batch.loss_mask].tolist()) == [1, 2, 3]


def test_explained_variance_is_that_of_the_whole_rollout_however_it_is_cut():
    """1 - Var(R - V) / Var(R) over all tokens; a mean over micro-batches would be another number."""
    ppo, batch = load("ppo", lam=0.7), make_batch()
    (whole,), metrics = advised_batches(ppo, one_rank(), [batch])
    returns, values = whole.returns[batch.loss_mask], batch.values[batch.loss_mask]
    want = 1 - (returns - values).var() / returns.var()
    assert metrics["critic/explained_variance"] == pytest.approx(want.item(), rel=1e-12)
    parts = [part for part, _ in cut(batch, make_output(batch), 1)]
    _, of_parts = advised_batches(ppo, one_rank(), parts)
    assert of_parts["critic/explained_variance"] == pytest.approx(want.item(), rel=1e-12)
    alone = [advised_batches(ppo, one_rank(), [part])[1]["critic/explained_variance"] for part in parts]
    assert abs(sum(alone) / len(alone) - want.item()) > 1e-2


@pytest.mark.parametrize(
    "version, seen, due",
    [(0, {}, True), (1, {}, False), (10, {}, True), (3, {"mismatch/abs_max": 5e-4}, False),
     (3, {"mismatch/abs_max": 2e-3}, True), (3, {"mismatch/abs_max": math.nan}, True)],
)  # fmt: skip
def test_a_probe_comes_first_at_intervals_and_where_trainer_and_engine_differ(version, seen, due):
    assert syncing.probe_is_due(WeightSyncConfig(), version, seen) is due
