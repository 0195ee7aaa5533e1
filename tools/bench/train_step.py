"""One GRPO update through our Megatron policy against the same update of the transformers model in plain PyTorch.

python -m tools.bench.train_step --model 10M --json
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mcore_rl.algorithms.grpo import GRPO
from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from mcore_rl.data.sequences import Sample
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Policy, forward_backward
from mcore_rl.model.optimizer import build_training
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.types import PackedBatch
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards
from tools.bench.batches import pack_mini_batch
from tools.bench.models import (
    EXPERTS,
    Json,
    Model,
    PromptTokens,
    Repeats,
    ResponseTokens,
    Seed,
    Sequences,
    asked_model,
    load_hf_model,
)
from tools.bench.side_by_side import check_equal, environment, fastest, interleave, show, throughput

MAX_RELATIVE_DIFF = {"float32": 1e-5, "bfloat16": 0.05}  # in bf16 rounding flips experts
OPTIMIZER = OptimizerConfig(lr=1e-5)
ALGORITHM = GRPO()
MICRO_BATCH_TOKENS = (8192, 1024)  # a micro-batch's budget of positions: each side takes the one that suits it
OLD_LOGPROB_NOISE = 0.2  # makes ratios differ from 1 and some of them clip, as in a later mini-batch


@dataclass(frozen=True)
class Side:
    """One implementation of an update, in two halves, and the work it can be given.

    Attributes:
        accumulate: gradients of all micro-batches, from zero; returns the loss.
        gradients: what `accumulate` left.
        apply: clips them and takes the optimizer step.
        settings: name -> argument of `accumulate`.
    """

    accumulate: Callable[[Any], float]
    gradients: Callable[[], Iterable[Tensor]]
    apply: Callable[[], Any]
    settings: dict[str, Any]

    def steps(self) -> dict[str, Callable[[], None]]:
        return {name: partial(self._step, work) for name, work in self.settings.items()}

    def _step(self, work: Any) -> None:
        self.accumulate(work)
        self.apply()


@dataclass(frozen=True)
class PaddedBatch:
    """A micro-batch of the rival: B sequences filled up on the right."""

    token_ids: Tensor  # [B, L]
    loss_mask: Tensor  # [B, L] bool, True where the next token is part of the response
    targets: Tensor  # [N] next tokens where `loss_mask`
    old_logprobs: Tensor  # [N]
    advantages: Tensor  # [N]
    weights: Tensor  # [N]

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def measure(
    folder: Path, num_sequences: int, prompt_tokens: int, response_tokens: int, dtype: str, repeats: int, seed: int
) -> dict:
    """Check, then time; see docs/benchmarks.md for the keys."""
    started = environment()
    groups = process_groups.init(ParallelLayout(), timeout_s=60, seed=seed)
    try:
        hf = load_hf_model(folder, EXPERTS[0], dtype).to(groups.device)
        samples = random_samples(num_sequences, prompt_tokens, response_tokens, hf.config.vocab_size, seed)
        samples = _with_old_logprobs(hf, samples, seed)
        settings = {f"{budget} tokens": dict(budget=budget) for budget in MICRO_BATCH_TOKENS}
        ours, rival = megatron_side(folder, groups, samples, response_tokens, settings, dtype), _rival(hf, samples)
        equal = check_equal(relative_differences(ours, rival, allowed=MAX_RELATIVE_DIFF[dtype]))
        our_steps, rival_steps = ours.steps(), rival.steps()
        our_best, rival_best = fastest(our_steps), fastest(rival_steps)
        timings = interleave({"megatron": our_steps[our_best], "transformers": rival_steps[rival_best]}, repeats)
    finally:
        process_groups.destroy()
    positions = sum(s.positions for s in samples)
    return {
        "benchmark": "train_step",
        **throughput(timings, positions),
        "equal": equal,
        "ours_at_its_best": {"setting": our_best, "of": list(our_steps)},
        "rival_at_its_best": {"setting": rival_best, "of": list(rival_steps)},
        "work": {"positions": positions},
        "environment": started,
    }


def random_samples(count: int, prompt_tokens: int, response_tokens: int, vocab_size: int, seed: int) -> list[Sample]:
    """Random tokens and advantages; response lengths uniform between a quarter and the whole of `response_tokens`.

    Advantages of mean 1 keep the loss away from 0, where a relative difference says nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    low = max(1, response_tokens // 4)
    lengths = torch.randint(low, response_tokens + 1, (count,), generator=generator).tolist()
    advantages = (1 + torch.randn(count, generator=generator)).tolist()
    tokens = [torch.randint(vocab_size, (prompt_tokens + n,), generator=generator).tolist() for n in lengths]
    return [Sample(tuple(t), n, a, (0.0,) * n) for t, n, a in zip(tokens, lengths, advantages)]


@torch.no_grad()
def _with_old_logprobs(hf: PreTrainedModel, samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Log-probs of another policy: the model's own, and noise."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for sample in samples:
        (batch,) = _padded_batches([sample], sample.positions)
        batch = batch.to(hf.device)
        logprobs = _logprobs(hf, batch)
        noisy = logprobs + OLD_LOGPROB_NOISE * torch.randn(logprobs.shape, generator=generator).to(hf.device)
        out.append(replace(sample, rollout_logprobs=tuple(noisy.tolist())))
    return out


def megatron_side(
    folder: Path,
    groups: Groups,
    samples: Sequence[Sample],
    max_response: int,
    settings: dict[str, dict[str, int]],
    dtype: str = "float32",
) -> Side:
    """The update as a run makes it, with the samples' rollout log-probs for old ones.

    Args:
        settings: name -> arguments of `pack_mini_batch`.
    """
    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, ModelConfig(path=str(folder), dtype=dtype), groups)
    load_hf(folder, megatron_shards(chunks, hf_config, groups))
    training = build_training(chunks, OPTIMIZER, ParallelConfig(), total_steps=1)
    policy = Policy(training.chunks, groups, vocab_size=hf_config.vocab_size)

    def accumulate(batches: Sequence[PackedBatch]) -> float:
        training.zero_grad()
        return sum(out.loss.item() for out in forward_backward(policy, batches, ALGORITHM.loss))

    def gradients() -> Iterable[Tensor]:
        return (p.main_grad for chunk in training.chunks for p in chunk.parameters())

    work = {}
    for name, packing in settings.items():
        packed = pack_mini_batch(samples, ALGORITHM, rank=0, num_ranks=1, max_response=max_response, **packing)
        work[name] = [replace(b, old_logprobs=b.rollout_logprobs).to(groups.device) for b in packed]
    return Side(accumulate, gradients, training.step, work)


def _padded_batches(samples: Sequence[Sample], budget: int) -> list[PaddedBatch]:
    """Sequences of similar length together, so that little is padding; as many as fit the budget with it."""
    ordered = sorted(samples, key=lambda s: -s.positions)
    batches, start = [], 0
    while start < len(ordered):
        count = max(1, budget // ordered[start].positions)
        batches.append(_pad(ordered[start : start + count], len(samples)))
        start += count
    return batches


def _pad(samples: Sequence[Sample], num_sequences: int) -> PaddedBatch:
    longest = samples[0].positions
    token_ids = pad_sequence([torch.from_numpy(s.token_ids[:-1]).long() for s in samples], batch_first=True)
    column = torch.arange(longest)
    first = torch.tensor([s.positions - s.num_response for s in samples])[:, None]
    last = torch.tensor([s.positions for s in samples])[:, None]
    per_token = [(s.advantage, 1 / (num_sequences * s.num_response)) for s in samples for _ in range(s.num_response)]
    advantages, weights = torch.tensor(per_token).unbind(1)
    return PaddedBatch(
        token_ids=token_ids,
        loss_mask=(column >= first) & (column < last),
        targets=torch.cat([torch.from_numpy(s.token_ids[-s.num_response :]).long() for s in samples]),
        old_logprobs=torch.cat([torch.from_numpy(s.rollout_logprobs) for s in samples]),
        advantages=advantages,
        weights=weights,
    )


def _rival(hf: PreTrainedModel, samples: Sequence[Sample]) -> Side:
    """A training step as one writes it without a framework."""
    betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    optimizer = torch.optim.AdamW(
        hf.parameters(), OPTIMIZER.lr, betas, OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay, fused=True
    )
    hf.train()

    def accumulate(work: tuple[str, Sequence[PaddedBatch]]) -> float:
        experts, batches = work
        hf.set_experts_implementation(experts)
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            ratio = (_logprobs(hf, batch) - batch.old_logprobs).exp()
            clipped = ratio.clamp(1 - ALGORITHM.clip_low, 1 + ALGORITHM.clip_high)
            per_token = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
            loss = (batch.weights * per_token).sum()
            loss.backward()
            total += loss.item()
        return total

    def apply() -> None:
        torch.nn.utils.clip_grad_norm_(hf.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()

    settings = {
        f"{experts}, {budget} tokens": (experts, [batch.to(hf.device) for batch in _padded_batches(samples, budget)])
        for experts in EXPERTS
        for budget in MICRO_BATCH_TOKENS
    }
    return Side(accumulate, lambda: (p.grad for p in hf.parameters()), apply, settings)


def _logprobs(hf: PreTrainedModel, batch: PaddedBatch) -> Tensor:
    """[N] of the targets. Padding on the right needs no mask under causal attention, and has no logits."""
    hidden = hf.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    return -F.cross_entropy(hf.lm_head(hidden[batch.loss_mask]), batch.targets, reduction="none")


def relative_differences(*sides: Side, allowed: float = MAX_RELATIVE_DIFF["float32"]) -> dict[str, tuple[float, float]]:
    """Relative differences, of every setting from the first; no step is taken.

    Norms are summed in float64: in fp32 the sum over millions of elements rounds more than the gradients differ.
    """
    found = []
    for side in sides:
        for work in side.settings.values():
            loss = side.accumulate(work)
            norm = sum(g.double().pow(2).sum() for g in side.gradients()).sqrt().item()
            found.append((loss, norm))
    names = ("loss_relative_diff", "grad_norm_relative_diff")
    worst = [max(abs(value - values[0]) / abs(values[0]) for value in values) for values in zip(*found)]
    return {name: (value, allowed) for name, value in zip(names, worst)}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "10M",
    sequences: Sequences = 64,
    prompt_tokens: PromptTokens = 32,
    response_tokens: ResponseTokens = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights and arithmetic")] = "float32",
    repeats: Repeats = 5,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """A GRPO update, Megatron against plain PyTorch, on one thread (OMP_NUM_THREADS changes it) or a GPU.

    In bfloat16 ours keeps fp32 main weights, moments and gradients, the rival everything in bfloat16.
    """
    work = dict(num_sequences=sequences, prompt_tokens=prompt_tokens, response_tokens=response_tokens, dtype=dtype)
    work |= dict(repeats=repeats, seed=seed)
    if dtype not in MAX_RELATIVE_DIFF:
        raise SystemExit(f"error: --dtype {dtype!r}: must be one of {', '.join(MAX_RELATIVE_DIFF)}")
    with asked_model(model, seed) as folder:
        result = measure(folder, **work)
    show(result | {"settings": dict(model=model) | work}, json)


if __name__ == "__main__":
    app()
