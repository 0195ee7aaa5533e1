"""One trainer rank on whatever device is visible: log-probs and one training step of a checkpoint. Needs no vLLM.

python tests/gpu/trainer_kit.py FOLDER     one step in fp32, as JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTHS = (24, 40, 33, 1, 17)


@contextmanager
def one_rank() -> Iterator[Any]:
    """Process groups of one rank."""
    from mcore_rl.parallel import groups as process_groups
    from mcore_rl.parallel.layout import ParallelLayout

    try:
        yield process_groups.init(ParallelLayout(), timeout_s=60, seed=0)
    finally:
        process_groups.destroy()


def build(folder: Path, groups: Any, dtype: str, spec: str):
    """(training, policy) of a HF folder."""
    from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.forward import Policy
    from mcore_rl.model.optimizer import build_training
    from mcore_rl.weights.hf_read import load_hf
    from mcore_rl.weights.shards import megatron_shards

    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, ModelConfig(path=str(folder), dtype=dtype, spec=spec), groups)
    load_hf(folder, megatron_shards(chunks, hf_config, groups))
    training = build_training(chunks, OptimizerConfig(lr=1e-3), ParallelConfig(), total_steps=10)
    return training, Policy(training.chunks, groups, vocab_size=hf_config.vocab_size)


def packed(device: torch.device):
    """One micro-batch of segments of different length; every position but the first of a segment carries a loss."""
    from mcore_rl.algorithms.sft import SFT
    from mcore_rl.data.sequences import Sample
    from tools.bench.batches import pack_mini_batch

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 97, (length + 1,), generator=generator).tolist() for length in LENGTHS]
    samples = [Sample(tuple(row), len(row) - 1, 1.0, (0.0,) * (len(row) - 1)) for row in rows]
    (batch,) = pack_mini_batch(samples, SFT(), rank=0, num_ranks=1, budget=10_000, max_response=64)
    return batch.to(device)


def logprobs(folder: Path, groups: Any, dtype: str, spec: str) -> Tensor:
    """[T] of the packed batch, by Megatron."""
    from mcore_rl.model.forward import forward_only

    _, policy = build(folder, groups, dtype, spec)
    (out,) = forward_only(policy, [packed(groups.device)])
    return out.logprobs.cpu()


@torch.no_grad()
def hf_logprobs(folder: Path, device: torch.device, dtype: str) -> Tensor:
    """[T] of the same tokens, segment by segment, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    batch, found = packed(device), []
    for low, high in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:]):
        logits = model(batch.token_ids[None, low:high]).logits[0].float()
        found.append(logits.log_softmax(-1).gather(1, batch.targets[low:high, None])[:, 0])
    return torch.cat(found).cpu()


def one_step(folder: Path, groups: Any, spec: str = "local") -> dict[str, Any]:
    """Loss, gradient norm, and the log-probs before and after one optimizer step, in fp32."""
    from mcore_rl.algorithms.grpo import GRPO
    from mcore_rl.model.forward import forward_backward, forward_only

    training, policy = build(folder, groups, "float32", spec)
    batch = packed(groups.device)
    (before,) = forward_only(policy, [batch])
    batch = replace(batch, old_logprobs=before.logprobs)
    training.zero_grad()
    (out,) = forward_backward(policy, [batch], GRPO().loss)
    grad_norm, _ = training.step()
    (after,) = forward_only(policy, [batch])
    return {
        "device": str(groups.device),
        "loss": out.loss.item(),
        "grad_norm": grad_norm,
        "before": before.logprobs.tolist(),
        "after": after.logprobs.tolist(),
    }


if __name__ == "__main__":
    with one_rank() as the_groups:
        print(json.dumps(one_step(Path(sys.argv[1]), the_groups)))
