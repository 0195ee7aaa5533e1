"""The experts' product that a GPU takes, against one product an expert."""

import torch
from grouped_products import both_ways

from mcore_rl.model.layers import GroupedProduct

SPLITS = [3, 0, 2, 2]  # rows; the second expert has none


def test_values_and_gradients_are_those_of_one_product_an_expert():
    for ours, theirs in zip(*both_ways(SPLITS, (24, 16)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_are_not_held_twice():
    """What is kept for the backward pass are the weights themselves."""
    x, weights = torch.randn(7, 16, requires_grad=True), [torch.randn(24, 16, requires_grad=True) for _ in SPLITS]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        GroupedProduct.apply(x, torch.tensor(SPLITS).cumsum(0).to(torch.int32), *weights)
    assert {t.data_ptr() for t in weights} < {t.data_ptr() for t in kept} and len(kept) == len(weights) + 2
