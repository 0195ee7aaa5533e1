"""Log-probabilities and entropies of target tokens: the only place where logits exist.

Logits are made for a chunk of positions at a time, in the forward and again in the backward pass, from a matrix that
may be split over the tensor-parallel ranks by vocabulary. Peak memory is chunk * V/tp whatever T is.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(hidden @ output_weight.T / temperature).

    Args:
        hidden: [T, D], the same on every rank of `tp_group`. Its gradient is this rank's vocabulary share: the caller
            sums it over `tp_group` (Megatron's copy/gather regions do).
        output_weight: [V_local, D], rows [rank * V_local, (rank + 1) * V_local) of the padded vocabulary.
        targets: [T] int64 in [0, vocab_size).
        vocab_size: rows beyond it are padding and get probability 0.
        temperature: divides the logits, as it did when the tokens were sampled.
        chunk_tokens: positions whose logits exist at the same time.
        tp_group: ranks that share the vocabulary; None for one rank.

    Returns:
        (logprobs [T], entropy [T] in nats), float32 (float64 for float64 input).
    """
    return _TokenLogprobs.apply(hidden, output_weight, targets, vocab_size, temperature, chunk_tokens, tp_group)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, temperature, chunk_tokens, group):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, log_z = (torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(3))
        start = (dist.get_rank(group) if group is not None else 0) * weight.shape[0]
        ctx.group, ctx.args = group, (start, vocab_size, temperature, dtype)
        ctx.chunks = [slice(i, i + chunk_tokens) for i in range(0, hidden.shape[0], chunk_tokens)]
        for rows in ctx.chunks:
            top, sums = _chunk_sums(_chunk_logits(hidden[rows], weight, *ctx.args), targets[rows] - start, group)
            log_sum = sums[0].log()
            logprobs[rows] = sums[1] - log_sum
            entropy[rows] = log_sum - sums[2] / sums[0]
            log_z[rows] = top + log_sum
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        start, _, temperature, _ = ctx.args
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for rows in ctx.chunks:
            log_p = _chunk_logits(hidden[rows], weight, *ctx.args).sub_(log_z[rows, None])
            by_logprob, by_entropy = (None if g is None else g[rows] for g in (grad_logprobs, grad_entropy))
            grad = _chunk_gradient(log_p, entropy[rows], targets[rows] - start, by_logprob, by_entropy)
            grad = _divided(grad, temperature).to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight.addmm_(grad.t(), hidden[rows])
            del log_p, grad  # before the next chunk's logits exist
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk_logits(hidden: Tensor, weight: Tensor, start: int, vocab_size: int, temperature: float, dtype) -> Tensor:
    logits = _divided(F.linear(hidden, weight).to(dtype), temperature)
    real = vocab_size - start
    if real < weight.shape[0]:
        # finite, so that p * logit of a padded row is 0 and not NaN
        logits[:, max(real, 0) :] = -1e30
    return logits


def _chunk_sums(logits: Tensor, column: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The largest logit x of each row, and the sums of exp(x), of x at the target, of exp(x) x, all less the largest;
    `logits` is overwritten.
    """
    top = logits.max(-1).values
    _all_reduce(top, dist.ReduceOp.MAX, group)
    exp = logits.sub_(top[:, None]).exp()
    local, column = _local_targets(column, logits.shape[1])
    picked = torch.where(local, logits.gather(-1, column[:, None])[:, 0], 0.0)
    sums = torch.stack([exp.sum(-1), picked, exp.mul_(logits).sum(-1)])
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    return top, sums


def _chunk_gradient(
    log_p: Tensor, entropy: Tensor, column: Tensor, by_logprob: Tensor | None, by_entropy: Tensor | None
) -> Tensor:
    """By the logits; `log_p` is overwritten. In as few passes over the vocabulary as there can be."""
    p = log_p.exp()
    if by_logprob is None:
        by_logprob = torch.zeros_like(entropy)
    if by_entropy is None:
        grad = p.mul_(-by_logprob[:, None])
    else:  # -p (by_logprob + by_entropy (log_p + entropy))
        constant = by_logprob + by_entropy * entropy
        grad = log_p.mul_(-by_entropy[:, None]).sub_(constant[:, None]).mul_(p)
    local, column = _local_targets(column, log_p.shape[1])
    return grad.scatter_add_(-1, column[:, None], torch.where(local, by_logprob, 0.0)[:, None])


def _divided(x: Tensor, temperature: float) -> Tensor:
    """In place; a pass over all logits is worth avoiding."""
    return x if temperature == 1 else x.div_(temperature)


def _local_targets(column: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Whether a target is in this rank's share of the vocabulary, and its place there, or 0."""
    local = (column >= 0) & (column < rows)
    return local, torch.where(local, column, 0)


def _all_reduce(x: Tensor, op, group) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
