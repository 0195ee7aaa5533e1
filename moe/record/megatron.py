"""Record and replay the routes of a Megatron-Core model under every layout.

Megatron's own switch, `RouterReplay`, is one global list of routers with one global action and queues of routes that
backward passes pop. Routes here belong to the micro-batch instead: they travel on its PackedSeqParams, which every
layer is given, and is given again when it is recomputed, so interleaved schedules and recomputation need no queue.
They reach the router by the hook that Megatron made for its switch, `TopKRouter.router_replay`.

Letters: T tokens of a packed micro-batch, t of them on this rank, L MoE layers of the whole model, K experts a token,
E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from moe.record.trace import check_routes, compact_dtype


@dataclass(frozen=True)
class Recorded:
    """What the routers of the whole model did with a micro-batch of T tokens; the same on all ranks that share it.

    All but the routes are None where only these were asked for. A margin is the gap between the K-th
    and (K+1)-th selection score: logits, or sigmoids (with their bias) where the model selects by those.
    """

    expert_ids: Tensor  # [T, L, K] in the compact type of `moe.record.trace`
    margins: Tensor | None = None  # [T, L]
    gates: Tensor | None = None  # [T, L, K]
    entropy: Tensor | None = None  # [T, L] of the router's distribution over the experts, in nats
    log_p: Tensor | None = None  # [T, L, K] log-probs of the chosen, or of the observed experts


@dataclass
class Passage:
    """One micro-batch's way through this rank's routers: what they must choose, and what they did.

    It holds through a backward pass, and may be used for one micro-batch's forward pass at a time.
    """

    rows: Tensor  # [t] this rank's tokens among the T
    total: int  # T
    replayed: dict[int, Tensor] | None = None  # MoE layer -> [t, K] int64
    statistics: bool = False
    observed: dict[int, Tensor] | None = None  # MoE layer -> [t, K] int64: of these the log-probs are recorded
    found: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # MoE layer -> name -> [t, ...]

    def put_on(self, params: PackedSeqParams) -> None:
        """Let the layers of a forward pass find it."""
        params.routes = self


class Routers:
    """All routers of a Megatron model, of which this rank holds some.

    Args:
        chunks: the model's chunks on this rank, one a virtual pipeline stage, wrapped or not.
        tp, cp, pp: process groups over which tokens (tp under sequence parallelism, cp) and layers (pp) are spread.

    Raises:
        ValueError: no MoE layer in the model, or a setting under which routes would be bypassed.
    """

    def __init__(
        self,
        chunks: Iterable[torch.nn.Module],
        config: TransformerConfig,
        *,
        tp: dist.ProcessGroup,
        cp: dist.ProcessGroup,
        pp: dist.ProcessGroup,
    ):
        _refuse_bypasses(config)
        self.layers = moe_layers(config)
        self.num_experts, self.top_k = config.num_moe_experts, config.moe_router_topk
        self._sequence = tp if config.sequence_parallel else None
        self._cp = cp
        self._spread = [group for group in (self._sequence, cp, pp) if group is not None and group.size() > 1]
        blocks = (m for c in chunks for m in c.modules() if isinstance(m, TransformerLayer))
        self._taps = [_Tap(b, self.layers.index(b.layer_number - 1)) for b in blocks if isinstance(b.mlp, MoELayer)]

    def replay(self, expert_ids: Tensor, shard: Tensor | None = None, *, statistics: bool = False) -> Passage:
        """A passage in which every router takes the given experts; their gates follow from its own logits.

        Args:
            expert_ids: [T, L, K] of the whole micro-batch, on every rank.
            shard: as for `record`.
            statistics: also record margins, gates and entropies of the routers that are told what to choose.

        Raises:
            ValueError: routes of another model, or impossible ones.
        """
        expected = (len(self.layers), self.top_k)
        if tuple(expert_ids.shape[1:]) != expected:
            raise ValueError(
                f"routes have (MoE layers, top-k) = {tuple(expert_ids.shape[1:])}, the model {expected}; replay routes "
                "that were recorded from the same architecture"
            )
        check_routes(expert_ids, self.num_experts)
        passage = self.record(expert_ids.shape[0], shard, statistics=statistics, device=expert_ids.device)
        mine = expert_ids.long()[passage.rows]
        passage.replayed = {tap.layer: mine[:, tap.layer] for tap in self._taps}
        return passage

    def record(
        self,
        total: int,
        shard: Tensor | None = None,
        *,
        statistics: bool = False,
        observed: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Passage:
        """A passage in which the routers choose for themselves.

        Args:
            total: T, tokens of the whole micro-batch.
            observed: [T, L, K] experts whose log-probs are recorded, with the statistics, instead of the chosen ones'.
            shard: which of them this context-parallel rank holds, in its order; None: all.
        """
        assert (shard is None) == (self._cp.size() == 1), "context-parallel ranks say which tokens they hold"
        rows = torch.arange(total, device=device) if shard is None else shard
        if self._sequence is not None:
            rows = rows.chunk(self._sequence.size())[self._sequence.rank()]
        passage = Passage(rows, total, statistics=statistics)
        if observed is not None:
            passage.observed = {tap.layer: observed.long()[rows, tap.layer] for tap in self._taps}
        return passage

    def gather(self, passage: Passage) -> Recorded:
        """What a finished passage found, of all layers and tokens. Called by all ranks that share the micro-batch."""
        shapes = {"expert_ids": (self.top_k,)}
        if passage.statistics:
            shapes |= {"margins": (), "gates": (self.top_k,), "entropy": (), "log_p": (self.top_k,)}
        return Recorded(**{name: self._whole(passage, name, shape) for name, shape in shapes.items()})

    def _whole(self, passage: Passage, name: str, shape: tuple[int, ...]) -> Tensor:
        """Each rank writes its layers of its tokens over zeros: the sum over the ranks is exact."""
        missing = [tap.layer for tap in self._taps if tap.layer not in passage.found]
        assert not missing, f"MoE layers {missing} have not been passed"
        dtype = torch.float32
        if name == "expert_ids":  # process groups cannot sum uint16
            dtype = torch.uint8 if self.num_experts <= 256 else torch.int32
        whole = torch.zeros(passage.total, len(self.layers), *shape, dtype=dtype, device=passage.rows.device)
        for layer, found in passage.found.items():
            whole[passage.rows, layer] = found[name].to(dtype)
        for group in self._spread:
            dist.all_reduce(whole, group=group)
        return whole.to(compact_dtype(self.num_experts)) if name == "expert_ids" else whole


def moe_layers(config: TransformerConfig) -> tuple[int, ...]:
    """Numbers, from 0, of the decoder layers that have experts. Raises ValueError for a dense model."""
    every = config.moe_layer_freq
    if config.num_moe_experts is None:
        raise ValueError("the model has no MoE layers, so no routes to record or replay")
    sparse = [i % every == 0 for i in range(config.num_layers)] if isinstance(every, int) else every
    return tuple(layer for layer, is_moe in enumerate(sparse) if is_moe)


class _Tap:
    """Stands in one router where Megatron looks for its RouterReplay."""

    def __init__(self, block: TransformerLayer, layer: int):
        self.layer, self.router = layer, block.mlp.router
        self._passage: Passage | None = None
        self.router.router_replay = self
        self.router.register_forward_hook(self._gates)
        block.register_forward_pre_hook(self._enter, with_kwargs=True)

    def _enter(self, block: TransformerLayer, args: Any, kwargs: dict[str, Any]) -> None:
        self._passage = getattr(kwargs.get("packed_seq_params"), "routes", None)

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable
    ) -> tuple[Tensor, Tensor]:
        """Megatron's call: (values, ids), both [t, K], of scores [t, E]; `choose` is its own top-k."""
        passage = self._passage
        if passage is None:
            return choose(scores, topk, num_groups, group_topk)
        if passage.replayed is None:
            values, ids = choose(scores, topk, num_groups, group_topk)
        else:
            ids = passage.replayed[self.layer]
            if len(ids) != len(scores):  # a gather of fewer rows than tokens would not complain
                raise ValueError(
                    f"MoE layer {self.layer}: routes of {len(ids)} tokens for {len(scores)} on this rank; replay the "
                    "routes of this very micro-batch, padding included"
                )
            values = scores.gather(1, ids)
        found = {"expert_ids": ids}
        if passage.statistics:
            detached = scores.detach()
            log_p = self._log_p(detached)
            watched = ids if passage.observed is None else passage.observed[self.layer]
            found |= {"margins": margins(self._comparable(detached), topk), "log_p": log_p.gather(1, watched)}
            found["entropy"] = -(log_p.exp() * log_p).sum(-1)
        passage.found[self.layer] = found
        return values, ids

    def _gates(self, router: TopKRouter, args: Any, output: tuple[Tensor, Tensor]) -> None:
        if self._passage is not None and self._passage.statistics:
            found = self._passage.found[self.layer]
            found["gates"] = output[0].detach().gather(1, found["expert_ids"])

    def _comparable(self, scores: Tensor) -> Tensor:
        """Logits where they were softmaxed before the choice: their differences do not depend on the normalisation."""
        router = self.router
        return scores.log() if router.score_function == "softmax" and router.config.moe_router_pre_softmax else scores

    def _log_p(self, scores: Tensor) -> Tensor:
        """[t, E] log-probs of the router's distribution over the experts."""
        router = self.router
        if router.score_function == "softmax":
            return self._comparable(scores).float().log_softmax(-1)
        sigmoids = scores if router.expert_bias is None else scores - router.expert_bias
        return sigmoids.float().clamp(min=1e-20).log().log_softmax(-1)  # sigmoids over their sum


def margins(scores: Tensor, top_k: int) -> Tensor:
    """[t], the gap between the K-th and the (K+1)-th of scores [t, E]; infinite where all experts are chosen."""
    if scores.shape[1] == top_k:
        return scores.new_full(scores.shape[:1], torch.inf)
    best = scores.topk(top_k + 1, dim=1).values
    return best[:, -2] - best[:, -1]


def _refuse_bypasses(config: TransformerConfig) -> None:
    bypasses = {
        "moe_router_fusion": config.moe_router_fusion,
        "cuda_graph_impl": config.cuda_graph_impl != "none",
        "moe_router_load_balancing_type": config.moe_router_load_balancing_type == "sinkhorn",
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        # it calls the MoE layer alone, which does not know of which micro-batch it is
        "recompute_modules": config.recompute_granularity == "selective" and "moe" in config.recompute_modules,
        "overlap_moe_expert_parallel_comm": config.overlap_moe_expert_parallel_comm,
    }
    if found := [f"{name}={getattr(config, name)!r}" for name, bypassed in bypasses.items() if bypassed]:
        raise ValueError(
            f"routes can be neither recorded nor replayed under Megatron's {', '.join(found)}; turn that off"
        )
