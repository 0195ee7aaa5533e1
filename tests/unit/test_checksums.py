"""Checksums add up over any cutting; boxes of plain rows are found again in groups of rows."""

import pytest
import torch

from mcore_rl.weights.checksums import checksum, signed
from mcore_rl.weights.plan import refactor
from mcore_rl.weights.shards import Shard

PLAIN, GROUPED = ((12,), (6,)), ((3, 4), (6,))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SEGMENT = {torch.float32: 32, torch.bfloat16: 64}  # columns


def matrix(columns=6, dtype=torch.float32):
    return torch.randn(12, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def whole(values):
    return part(values, *((0, size) for size in values.shape))


def part(values, *box):
    return checksum(values[tuple(slice(*side) for side in box)], box, tuple((size,) for size in values.shape))


@DTYPES
@pytest.mark.parametrize("columns", [6, 64, 128, 200])
def test_any_cutting_adds_up(dtype, columns):
    values = matrix(columns, dtype)
    for cut in {1, 4, columns // 2, columns - 1, min(SEGMENT[dtype], columns - 2)}:
        quarters = [part(values, rows, sides) for rows in ((0, 5), (5, 12)) for sides in ((0, cut), (cut, columns))]
        assert signed(sum(quarters)) == whole(values)
    groups, factors = values.view(3, 4, columns), ((3, 4), (columns,))
    halves = [checksum(groups[:, a:b], ((0, 3), (a, b), (0, columns)), factors) for a, b in ((0, 1), (1, 4))]
    assert signed(sum(halves)) == whole(values), "rows of a fused parameter, which are not next to each other"


@DTYPES
def test_the_memory_does_not_matter(dtype):
    """Whether words can be read, or elements one by one."""
    values = matrix(200, dtype)
    moved = torch.zeros(12, 201, dtype=dtype)[:, 1:].copy_(values)
    assert whole(values.T.contiguous().T) == whole(moved) == whole(values)
    vector = values[0]
    assert whole(values[:, 0]) == whole(values[:, 0].clone()) and whole(moved[0]) == whole(vector)
    thirds = [part(vector, side) for side in ((0, 1), (1, 90), (90, 200))]
    assert signed(sum(thirds)) == whole(vector)


@pytest.mark.parametrize("columns", [6, 64])
def test_an_empty_box_adds_nothing(columns):
    values = matrix(columns)
    assert part(values, (4, 4), (0, columns)) == part(values, (0, 12), (3, 3)) == part(values[0], (2, 2)) == 0


def test_a_hand_computed_one():
    """Two elements are a word."""

    def of_bits(*bits):
        return whole(torch.tensor([bits], dtype=torch.int32).view(torch.float32))

    weight = of_bits(1, 0)
    assert weight % 2 == 1 and of_bits(0, 0) == 0
    assert of_bits(5, -2) == signed(weight * (5 - 2 * 2**32))


@DTYPES
@pytest.mark.parametrize("shape", [(2, 70), (140,)])
def test_every_bit_of_every_element_counts(dtype, shape):
    values = matrix(70, dtype).flatten()[:140].view(shape)
    num_bits = 8 * values.element_size()
    before, bits = whole(values), values.view(torch.int32 if num_bits == 32 else torch.int16).view(-1)
    for position in range(bits.numel()):
        kept = bits[position].clone()
        bits[position] ^= torch.tensor(1, dtype=bits.dtype) << position % num_bits
        assert whole(values) != before
        bits[position] = kept
    assert whole(values) == before


def test_what_is_elsewhere_is_something_else():
    square = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    one_row = square.clone()
    one_row[3] = square[3].roll(32)
    swapped = [square[[1, 0, *range(2, 128)]], square.roll(32, 1), one_row, square.flip(0), square.flip(1)]
    sums = {whole(x) for x in (square, square.T, *swapped, -square, square + 1e-6)}
    assert len(sums) == 9
    vector = square[0]
    assert len({whole(x) for x in (vector, vector[[1, 0, *range(2, 128)]], vector.roll(2), vector.flip(0))}) == 4


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
