"""The reduction of a loss is data: a weight for every token, fixed before the first forward pass.

The loss of a global mini-batch is sum_t weights_t * per_token_t. How the batch is cut into micro-batches, packed, or
spread over ranks cannot change it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant", "group_token_mean")


def sequence_weights(
    lengths: Tensor, aggregation: str, *, max_length: int | None = None, group_lengths: Tensor | None = None
) -> Tensor:
    """The weight of each token of every sequence of a global mini-batch.

    Args:
        lengths: [B] number of loss tokens of each sequence; sequences of length 0 count nowhere.
        aggregation: token_mean 1/sum(n); sequence_mean 1/(N n_i), the token mean inside each sequence;
            sequence_sum 1/N; constant 1/(N max_length) (Dr.GRPO); group_token_mean 1/(N m_i), which for whole groups is
            the token mean of each, averaged over groups (DAPO, eq. 8). N is the number of sequences with n_i > 0.
        max_length: the constant of "constant".
        group_lengths: [B] m_i, mean number of loss tokens of the sequence's group; None: every sequence is a group.

    Returns:
        [B] float64, one weight for all tokens of a sequence; 0 for an empty one.

    Raises:
        ValueError: unknown aggregation, or "constant" without `max_length`.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}: allowed are {', '.join(AGGREGATIONS)}")
    if aggregation == "constant" and not max_length:
        raise ValueError("aggregation='constant' divides by the longest response allowed; give max_length > 0")
    n = lengths.double()
    count = (n > 0).sum().clamp(min=1).double()
    weight = {
        "token_mean": lambda: 1 / n.sum().clamp(min=1),
        "sequence_mean": lambda: 1 / (count * n.clamp(min=1)),
        "sequence_sum": lambda: 1 / count,
        "constant": lambda: 1 / (count * float(max_length or 1)),
        "group_token_mean": lambda: 1 / (count * (n if group_lengths is None else group_lengths.double()).clamp(min=1)),
    }[aggregation]()
    return torch.where(n > 0, weight, 0.0)


def metric_means(totals: Mapping[str, float]) -> dict[str, float]:
    """Means from metrics that were summed over all micro-batches and ranks.

    "num_*" are counts. A metric "kind/name" is divided by "num_kind" where there is one ("pairs/accuracy" by
    "num_pairs"), else by "num_tokens"; nothing of a kind that did not occur is returned.

    Example:
        >>> metric_means({"policy/entropy": 6.0, "num_tokens": 3.0, "pairs/accuracy": 1.0, "num_pairs": 2.0})
        {'policy/entropy': 2.0, 'pairs/accuracy': 0.5}
    """
    counts = {name: totals.get(f"num_{name.split('/')[0]}", totals.get("num_tokens", 0.0)) for name in totals}
    return {
        name: value / counts[name] for name, value in totals.items() if not name.startswith("num_") and counts[name]
    }
