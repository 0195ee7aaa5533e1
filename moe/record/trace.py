"""Routes: which experts every token went to in every MoE layer, checked, and compact on disk.

Letters: T tokens, L MoE layers (dense layers are not counted) in model order, K experts a token, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INTEGERS = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class RoutingTrace:
    """The routes of S sequences laid end to end, and how sure the router was of them.

    The order of the K experts of a token carries no meaning: compare them as sets.

    Raises:
        ValueError: shapes that do not fit, or routes that no router can have chosen (see `check_routes`).

    Example: two sequences of 2 and 1 tokens through one MoE layer of 4 experts, top-2
        >>> ids = torch.tensor([[[0, 1]], [[2, 1]], [[3, 0]]], dtype=torch.uint8)
        >>> RoutingTrace(ids, None, None, 4, torch.tensor([0, 2, 3])).bytes_per_token
        2
    """

    expert_ids: Tensor  # [T, L, K] integers; uint8 is the compact form, uint16 above 256 experts
    margins: Tensor | None  # [T, L] gap between the K-th and the (K+1)-th router logit
    gates: Tensor | None  # [T, L, K] weight of each chosen expert, in the order of `expert_ids`
    num_experts: int
    cu_seqlens: Tensor  # [S+1] first token of each sequence, and T

    def __post_init__(self) -> None:
        check_routes(self.expert_ids, self.num_experts)
        shape = tuple(self.expert_ids.shape)
        for name, expected in (("margins", shape[:2]), ("gates", shape)):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the routes {shape} need {expected}")
        bounds = self.cu_seqlens.tolist()
        if bounds[:1] != [0] or bounds[-1] != shape[0] or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the number of tokens, {shape[0]}")

    @property
    def bytes_per_token(self) -> int:
        """Size of one token's routes in the compact form."""
        return self.expert_ids[:1].numel() * compact_dtype(self.num_experts).itemsize

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, routes in the compact form, margins and gates as they are."""
        tensors = {"expert_ids": compact(self.expert_ids, self.num_experts), "cu_seqlens": self.cu_seqlens}
        optional = {"margins": self.margins, "gates": self.gates}
        tensors |= {name: value for name, value in optional.items() if value is not None}
        metadata = {"num_experts": str(self.num_experts)}
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what `save` wrote. Raises ValueError where the file is no trace or its routes are impossible."""
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}
                num_experts = int((file.metadata() or {})["num_experts"])
            return cls(found["expert_ids"], found.get("margins"), found.get("gates"), num_experts, found["cu_seqlens"])
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{str(path)!r} is not a routing trace: {error!r}") from error


def margins(logits: Tensor, top_k: int) -> Tensor:
    """[N, L] gap between the last chosen and the first rejected expert; inf where every expert is chosen."""
    if logits.shape[-1] == top_k:
        return torch.full(logits.shape[:-1], torch.inf, dtype=logits.dtype)
    best = logits.topk(top_k + 1, dim=-1).values
    return best[..., -2] - best[..., -1]


def compact_dtype(num_experts: int) -> torch.dtype:
    """The smallest type that holds ids below `num_experts`. Raises ValueError above 65536 or below 1."""
    if not 1 <= num_experts <= 65536:
        raise ValueError(f"num_experts={num_experts} must be in 1..65536: routes are kept in one or two bytes an id")
    return torch.uint8 if num_experts <= 256 else torch.uint16


def compact(expert_ids: Tensor, num_experts: int) -> Tensor:
    """The routes in the smallest type. Raises ValueError for an id that it cannot hold."""
    _check_range(expert_ids, num_experts)
    return expert_ids.to(compact_dtype(num_experts))


def check_routes(expert_ids: Tensor, num_experts: int) -> None:
    """Refuse routes that no top-k router can have chosen; every one of them would be replayed without an error.

    With K = 1 a route that was never filled in (all zero) looks like a choice of expert 0 and passes.

    Raises:
        ValueError: names the first token and layer with an id outside 0..num_experts-1 (-1 is a missing route), an
            expert twice, or only zeros; or the type, if it cannot hold `num_experts` ids.
    """
    if expert_ids.ndim != 3 or expert_ids.dtype not in INTEGERS:
        raise ValueError(
            f"routes must be integers [tokens, layers, top-k], got {expert_ids.dtype} of shape "
            f"{tuple(expert_ids.shape)}"
        )
    if expert_ids.dtype.itemsize < compact_dtype(num_experts).itemsize:
        raise ValueError(
            f"routes over {num_experts} experts do not fit {expert_ids.dtype}: ids above 255 would have become others; "
            f"record them as {compact_dtype(num_experts)}"
        )
    _check_range(expert_ids, num_experts)
    ordered = expert_ids.long().sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(dim=-1)
    if twice.any():
        token, layer = twice.nonzero()[0].tolist()
        route = expert_ids[token, layer].tolist()
        what = "is all zero, as where nothing was recorded" if not any(route) else "names an expert twice"
        raise ValueError(f"the route {route} of token {token} in MoE layer {layer} {what}")


def _check_range(expert_ids: Tensor, num_experts: int) -> None:
    ids = expert_ids.long()
    outside = (ids < 0) | (ids >= num_experts)
    if outside.any():
        token, layer, k = outside.nonzero()[0].tolist()
        found = ids[token, layer, k].item()
        what = "is missing (-1)" if found == -1 else f"names expert {found}"
        raise ValueError(f"the route of token {token} in MoE layer {layer} {what}; experts are 0..{num_experts - 1}")
