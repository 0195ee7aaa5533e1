"""Checksums add up over any cutting; boxes of plain rows are found again in groups of rows."""

import pytest
import torch

from mcore_rl.weights.checksums import checksum
from mcore_rl.weights.plan import refactor
from mcore_rl.weights.shards import Shard

PLAIN, GROUPED = ((12,), (6,)), ((3, 4), (6,))


def matrix(dtype=torch.float32):
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


def whole(values):
    return checksum(values, ((0, 12), (0, 6)), PLAIN)


def part(values, rows, columns):
    return checksum(values[slice(*rows), slice(*columns)], (rows, columns), PLAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_cutting_adds_up(dtype):
    values = matrix(dtype)
    quarters = [part(values, rows, columns) for rows in ((0, 5), (5, 12)) for columns in ((0, 1), (1, 6))]
    assert torch.tensor(quarters).sum() == whole(values)
    groups = values.view(3, 4, 6)
    halves = [checksum(groups[:, a:b], ((0, 3), (a, b), (0, 6)), GROUPED) for a, b in ((0, 1), (1, 4))]
    assert torch.tensor(halves).sum() == whole(values), "rows of a fused parameter, which are not next to each other"
    assert checksum(values[:, 0], ((0, 12),), ((12,),)) == checksum(values[:, 0].clone(), ((0, 12),), ((12,),))


def test_a_hand_computed_one():
    """Bits 1 and -2 of a [1, 2] matrix are weighted by their columns, and all by the row."""

    def of_bits(*bits):
        ints = torch.tensor([bits], dtype=torch.int32)
        return checksum(ints.view(torch.float32), ((0, 1), (0, 2)), ((1,), (2,)))

    assert (of_bits(1, -2) - of_bits(1, 0) + 2 * of_bits(0, 1)) % 2**64 == 0
    assert of_bits(1, 0) % 2 == of_bits(0, 1) % 2 == 1 and of_bits(1, 0) != of_bits(0, 1) and of_bits(0, 0) == 0


def test_every_bit_of_every_element_counts():
    values = matrix()
    before, bits = whole(values), values.view(torch.int32)
    for position in range(bits.numel()):
        bit = torch.tensor(1, dtype=torch.int32) << position % 32
        bits.view(-1)[position] ^= bit
        assert whole(values) != before
        bits.view(-1)[position] ^= bit
    assert whole(values) == before


def test_what_is_elsewhere_is_something_else():
    square = matrix()[:6]
    box = ((0, 6), (0, 6))
    sums = {
        checksum(x, box, ((6,), (6,)))
        for x in (square, square.T, square.flip(0), square.flip(1), square[[1, 0, 2, 3, 4, 5]], -square, square + 1e-7)
    }
    assert len(sums) == 7


@pytest.mark.parametrize(("low", "high"), [(low, high) for low in range(12) for high in range(low + 1, 13)])
def test_rows_are_found_again_in_groups(low, high):
    values = torch.arange(72.0).view(12, 6)
    shard = Shard(
        hf_name="w", factors=PLAIN, box=((low, high), (1, 5)), rank=0, dtype=values.dtype, view=values[low:high, 1:5]
    )
    seen = torch.zeros(3, 4, 6)
    for piece in refactor(shard, GROUPED):
        index = tuple(slice(*sides) for sides in piece.box)
        assert torch.equal(piece.view, values.view(3, 4, 6)[index]), "a view of the same memory"
        seen[index] += 1
    expected = torch.zeros(12, 6)
    expected[low:high, 1:5] = 1
    assert torch.equal(seen.view(12, 6), expected), "every element once"
