"""Small parts of the phases that need no run."""

import math
from types import SimpleNamespace

import torch

from mcore_rl.data.packing import Sample, pack
from mcore_rl.phases import largest, mismatch


def test_largest_does_not_lose_a_nan():
    assert largest([torch.tensor([0.5, -2.0]), torch.tensor([])]) == 2.0
    assert largest([]) == 0.0
    for place in (0, 1):
        tensors = [torch.tensor([0.1]), torch.tensor([0.2])]
        tensors[place][0] = math.nan
        assert math.isnan(largest(tensors))


def test_mismatch_by_hand_and_without_loss_tokens():
    groups = SimpleNamespace(world_size=1, is_pipeline_last=True, coords=SimpleNamespace(tp=0))
    run = SimpleNamespace(groups=groups)
    metrics = mismatch(run, [pack([Sample((5, 6, 7, 1), 2, 0.5, (-0.1, 0.3))], [0.5])])  # old log-probs are 0 here
    d = torch.tensor([0.1, -0.3], dtype=torch.float64)
    want = {"mismatch/k3": (d.exp() - 1 - d).mean(), "mismatch/abs_mean": d.abs().mean(), "mismatch/abs_max": 0.3}
    assert metrics.keys() == want.keys()
    assert all(math.isclose(metrics[k], float(v), rel_tol=1e-5) for k, v in want.items())
    assert mismatch(run, [pack([Sample((5, 6, 1), 0, 0.5, ())], [0.0])]) == {}
