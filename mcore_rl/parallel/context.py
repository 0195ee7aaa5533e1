"""Which tokens of packed sequences a context-parallel rank holds.

Every segment is cut into 2*cp chunks of one length, and rank r holds chunks r and 2*cp-1-r of each (the convention of
Megatron and TransformerEngine for packed sequences): every rank then has as much causal attention to compute.
"""

from __future__ import annotations

import torch
from torch import Tensor


def context_ranks(cu_seqlens: Tensor, cp: int) -> Tensor:
    """[T], the rank that holds each token; a rank holds its tokens in the order of the batch.

    Args:
        cu_seqlens: [S+1] bounds of the segments, each as long as a multiple of 2*cp.

    Example:
        >>> context_ranks(torch.tensor([0, 4, 12]), cp=2).tolist()
        [0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    """
    lengths = cu_seqlens.diff().long()
    assert not (lengths % (2 * cp)).any(), f"segments of {lengths.tolist()} tokens cannot be cut into {2 * cp} chunks"
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    offsets = torch.arange(len(starts), device=starts.device) - starts
    chunk = offsets * 2 * cp // lengths.repeat_interleave(lengths)
    return torch.minimum(chunk, 2 * cp - 1 - chunk)
