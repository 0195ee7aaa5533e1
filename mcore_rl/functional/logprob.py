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
            logits = _chunk_logits(hidden[rows], weight, *ctx.args)
            top = logits.max(-1).values
            _all_reduce(top, dist.ReduceOp.MAX, group)
            exp = (logits - top[:, None]).exp()
            local, column = _local_targets(targets[rows], start, weight.shape[0])
            picked = torch.where(local, logits.gather(-1, column[:, None])[:, 0] - top, 0.0)
            sums = torch.stack([exp.sum(-1), picked, (exp * (logits - top[:, None])).sum(-1)])
            _all_reduce(sums, dist.ReduceOp.SUM, group)
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
            log_p = _chunk_logits(hidden[rows], weight, *ctx.args) - log_z[rows, None]
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_logprobs is not None:
                local, column = _local_targets(targets[rows], start, weight.shape[0])
                grad.addcmul_(p, grad_logprobs[rows, None], value=-1)
                grad.scatter_add_(-1, column[:, None], torch.where(local, grad_logprobs[rows], 0.0)[:, None])
            if grad_entropy is not None:
                grad.addcmul_(p * (log_p + entropy[rows, None]), grad_entropy[rows, None], value=-1)
            grad = grad.div_(temperature).to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight.addmm_(grad.t(), hidden[rows])
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk_logits(hidden: Tensor, weight: Tensor, start: int, vocab_size: int, temperature: float, dtype) -> Tensor:
    logits = F.linear(hidden, weight).to(dtype) / temperature
    real = vocab_size - start
    if real < weight.shape[0]:
        # finite, so that p * logit of a padded row is 0 and not NaN
        logits[:, max(real, 0) :] = -1e30
    return logits


def _local_targets(targets: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    column = targets - start
    local = (column >= 0) & (column < rows)
    return local, torch.where(local, column, 0)


def _all_reduce(x: Tensor, op, group) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
