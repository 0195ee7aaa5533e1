"""Tokens a second of vLLM (our engine) against transformers' generate, sampling responses of a fixed length.

python -m tools.bench.rollout --model 10M --json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.engine import RolloutEngine
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.types import Prompt, RolloutGroup, SamplingParams
from tools.bench.models import (
    EXPERTS,
    Json,
    Model,
    PromptTokens,
    Repeats,
    Seed,
    asked_model,
    load_hf_model,
    random_prompts,
)
from tools.bench.side_by_side import check_equal, environment, fastest, interleave, show, throughput

MAX_LOGPROB_DIFF = 1e-4
CHECKED_PROMPTS = 8


def measure(folder: Path, num_prompts: int, prompt_tokens: int, response_tokens: int, repeats: int, seed: int) -> dict:
    """Check, then time; see docs/benchmarks.md for the keys."""
    hf = load_hf_model(folder, EXPERTS[0]).eval()
    prompts = random_prompts(num_prompts, prompt_tokens, hf.config.vocab_size, seed)
    sampling = SamplingParams(max_tokens=response_tokens)
    started = environment()
    with closing(_open_engine(folder, prompt_tokens, response_tokens, seed)) as engine:
        equal = check_equal(_differences(engine, hf, prompts[:CHECKED_PROMPTS], response_tokens, seed))
        rivals = _rivals(hf, prompts, response_tokens)
        best = fastest(rivals)
        timings = interleave(
            {"vllm": lambda: engine.generate(prompts, sampling, seed=seed), "hf_generate": rivals[best]}, repeats
        )
    return {
        "benchmark": "rollout",
        **throughput(timings, num_prompts * response_tokens),
        "equal": equal,
        "rival_at_its_best": {"experts": best, "of": list(rivals)},
        "environment": started,
    }


def _open_engine(folder: Path, prompt_tokens: int, response_tokens: int, seed: int) -> RolloutEngine:
    rollout = RolloutConfig(placement="in_process", max_response_tokens=response_tokens)
    return open_engine(rollout, WeightSyncConfig(), str(folder), "float32", prompt_tokens, world_size=1, seed=seed)


def _rivals(hf: PreTrainedModel, prompts: Sequence[Prompt], num_tokens: int) -> dict[str, Callable[[], Tensor]]:
    def run(experts: str) -> Tensor:
        hf.set_experts_implementation(experts)
        return _hf_generate(hf, prompts, num_tokens, do_sample=True, temperature=1.0, top_k=0)

    return {experts: partial(run, experts) for experts in EXPERTS}


@torch.inference_mode()
def _hf_generate(hf: PreTrainedModel, prompts: Sequence[Prompt], num_tokens: int, **how: Any) -> Tensor:
    """[B, num_tokens] responses of one batch; equal prompt lengths need no padding."""
    ids = torch.tensor([p.token_ids for p in prompts])
    mask = torch.ones_like(ids)
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, use_cache=True, pad_token_id=0, **how)
    return out[:, ids.shape[1] :]


def _differences(
    engine: RolloutEngine, hf: PreTrainedModel, prompts: Sequence[Prompt], num_tokens: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Greedy tokens that differ, and largest differences of log-probs, of greedy and of sampled responses."""
    greedy = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens), seed=seed)
    sampled = engine.generate(prompts, SamplingParams(max_tokens=num_tokens), seed=seed)
    ours = torch.tensor([g.trajectories[0].response_ids for g in greedy])
    theirs = _hf_generate(hf, prompts, num_tokens, do_sample=False)
    return {
        "greedy_tokens_different": (float((ours != theirs).sum()), 0.0),
        "logprob_max_diff": (max(_logprob_diff(hf, greedy), _logprob_diff(hf, sampled)), MAX_LOGPROB_DIFF),
    }


@torch.inference_mode()
def _logprob_diff(hf: PreTrainedModel, groups: Sequence[RolloutGroup]) -> float:
    responses = [g.trajectories[0] for g in groups]
    ids = torch.tensor([(*t.prompt_ids, *t.response_ids) for t in responses])
    start = len(responses[0].prompt_ids)
    logprobs = hf(ids).logits[:, start - 1 : -1].log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, start:, None])[..., 0]
    return (chosen - torch.tensor([t.rollout_logprobs for t in responses])).abs().max().item()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "10M",
    prompts: Annotated[int, typer.Option(min=1, help="sequences of one batch")] = 64,
    prompt_tokens: PromptTokens = 32,
    response_tokens: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Repeats = 5,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """vLLM against transformers' generate, tokens a second, in fp32 on one thread (OMP_NUM_THREADS changes it)."""
    settings = dict(model=model, prompts=prompts, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    with asked_model(model, seed) as folder:
        result = measure(folder, prompts, prompt_tokens, response_tokens, repeats, seed)
    show(result | {"settings": settings | dict(repeats=repeats, seed=seed)}, json)


if __name__ == "__main__":
    app()
