"""Models of Hugging Face transformers: log-probs of given tokens, on their own routes or on given ones.

The routers are read and replaced at their outputs by forward hooks, so that every architecture whose router module
returns (logits, gates, expert ids) in some order works as it is: Qwen3-MoE, OLMoE, Mixtral, Granite, DeepSeek-V3
(where its experts are one group) and others.
A replayed route keeps the set of experts and weighs them anew by the current logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.record.trace import RoutingTrace, margins

LOGIT_ELEMENTS = 2**26  # of a chunk: bounds the memory of its logits


@dataclass
class _Tap:
    """What one pass reads from the routers and puts into them; lists by layer, then by chunk."""

    routers: list[torch.nn.Module]
    scores: list[list[Tensor]]
    gates: list[list[Tensor]]
    ids: list[list[Tensor]]
    real: Tensor = field(default_factory=lambda: torch.empty(0))  # [B * T] of the chunk: not padding
    replayed: Tensor | None = None  # [n, L, K] of the chunk's real tokens


def load_model(path: str | Path, dtype: torch.dtype = torch.float64) -> Any:
    """The causal model of a HF folder, in eval mode; float64 makes small changes of the weights measurable.

    Raises:
        ValueError: no such folder, or no model in it.
    """
    from transformers import AutoModelForCausalLM

    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{str(path)!r} is no model: a Hugging Face folder with config.json and weights is needed")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    if hasattr(model, "set_experts_implementation") and routers_of(model):
        model.set_experts_implementation("eager")  # the batched kernels take seconds a forward pass on a CPU
    return model.eval()


def routers_of(model: Any) -> list[torch.nn.Module]:
    """The routers in model order; none for a dense model.

    Raises:
        ValueError: the configuration names experts but no router module was recognised, or experts are chosen by group.
    """
    found = [m for _, m in model.named_modules() if hasattr(m, "top_k") and "Router" in type(m).__name__]
    for router in found:
        if getattr(router, "topk_group", 1) < getattr(router, "num_group", 1):
            raise ValueError(
                f"{type(model).__name__} first chooses {router.topk_group} of {router.num_group} groups of experts: "
                "there is no one margin between chosen and not chosen; models with one group are supported"
            )
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), 0)
    if experts and not found:
        raise ValueError(
            f"{type(model).__name__} has {experts} experts but no module that looks like a router; "
            "supported are models whose router returns logits, gates and expert ids (Qwen3-MoE, OLMoE, Mixtral, ...)"
        )
    return found


def forward(model: Any, sequences: Sequence[Sequence[int]], routes: RoutingTrace | None = None, **options: Any):
    """Log-probs of every next token, with the model's own routes or with `routes` replayed.

    Gradients flow if the caller enables them. Every pass cuts its input into the same chunks, so that two passes differ
    by weights and routes alone.

    Returns:
        (one [n - 1] tensor a sequence of n tokens, the routes that were used; [T, 0, 0] for a dense model)

    Raises:
        ValueError: routes of another model or of other sequences; a router whose gates cannot be reproduced.
    """
    logprobs, trace, _ = forward_with_logits(model, sequences, routes, **options)
    return logprobs, trace


def forward_with_logits(
    model: Any, sequences: Sequence[Sequence[int]], routes: RoutingTrace | None = None, chunk_tokens: int = 4096
) -> tuple[list[Tensor], RoutingTrace, Tensor]:
    """As `forward`, and the scores [T, L, E] of which routers choose the largest: logits, or of a router with a
    correction bias (DeepSeek-V3) sigmoids and bias.

    Args:
        chunk_tokens: tokens with padding that go through the model at once.
    """
    routers = routers_of(model)
    cu_seqlens = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    _check(routers, routes, cu_seqlens)
    limit = min(chunk_tokens, LOGIT_ELEMENTS // model.config.get_text_config().vocab_size)
    tap = _Tap(routers, *([[] for _ in routers] for _ in range(3)))
    logprobs: list[Tensor] = []
    with _tapped(tap):
        for start, end in _chunks([len(s) for s in sequences], limit):
            lengths = torch.tensor([len(s) for s in sequences[start:end]])
            real = torch.arange(int(lengths.max()))[None] < lengths[:, None]
            tokens = torch.zeros(real.shape, dtype=torch.long)
            tokens[real] = torch.cat([torch.tensor(s) for s in sequences[start:end]])
            tap.real = real.flatten()
            if routes is not None:
                tap.replayed = routes.expert_ids[cu_seqlens[start] : cu_seqlens[end]].long()
            logits = model(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            picked = logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            logprobs += [row[: n - 1] for row, n in zip(picked, lengths.tolist())]
    return logprobs, *_trace(tap, cu_seqlens)


def sample(
    model: Any, prompts: Sequence[Sequence[int]], num_answers: int, max_new_tokens: int, seed: int, batch: int = 128
) -> list[list[tuple[int, ...]]]:
    """`num_answers` answers to each prompt, sampled at temperature 1 from the whole vocabulary.

    An answer ends with the end-of-sequence token, or without one at `max_new_tokens`.
    """
    from transformers import GenerationConfig

    stop = model.generation_config.eos_token_id
    stop = stop if stop is not None else model.config.eos_token_id
    ends = set(stop if isinstance(stop, list) else [stop])
    plain = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, eos_token_id=stop,
        pad_token_id=0,
    )  # fmt: skip
    asked = [prompt for prompt in prompts for _ in range(num_answers)]
    answers: list[tuple[int, ...]] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(asked), batch):
            rows = asked[start : start + batch]
            width = max(map(len, rows))
            tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            out = model.generate(input_ids=tokens, attention_mask=mask, generation_config=plain)
            answers += [_until(row, ends) for row in out[:, width:].tolist()]
    return [answers[i : i + num_answers] for i in range(0, len(answers), num_answers)]


def _until(tokens: list[int], ends: set[int]) -> tuple[int, ...]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def _chunks(lengths: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """(start, end) of neighbouring sequences that, padded to the longest, have at most `limit` tokens."""
    start, longest = 0, 0
    for i, n in enumerate(lengths):
        if i > start and max(longest, n) * (i + 1 - start) > limit:
            yield start, i
            start, longest = i, 0
        longest = max(longest, n)
    if lengths:
        yield start, len(lengths)


def _check(routers: list[torch.nn.Module], routes: RoutingTrace | None, cu_seqlens: Tensor) -> None:
    if routes is None:
        return
    if len(routers) != routes.expert_ids.shape[1]:
        raise ValueError(f"routes of {routes.expert_ids.shape[1]} layers for a model with {len(routers)} routers")
    if routes.cu_seqlens.tolist() != cu_seqlens.tolist():
        raise ValueError(
            f"routes of {len(routes.cu_seqlens) - 1} sequences, {int(routes.cu_seqlens[-1])} tokens, for "
            f"{len(cu_seqlens) - 1} sequences, {int(cu_seqlens[-1])} tokens: record them on the same sequences"
        )
    if routers and (routers[0].num_experts, routers[0].top_k) != (routes.num_experts, routes.expert_ids.shape[2]):
        raise ValueError(
            f"routes of {routes.num_experts} experts, top-{routes.expert_ids.shape[2]}, for a model of "
            f"{routers[0].num_experts} experts, top-{routers[0].top_k}"
        )


@contextmanager
def _tapped(tap: _Tap) -> Iterator[None]:
    def hook_of(layer: int):
        return lambda module, _, output: _pass_through(tap, layer, module, output)

    hooks = [router.register_forward_hook(hook_of(i)) for i, router in enumerate(tap.routers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pass_through(tap: _Tap, layer: int, router: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Record a router's decision, or put another in its place."""
    where = _places(router, output)
    logits, gates, ids = (output[i].view(-1, output[i].shape[-1]) for i in where)
    if tap.replayed is not None:
        ids = ids.clone()
        ids[tap.real] = tap.replayed[:, layer].to(ids.dtype)
        gates = _gates(router, logits, gates, output[where[2]].view_as(ids), ids)
    for kept, tensor in ((tap.scores, _scores(router, logits)), (tap.gates, gates), (tap.ids, ids)):
        kept[layer].append(tensor.detach()[tap.real])
    if tap.replayed is None:
        return output
    replaced = list(output)
    replaced[where[1]], replaced[where[2]] = gates.view_as(output[where[1]]), ids.view_as(output[where[2]])
    return tuple(replaced)


