"""Checksums of HF tensors that add up over any way of cutting them into boxes.

The bits of an element, as an integer, are multiplied by an odd weight of its row and one of its column, and all are
added modulo 2**64. So the order does not matter, boxes of different ranks are added, and every change of a single
element is noticed. Exchanged rows, columns or tensors, a transposed matrix, or what an older version left are noticed
unless two sums of 64 bits happen to agree.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from mcore_rl.weights.cuts import Box, Factors

_ROW, _COLUMN = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # any two large odd numbers
_BLOCK = 2**17  # elements that are widened to 64 bits at a time, so that they stay in a processor's cache


def checksum(view: Tensor, box: Box, factors: Factors) -> int:
    """A signed 64-bit number of the elements of `box` (the shape of `view`) of an HF tensor of one or two dimensions.

    The bits are those of `view`'s dtype (2 or 4 bytes): cast before where the other side has another one.

    Example:
        >>> w, rows = torch.eye(4), ((4,), (4,))
        >>> parts = torch.tensor([checksum(w[i : i + 2], ((i, i + 2), (0, 4)), rows) for i in (0, 2)])
        >>> int(parts.sum()) == checksum(w, ((0, 4), (0, 4)), rows)
        True
    """
    bits = view.detach().view(torch.int32 if view.element_size() == 4 else torch.int16).cpu()
    if len(factors) == 1:
        bits, box, factors = bits[None], ((0, 1), *box), ((1,), *factors)
    num_row_dims = len(factors[0])
    rows = _weights(box[:num_row_dims], factors[0], _ROW)
    columns = _weights(box[num_row_dims:], factors[1], _COLUMN)
    return int((_row_sums(bits, num_row_dims, columns) * rows).sum())


def _row_sums(bits: Tensor, num_row_dims: int, columns: Tensor) -> Tensor:
    """[number of rows] int64."""
    if num_row_dims > 1:
        return torch.cat([_row_sums(part, num_row_dims - 1, columns) for part in bits.unbind(0)])
    blocks = bits.reshape(bits.shape[0], -1).split(max(1, _BLOCK // max(1, columns.numel())))
    return torch.cat([torch.mv(block.to(torch.int64), columns) for block in blocks])


def _weights(box: Box, factors: tuple[int, ...], step: int) -> Tensor:
    """Odd weights, int64 and as good as random, of the positions that a box takes in a dimension of the HF tensor."""
    position = torch.zeros((), dtype=torch.int64)
    for i, (low, high) in enumerate(box):
        position = position[..., None] + torch.arange(low, high) * prod(factors[i + 1 :])
    mixed = (position.flatten() + 1) * step
    mixed = (mixed ^ (mixed >> 30)) * step
    return mixed ^ (mixed >> 27) | 1
