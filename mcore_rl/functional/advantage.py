"""From rewards to advantages."""

from __future__ import annotations

import torch
from torch import Tensor

BASELINES = ("mean", "leave_one_out")
STD_MODES = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor,
    *,
    baseline: str = "mean",
    std_mode: str = "group",
    ddof: int = 0,
    eps: float = 1e-6,
    batch_rewards: Tensor | None = None,
) -> Tensor:
    """(R - baseline) / (std + eps) within one prompt's responses (GRPO, Shao et al. 2024, section 4.1.2).

    Args:
        rewards: [G].
        baseline: mean of the group, or leave_one_out, the mean of the other G - 1 (RLOO, Ahmadian et al. 2024), which
            is G / (G - 1) times as large; the standard deviation is that of the whole group in both.
        std_mode: group; batch, that of `batch_rewards`; none (Dr.GRPO, Liu et al. 2025).
        ddof: 0 population, 1 Bessel's correction.
        eps: added to the standard deviation.
        batch_rewards: [B] rewards of all responses of the batch, for std_mode "batch".

    Returns:
        [G] of the rewards' dtype; exactly zero where all rewards of the group are equal.

    Raises:
        ValueError: unknown `baseline` or `std_mode`.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: allowed are {', '.join(BASELINES)}")
    if std_mode not in STD_MODES:
        raise ValueError(f"std_mode={std_mode!r}: allowed are {', '.join(STD_MODES)}")
    size = len(rewards)
    advantages = rewards - rewards.mean()
    if baseline == "leave_one_out":
        advantages = advantages * size / max(size - 1, 1)
    if std_mode != "none":
        assert std_mode == "group" or batch_rewards is not None
        advantages = advantages / (_std(rewards if std_mode == "group" else batch_rewards, ddof) + eps)
    # the mean of equal numbers may be off by a rounding error, which a division by a tiny std would blow up
    return torch.where(rewards.max() > rewards.min(), advantages, 0.0)


def _std(x: Tensor, ddof: int) -> Tensor:
    return ((x - x.mean()).square().sum() / max(len(x) - ddof, 1)).sqrt()


def terminal_rewards(scores: Tensor, mask: Tensor, segment_ids: Tensor) -> Tensor:
    """[T]: the score of each sequence at its last token where `mask`, 0 elsewhere.

    Args:
        scores: [T] a sequence's score on each of its tokens; read where `mask` is True.
        mask: [T] bool. segment_ids: [T] int64, a segment is contiguous.
    """
    kept = mask.nonzero()[:, 0]
    last = kept[_ends(segment_ids[kept])]
    return torch.zeros_like(scores).index_copy(0, last, scores[last])


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, segment_ids: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the sampled tokens of packed sequences (Schulman et al. 2016, eq. 16).

    delta_t = R_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next token of the same
    sequence with `mask`: masked tokens (tool output) are passed over and change nothing. V after the last is 0.

    Args:
        rewards, values: [T], read where `mask` is True; the value at the position whose logits give token t.
        mask: [T] bool. segment_ids: [T] int64, a segment is contiguous and whole.
        gamma: discount. lam: 0 one-step differences, 1 returns minus values.

    Returns:
        (advantages, returns = advantages + values), each [T], 0 where `mask` is False.
    """
    kept = mask.nonzero()[:, 0]
    r, v, segments = rewards[kept], values[kept], segment_ids[kept]
    following = torch.where(_ends(segments), 0.0, v.roll(-1))
    advantages = _discounted_suffix_sums(r + gamma * following - v, segments, gamma * lam)
    zeros = torch.zeros_like(values)
    return zeros.index_copy(0, kept, advantages), zeros.index_copy(0, kept, advantages + v)


def _ends(segment_ids: Tensor) -> Tensor:
    """[N] bool: the last token of each segment."""
    return torch.cat([segment_ids[1:] != segment_ids[:-1], segment_ids.new_ones(min(len(segment_ids), 1)).bool()])


def _discounted_suffix_sums(x: Tensor, segment_ids: Tensor, discount: float) -> Tensor:
    """y_t = x_t + discount * y_{t+1} within each segment, in log2(N) vector steps of doubling reach."""
    reach = 1
    while reach < len(x):
        same = segment_ids[reach:] == segment_ids[:-reach]
        ahead = torch.where(same, x[reach:], 0.0)
        x = torch.cat([x[:-reach] + discount**reach * ahead, x[-reach:]])
        reach = 2 * reach
    return x


def moments(name: str, x: Tensor) -> dict[str, Tensor]:
    """{"<name>_mean": x, "<name>_square": x^2 in float64}: what `whiten` and `value.explained_variance` need of x."""
    return {f"{name}_mean": x, f"{name}_square": x.double().square()}


def whiten(x: Tensor, mask: Tensor, *, count: Tensor, total: Tensor, square_total: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) with the statistics of the global batch, 0 where `mask` is False.

    Args:
        x: [T]. mask: [T] bool.
        count, total, square_total: number, sum and sum of squares of the x where `mask`, over all micro-batches and
            ranks, in fp64: one affine map for all of them.
    """
    mean = total / count
    variance = (square_total / count - mean * mean).clamp(min=0)
    return torch.where(mask, ((x - mean) / (variance + eps).sqrt()).to(x.dtype), 0.0)
