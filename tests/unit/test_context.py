"""Which tokens a context-parallel rank holds, and that attention over its share is attention over all."""

import pytest
import torch
import torch.nn.functional as F

from mcore_rl.model.layers import ContextBatches
from mcore_rl.parallel.context import context_ranks

BOUNDS = torch.tensor([0, 12, 18, 18, 36])  # lengths 12, 6, 0, 18


def test_by_hand():
    assert context_ranks(torch.tensor([0, 6, 18]), 3).tolist() == [
        0,
        1,
        2,
        2,
        1,
        0,
        *[0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0],
    ]


def test_a_length_that_cannot_be_cut():
    with pytest.raises(AssertionError, match=r"\[4, 6\] tokens cannot be cut into 4 chunks"):
        context_ranks(torch.tensor([0, 4, 10]), 2)


def test_megatron_rotates_the_same_tokens():
    """Positions that Megatron's rotary embedding gives to a rank's share of a segment."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    bounds, cp = BOUNDS.tolist(), 3
    for rank in range(cp):
        held = (context_ranks(BOUNDS, cp) == rank).nonzero()[:, 0]
        places = [
            a + _get_thd_freqs_on_this_cp_rank(rank, cp, torch.empty((b - a) // cp), torch.arange(b - a))
            for a, b in zip(bounds, bounds[1:])
        ]
        assert torch.equal(torch.cat(places), held)


def test_attention_of_the_shares():
    """Queries of every rank against gathered keys and values, as `SdpaAttention` lays them out, against a loop."""
    cp, heads, width = 3, 2, 4
    query, key, value = torch.randn(3, int(BOUNDS[-1]), heads, width, dtype=torch.float64)
    owner = context_ranks(BOUNDS, cp)
    gathered = owner.argsort(stable=True)

    def attention(q, k, v, **mask):
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), **mask).transpose(0, 1)

    segments = [slice(a, b) for a, b in zip(BOUNDS.tolist(), BOUNDS.tolist()[1:]) if b > a]
    expected = torch.cat([attention(query[s], key[s], value[s], is_causal=True) for s in segments])
    for rank in range(cp):
        batches = ContextBatches.from_cu_seqlens(BOUNDS, cp, rank)
        assert batches.counts == (1, 1, 1) and [m.shape[1] for m in batches.masks] == [6, 12, 18]
        q = query[owner == rank][batches.take_query]
        k, v = key[gathered][batches.take_key], value[gathered][batches.take_key]
        outs, at, of = [], 0, 0
        for mask in batches.masks:
            rows, columns = slice(at, at + len(mask)), slice(of, of + mask.shape[1])
            outs.append(attention(q[rows], k[columns], v[columns], attn_mask=mask))
            at, of = rows.stop, columns.stop
        torch.testing.assert_close(torch.cat(outs)[batches.place], expected[owner == rank])


def test_segments_of_one_length_are_one_batch():
    batches = ContextBatches.from_cu_seqlens(torch.tensor([0, 8, 12, 20]), 2, 1)
    assert batches.counts == (1, 2) and [tuple(m.shape) for m in batches.masks] == [(2, 4), (4, 8)]
