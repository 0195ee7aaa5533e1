"""The named dataclasses that flow through one training step.

Prompt -> RolloutGroup of Trajectories -> Sequences (`data.sequences`) -> PackedBatch -> PolicyOutput -> LossOutput.

What there is one of a token is held in arrays, never in Python objects: a large run has a hundred million a step.

Letters for shapes: B sequences, G responses a prompt, T packed tokens, S segments, V vocabulary,
L layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One question put to the policy.

    Example:
        >>> Prompt(id="digit_sort/0", token_ids=(8, 3, 6), text="613", answer="136").answer
        '136'
    """

    id: str  # stable between runs: the data cursor and the logs name it
    token_ids: tuple[int, ...]
    text: str
    answer: Any = None  # what the reward compares with; None where the reward needs no answer
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingParams:
    """How the rollout engine samples; the same names as vLLM's where both have one.

    Example:
        >>> SamplingParams(n=8, temperature=1.0, max_tokens=64).n
        8
    """

    n: int = 1  # responses a prompt
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = -1  # -1 keeps the whole vocabulary
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()  # beside the model's end-of-sequence tokens
    stop: tuple[str, ...] = ()  # stop strings


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampled response with what the rollout engine said of it. Sequences of numbers that are given become arrays.

    Example:
        >>> t = Trajectory(prompt_ids=(5, 6), response_ids=(7, 1), rollout_logprobs=(-0.1, -0.2),
        ...                finish_reason="stop", versions=3)
        >>> t.num_tokens, t.versions.tolist(), t.loss_mask.tolist()
        (4, [3, 3], [True, True])
    """

    prompt_ids: NDArray[np.int32]  # [T_prompt]
    response_ids: NDArray[np.int32]  # [T_resp]
    rollout_logprobs: NDArray[np.float32]  # [T_resp], of the distribution that was sampled from
    finish_reason: str  # "stop" (end token, stop token or string) or "length"
    versions: NDArray[np.int32]  # [T_resp], of the weights that sampled each token; one number: of all
    text: str = ""  # the response, decoded without special tokens
    reward: float | None = None
    rule_reward: float | None = None  # where a model's score is the reward: the rule's, an audit, never trained on
    expert_ids: NDArray[np.integer] | None = None  # [T-1, L, K], routes the rollout engine took
    loss_mask: NDArray[np.bool_] | None = None  # [T_resp], False where an environment wrote the token; None: nowhere

    def __post_init__(self) -> None:
        length = len(self.response_ids)
        mask = np.ones(length, bool) if self.loss_mask is None else self.loss_mask
        given = {
            "prompt_ids": (self.prompt_ids, np.int32),
            "response_ids": (self.response_ids, np.int32),
            "rollout_logprobs": (self.rollout_logprobs, np.float32),
            "versions": (as_versions(self.versions, length), np.int32),
            "loss_mask": (mask, np.bool_),
        }
        for name, (values, dtype) in given.items():
            object.__setattr__(self, name, np.asarray(values, dtype))
        assert len(self.rollout_logprobs) == len(self.versions) == len(self.loss_mask) == length

    def __eq__(self, other: object) -> bool:
        """Whether all that is known of both is the same."""
        return isinstance(other, Trajectory) and same_fields(self, other)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def policy_version(self) -> int:
        """Weight version that sampled its first token, the oldest."""
        return int(self.versions[0])


def same_fields(a: Any, b: Any) -> bool:
    """Whether two objects of one dataclass have equal fields, arrays among them."""
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in pairs)


def as_versions(versions: ArrayLike, length: int) -> NDArray[np.int32]:
    """[length], of one number for all tokens or of one a token."""
    return np.broadcast_to(np.asarray(versions, np.int32), (length,))


@dataclass(frozen=True)
class RolloutGroup:
    """All responses sampled for one prompt; advantages are group statistics.

    Example:
        >>> p = Prompt("0", (1,), "a")
        >>> RolloutGroup(p, ()).trajectories
        ()
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> Tensor:
        """[G] float64. Raises ValueError where a trajectory has no reward yet."""
        values = [t.reward for t in self.trajectories]
        if any(v is None for v in values):
            raise ValueError(f"group of prompt {self.prompt.id!r} has unscored trajectories; score it before asking")
        return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class BatchAhead:
    """The first round of a step's rollouts, asked of the engine and not yet trained on."""

    step: int
    first_prompt: int  # data cursor
    groups: tuple[RolloutGroup, ...] = ()  # what was generated; in a checkpoint only


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch as a model reads it: S sequences laid end to end, position t predicts `targets[t]`.

    A sequence of n tokens takes n-1 positions: its last token is only ever a target. Positions that fill a segment up
    to a length that the layout divides come last in it, and segments without loss tokens fill the batch up.

    Example: prompt (5, 6), response (7, 1) is one segment of three positions
        token_ids [5, 6, 7], targets [6, 7, 1], loss_mask [False, True, True], cu_seqlens [0, 3].
    """

    token_ids: Tensor  # [T] int64
    targets: Tensor  # [T] int64, the next token
    positions: Tensor  # [T] int64, restarts at 0 in every segment
    segment_ids: Tensor  # [T] int64, 0..S-1
    loss_mask: Tensor  # [T] bool, True where `targets` was sampled by the policy
    cu_seqlens: Tensor  # [S+1] int32
    labels: Tensor  # [S] int64, what a discriminator has to tell of each; 0 elsewhere
    expert_ids: Tensor | None = None  # [T, L, K], routes the policy must take
    observed_ids: Tensor | None = None  # [T, L, K], experts whose router log-probs a recorded pass looks at

    def to(self, device: torch.device):
        """The same batch on `device`."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: x.to(device) for name, x in values if x is not None})


@dataclass(frozen=True, kw_only=True)
class ScoredBatch(PackedBatch):
    """With all that is known of its tokens before the step, 0 where nothing was sampled."""

    advantages: Tensor  # [T]
    old_logprobs: Tensor  # [T]
    rollout_logprobs: Tensor  # [T]
    lags: Tensor | None = None  # [T] int, weight updates since the rollout engine sampled the target
    ref_logprobs: Tensor | None = None  # [T], of an algorithm with a reference
    values: Tensor | None = None  # [T], of one with a critic
    returns: Tensor | None = None  # [T], the same
    rollout_expert_ids: Tensor | None = None  # [T, L, K], routes the rollout engine took
    observed_logprobs: Tensor | None = None  # [T, L, K], what the routers gave `observed_ids` before the step


@dataclass(frozen=True, kw_only=True)
class WeightedBatch(ScoredBatch):
    """With the share of every token in the loss of its global mini-batch: what an update takes."""

    weights: Tensor  # [T], 0 where nothing was sampled
    router_weights: Tensor | None = None  # [T], of each token by how far its routers have moved


@dataclass(frozen=True)
class PolicyOutput:
    """What the policy says of `PackedBatch.targets`, all [T]; undefined where `loss_mask` is False."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss that is already a share of the global mini-batch, and metrics that add up.

    Summing `loss` over micro-batches and ranks gives the loss of the global mini-batch. A metric is a sum over the
    batch's loss tokens; dividing its total by the total of "num_tokens" gives the token mean of the mini-batch. A
    metric of something else than tokens comes with its own count: "pairs/accuracy" with "num_pairs"
    (`functional.reduce.metric_means`).
    """

    loss: Tensor  # []
    metrics: dict[str, Tensor]  # each [], detached
