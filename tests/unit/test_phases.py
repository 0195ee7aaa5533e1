"""Small parts of the phases that need no run."""

import math

import torch

from mcore_rl.phases import largest


def test_largest_does_not_lose_a_nan():
    assert largest([torch.tensor([0.5, -2.0]), torch.tensor([])]) == 2.0
    assert largest([]) == 0.0
    for place in (0, 1):
        tensors = [torch.tensor([0.1]), torch.tensor([0.2])]
        tensors[place][0] = math.nan
        assert math.isnan(largest(tensors))
