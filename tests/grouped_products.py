"""The experts' products in one kernel, and one product an expert."""

import torch
from torch import Tensor

from mcore_rl.model.layers import GroupedProduct


def both_ways(splits: list[int], shape: tuple[int, int], **where) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients (of the rows, of each expert's weight) together and apart; weights of `shape`."""
    torch.manual_seed(0)
    x = torch.randn(sum(splits), shape[1], requires_grad=True, **where)
    weights = [torch.randn(shape, requires_grad=True, **where) for _ in splits]
    apart = torch.cat([part @ weight.T for part, weight in zip(x.split(splits), weights)])
    together = GroupedProduct.apply(x, torch.tensor(splits).cumsum(0).to(x.device, torch.int32), *weights)
    grad = torch.randn_like(apart)
    return [[out, *torch.autograd.grad(out, (x, *weights), grad)] for out in (together, apart)]