def _places(router: Any, output: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """Where logits, gates and ids are in a router's output."""
    kinds = [(t.shape[-1], t.is_floating_point()) for t in output if isinstance(t, Tensor)]
    wanted = [(router.num_experts, True), (router.top_k, True), (router.top_k, False)]
    if sorted(kinds) != sorted(wanted):
        raise ValueError(
            f"{type(router).__name__} returns tensors of last sizes {[n for n, _ in kinds]}; a router with logits "
            f"[tokens, {router.num_experts}], gates and ids [tokens, {router.top_k}] is needed"
        )
    logits, ids = kinds.index(wanted[0]), kinds.index(wanted[2])
    return logits, 3 - logits - ids, ids


def _scores(router: Any, logits: Tensor) -> Tensor:
    """[t, E], what the router compares when it chooses."""
    bias = getattr(router, "e_score_correction_bias", None)
    return logits if bias is None else logits.sigmoid() + bias


def _gates(router: Any, logits: Tensor, own_gates: Tensor, own_ids: Tensor, ids: Tensor) -> Tensor:
    """How this router weighs the experts `ids`: by the rule that gives its own gates for its own experts."""
    scale = getattr(router, "routed_scaling_factor", 1.0)

    def of(ids: Tensor, weights: Tensor, normalised: bool) -> Tensor:
        chosen = weights.gather(-1, ids)
        return (scale * (chosen / chosen.sum(-1, keepdim=True) if normalised else chosen)).to(own_gates.dtype)

    for weights in (logits.float().softmax(-1), logits.float().sigmoid()):
        for normalised in (True, False):
            ours = of(own_ids, weights, normalised)
            if torch.allclose(ours, own_gates, atol=1e-2 if own_gates.dtype == torch.bfloat16 else 1e-6):
                same = (ids == own_ids).all(-1, keepdim=True)  # to the last bit, however the router rounds
                return torch.where(same, own_gates, of(ids, weights, normalised))
    raise ValueError(
        f"{type(router).__name__} weighs its experts by softmax or sigmoid neither over the chosen nor over all; "
        "routes cannot be replayed in it"
    )


def _trace(tap: _Tap, cu_seqlens: Tensor) -> tuple[RoutingTrace, Tensor]:
    if not tap.routers:
        num_tokens = int(cu_seqlens[-1])
        return RoutingTrace(torch.zeros(num_tokens, 0, 0).long(), None, None, 1, cu_seqlens), torch.zeros(
            num_tokens, 0, 1
        )
    scores, gates, ids = (
        torch.stack([torch.cat(layer) for layer in kept], 1) for kept in (tap.scores, tap.gates, tap.ids)
    )
    router = tap.routers[0]
    return RoutingTrace(ids, margins(scores, router.top_k), gates, router.num_experts, cu_seqlens), scores
