"""What the training loop asks of a rollout engine, and the request rules every engine shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from mcore_rl.launch import FailureInWordsError
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams, Trajectory

Decoder = Callable[[Sequence[Sequence[int]]], list[str]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class RolloutError(FailureInWordsError):
    """The rollout engine is gone or refused its work; the message holds the cause."""


class WeightSyncClient(Protocol):
    """Control plane of a weight update: the four methods of vLLM's `VLLMWeightSyncClient` protocol, all synchronous.

    Generation is paused around them (`RolloutEngine.pause`). `finish_weight_update` drops every cached key/value block
    of the old weights, those of requests in flight too. All raise RolloutError.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class RolloutEngine(Protocol):
    """A generator of responses whose weights can be replaced in place.

    Attributes:
        policy_version: of the weights it samples from; 0 is the model folder it was opened with. To be set between
            `pause` and `resume`, right after the weights: tokens are labelled with it.
        placement: "in_process", "child" or "server".
        weight_backend: the weight-transfer backend it was started with.
        num_workers: processes or ranks that hold the weights (its tensor parallelism).
        trainer_host: address under which its workers reach this process.
        sync_client: control plane of weight updates.
    """

    policy_version: int
    placement: str
    weight_backend: str
    num_workers: int
    trainer_host: str

    @property
    def sync_client(self) -> WeightSyncClient: ...

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams, seed: int) -> list[RolloutGroup]:
        """`params.n` responses for each prompt, in the order of `prompts`; rewards are None.

        The samples of prompt i depend on the weights, `seed`, i and the prompt only: the same call gives the same
        samples (bit for bit in fp32), and two prompts with equal text get different ones. `expert_ids` are there where
        the engine was opened with `return_routes`. Engines outside of this process may be called from several threads
        at once, and given new weights meanwhile: `token_versions` then say which weights sampled what.

        Raises:
            ValueError: a prompt is empty or leaves no room for a response; nothing was sampled.
            RolloutError: the engine died.
        """
        ...

    def call_workers(self, method: str, **kwargs: Any) -> list[Any]:
        """Run a method of the worker extension on every worker. Raises RolloutError."""
        ...

    def pause(self) -> None:
        """Stop generating between two tokens; what is in flight stays, what is asked meanwhile waits.

        Raises RolloutError.
        """
        ...

    def resume(self) -> None:
        """Go on after `pause`: keys and values of what was in flight are computed again where weights have changed."""
        ...

    def sleep(self) -> None:
        """Leave the GPU's memory to the trainer until the next call of `generate` or `call_workers`.

        Does nothing on a CPU, without `rollout.sleep`, and where the engine sleeps already. Raises RolloutError.
        """
        ...

    def check_alive(self) -> None:
        """Raises RolloutError with the cause where the engine is dead or closed."""
        ...

    def close(self) -> None:
        """Stop the engine and whatever it started. May be called twice."""
        ...


def check_prompts(prompts: Sequence[Prompt], max_model_len: int) -> None:
    """Every prompt has a token and leaves room for one of the response.

    Raises:
        ValueError: names the prompt, its length and the limit.
    """
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(f"prompt {prompt.id!r} has no tokens; a prompt needs at least one")
        if len(prompt.token_ids) >= max_model_len:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens, but the engine allows {max_model_len - 1} "
                f"(max_model_len {max_model_len} less one for the response); raise rollout.max_model_len or set "
                "data.max_prompt_tokens"
            )


def request_seeds(seed: int, num_prompts: int, n: int) -> list[int]:
    """One seed for each prompt; engines use seed + j for its j-th response, so no two responses of a call share one.

    The seeds are distinct modulo 2**32, all that torch's CPU generator keeps of a seed.

    Example:
        >>> first, second = request_seeds(0, 2, 8)
        >>> second - first
        8
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
    start = int.from_bytes(digest, "big")
    return [start + index * n for index in range(num_prompts)]


def load_decoder(model_path: str) -> Decoder | None:
    """Token ids to text without special tokens, by the model folder's tokenizer; None where it has none."""
    if not any((Path(model_path) / name).exists() for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return lambda responses: tokenizer.batch_decode([list(ids) for ids in responses], skip_special_tokens=True)


@dataclass(frozen=True)
class Sampled:
    """One response as an engine returns it."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]  # as many
    finish_reason: str
    token_versions: NDArray[np.int32]  # as many
    expert_ids: Tensor | None = None  # [T-1, L, K]


def token_versions(spans: Sequence[tuple[str, int, int]] | None, num_tokens: int) -> NDArray[np.int32]:
    """The weight version of each token, from vLLM's (label, start, end) of a response.

    Raises:
        RolloutError: there are none, or labels that no trainer of ours has set.

    Example:
        >>> token_versions([("3", 0, 2), ("4", 2, 5)], 5).tolist()
        [3, 3, 4, 4, 4]
    """
    spans = spans or ()
    lengths = [end - start for _, start, end in spans]
    if sum(lengths) != num_tokens or not all(label.isdigit() for label, _, _ in spans):
        raise RolloutError(f"the engine says of a response of {num_tokens} tokens that its weights were {spans}")
    return np.repeat(np.array([int(label) for label, _, _ in spans], np.int32), lengths)


def make_group(prompt: Prompt, responses: Sequence[Sampled], decode: Decoder | None) -> RolloutGroup:
    """The unscored group of one prompt; texts are empty without a tokenizer."""
    texts = decode([r.token_ids for r in responses]) if decode else [""] * len(responses)
    prompt_ids = np.array(prompt.token_ids, np.int32)
    return RolloutGroup(
        prompt,
        tuple(
            Trajectory(
                prompt_ids=prompt_ids,
                response_ids=response.token_ids,
                rollout_logprobs=response.logprobs,
                finish_reason=response.finish_reason,
                versions=response.token_versions,
                text=text,
                expert_ids=None if response.expert_ids is None else response.expert_ids.numpy(),
            )
            for response, text in zip(responses, texts, strict=True)
        ),
    )
