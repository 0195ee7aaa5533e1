"""Small parts of the phases that need no run."""

import math
from types import SimpleNamespace

import pytest
import torch
from loss_batches import cut, make_batch, make_output

from mcore_rl import phases
from mcore_rl.algorithms import available, load
from mcore_rl.config import parse_config
from mcore_rl.data.packing import Sample, pack
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.phases import largest, pack_parts, sync_weights
from mcore_rl.prescoring import mismatch, token_advantages
from mcore_rl.rollout.engine import RolloutError


def one_rank(algorithm):
    """What the phases below read of a run."""
    layout = ParallelLayout()
    groups = SimpleNamespace(
        world_size=1,
        layout=layout,
        coords=layout.coords(0),
        is_pipeline_last=True,
        reports=True,
        device=torch.device("cpu"),
    )
    plan = SimpleNamespace(config=parse_config({"name": "x", "model": {"path": "m"}}), algorithm=algorithm)
    return SimpleNamespace(plan=plan, groups=groups)


def test_largest_does_not_lose_a_nan():
    assert largest([torch.tensor([0.5, -2.0]), torch.tensor([])]) == 2.0
    assert largest([]) == 0.0
    for place in (0, 1):
        tensors = [torch.tensor([0.1]), torch.tensor([0.2])]
        tensors[place][0] = math.nan
        assert math.isnan(largest(tensors))


def test_mismatch_by_hand_and_without_loss_tokens():
    run = one_rank(load("grpo"))
    metrics = mismatch(run, [pack([Sample((5, 6, 7, 1), 2, 0.5, (-0.1, 0.3))], [0.5])])  # old log-probs are 0 here
    d = torch.tensor([0.1, -0.3], dtype=torch.float64)
    want = {"mismatch/k3": (d.exp() - 1 - d).mean(), "mismatch/abs_mean": d.abs().mean(), "mismatch/abs_max": 0.3}
    assert metrics.keys() == want.keys()
    assert all(math.isclose(metrics[k], float(v), rel_tol=1e-5) for k, v in want.items())
    assert mismatch(run, [pack([Sample((5, 6, 1), 0, 0.5, ())], [0.0])]) == {}


@pytest.mark.parametrize(
    "diffs, wrong", [([1e-5], False), ([2e-3, 1e-5], False), ([2e-3, 3e-3], True), ([math.nan, math.nan], True)]
)
def test_a_probe_that_fails_is_repeated_once_with_other_sequences(monkeypatch, diffs, wrong):
    """One expert chosen within rounding of another is no wrong weight; what fails twice is."""
    asked, run = [], one_rank(load("grpo"))
    run.transfer = SimpleNamespace(send=lambda version: {})
    monkeypatch.setattr(phases, "probe_difference", lambda run, number: asked.append(number) or diffs[number])
    if wrong:
        with pytest.raises(RolloutError, match="weight sync of policy version 7 is wrong: on two probes"):
            sync_weights(run, 7)
    else:
        metrics = sync_weights(run, 7)
        assert metrics["weight_sync/logprob_max_diff"] == 1e-5
        assert metrics["weight_sync/repeated_probes"] == len(diffs) - 1
    assert asked == list(range(len(diffs)))


@pytest.mark.parametrize("name", available())
def test_an_odd_number_of_probe_sequences_is_packed_whole(name):
    """Also where the algorithm trains on pairs, which would leave the last one over."""
    samples = [Sample((5, 6, token), 1, 0.0, (-0.1,)) for token in (1, 2, 3)]
    ((batch,),) = pack_parts(one_rank(load(name)), [samples])
    assert sorted(batch.targets[batch.loss_mask].tolist()) == [1, 2, 3]


def test_explained_variance_is_that_of_the_whole_rollout_however_it_is_cut():
    """1 - Var(R - V) / Var(R) over all tokens; a mean over micro-batches would be another number."""
    run, batch = one_rank(load("ppo", lam=0.7)), make_batch()
    (whole,), metrics = token_advantages(run, [batch])
    returns, values = whole.returns[batch.loss_mask], batch.values[batch.loss_mask]
    want = 1 - (returns - values).var() / returns.var()
    assert metrics["critic/explained_variance"] == pytest.approx(want.item(), rel=1e-12)
    parts = [part for part, _ in cut(batch, make_output(batch), 1)]
    _, of_parts = token_advantages(run, parts)
    assert of_parts["critic/explained_variance"] == pytest.approx(want.item(), rel=1e-12)
    alone = [token_advantages(run, [part])[1]["critic/explained_variance"] for part in parts]
    assert abs(sum(alone) / len(alone) - want.item()) > 1e-2
