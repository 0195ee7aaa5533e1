"""Checksums of HF tensors that add up over any way of cutting them into boxes.

Rows are cut into segments of 128 bytes, vectors into single words of 8 bytes. The words of a segment, of two or four
elements each, are added, the sum is multiplied by an odd weight of the row and one of the segment, and all are added,
modulo 2**64. So boxes of different ranks are added, and every change of a single element is noticed. Exchanged rows,
segments or tensors, a transposed matrix, or what an older version left are noticed unless two sums of 64 bits happen to
agree; words exchanged within one segment of one row are not. With one addition a word a checksum is about as fast as
memory is read.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from mcore_rl.weights.cuts import Box, Factors

_ROW, _SEGMENT = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # any two large odd numbers
_WORDS = 16  # of a segment
_BLOCK = 2**17  # elements that are widened to 64 bits at a time, so that they stay in a processor's cache


def checksum(view: Tensor, box: Box, factors: Factors) -> int:
    """A signed 64-bit number of the elements of `box` (the shape of `view`) of an HF tensor of one or two dimensions.

    The bits are those of `view`'s dtype (2 or 4 bytes): cast before where the other side has another one.

    Args:
        factors: of the HF tensor; its columns are one dimension.

    Example:
        >>> w, rows = torch.eye(4), ((4,), (4,))
        >>> parts = [checksum(w[i : i + 2], ((i, i + 2), (0, 4)), rows) for i in (0, 2)]
        >>> signed(sum(parts)) == checksum(w, ((0, 4), (0, 4)), rows)
        True
    """
    return Checksum(view, box, factors)()


def signed(number: int) -> int:
    """Modulo 2**64, as `checksum` gives it."""
    return (number + 2**63) % 2**64 - 2**63


class Checksum:
    """`checksum` of what a view holds whenever it is called; made ready once."""

    def __init__(self, view: Tensor, box: Box, factors: Factors) -> None:
        view, num_words = view.detach(), _WORDS
        if len(factors) == 1:
            view, box, factors, num_words = view[None], ((0, 1), *box), ((1,), *factors), 1
        per_word = 8 // view.element_size()
        (low, high), (num_columns,), width = box[-1], factors[1], num_words * per_word  # elements of a segment
        self._rows = _rows(box[:-1], factors[0])
        segments = _weights(-(-num_columns // width), _SEGMENT)
        start, end = -(-low // width) * width, high // width * width
        if start >= end or not _has_words(view, start - low):
            start = end = high
        self._words, self._rest = None, []
        if start < end:
            count = (end - start) // width
            self._words = view[..., start - low : end - low].view(torch.int64).unflatten(-1, (count, num_words))
            self._segments = segments[start // width : end // width]
        for first, last in ((low, start), (end, high)):
            if first < last:
                columns = torch.arange(first, last)
                shifts = columns % per_word * (64 // per_word)
                part = view[..., first - low : last - low]
                self._rest.append((part, segments[columns // width] << shifts))

    def __call__(self) -> int:
        total = 0
        if self._words is not None:
            sums = self._words.sum(-1).cpu().view(self._rows.numel(), self._segments.numel())
            total += torch.dot(torch.mv(sums, self._segments), self._rows).item()
        for part, weights in self._rest:
            total += torch.dot(_by_element(part, weights), self._rows).item()
        return signed(total)


def _by_element(view: Tensor, weights: Tensor) -> Tensor:
    """[rows] int64, of what is not made of whole segments."""
    dtype, mask = (torch.int32, 0xFFFFFFFF) if view.element_size() == 4 else (torch.int16, 0xFFFF)
    bits = view.cpu().view(dtype).flatten(0, -2)
    blocks = bits.split(max(1, _BLOCK // max(1, weights.numel())))
    return torch.cat([torch.mv(block.to(torch.int64) & mask, weights) for block in blocks])


def _has_words(view: Tensor, column: int) -> bool:
    """Whether 64-bit words begin at `column` of every row."""
    per_word, (*steps, step) = 8 // view.element_size(), view.stride()
    return step == 1 and not any(n % per_word for n in (view.storage_offset() + column, *steps))


@lru_cache(maxsize=1024)
def _rows(box: Box, factors: tuple[int, ...]) -> Tensor:
    """The weights of the rows of a box."""
    return _weights(prod(factors), _ROW).view(factors)[tuple(slice(*side) for side in box)].flatten()


@lru_cache(maxsize=64)
def _weights(count: int, step: int) -> Tensor:
    """[count] int64, odd and as good as random."""
    mixed = (torch.arange(count) + 1) * step
    mixed = (mixed ^ (mixed >> 30)) * step
    return mixed ^ (mixed >> 27) | 1
