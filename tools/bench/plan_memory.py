"""What `mcore-rl plan` predicts against what one training step on this host holds.

python -m tools.bench.plan_memory --model 10M --json

Weights, gradients and optimizer are read off the tensors. Activations are the highest sum of live tensors during
forward and backward pass: on a GPU the allocator's, on a CPU that seen at torch's dispatcher (scratch memory inside of
kernels is not).
"""

from __future__ import annotations

import json as json_module
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcore_rl.algorithms.grpo import GRPO
from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from mcore_rl.data.sequences import Sample
from mcore_rl.model.build import build_model, read_hf_config, transformer_config
from mcore_rl.model.forward import Policy, forward_backward
from mcore_rl.model.optimizer import Training, build_training, torch_optimizers
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.memory import activations, trained_state
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards
from tools.bench.batches import pack_mini_batch
from tools.bench.models import Json, Model, asked_model
from tools.bench.side_by_side import device_peak_bytes

CHUNK_TOKENS = 256
VARIANTS = [(dtype, recompute) for dtype in ("float32", "bfloat16") for recompute in ("none", "selective", "full")]


class PeakMemory(TorchDispatchMode):
    """Bytes of all storages that came to life inside it: `peak` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in before and storage not in self._known:
                self._known.add(storage)
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self._live -= size


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that `step` holds at once of what it allocates."""
    if torch.cuda.is_available():
        return device_peak_bytes(step)
    with PeakMemory() as memory:
        step()
    return memory.peak


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def measured_state(training: Training) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer of a model that has taken a step; without Adam's step counters."""
    params = [p for chunk in training.chunks for p in chunk.parameters()]
    weights = {s.data_ptr(): s.nbytes() for s in _storages(params)}
    # Views of main_grad all lie in one buffer.
    gradients = {s.data_ptr(): s.nbytes() for s in _storages([p.main_grad for p in params])}
    optimizer = {}
    for inner in torch_optimizers(training.optimizer):
        states = [t for state in inner.state.values() for name, t in state.items() if name != "step"]
        main = [p for group in inner.param_groups for p in group["params"]]
        tensors = {s.data_ptr(): s.nbytes() for s in _storages(states + main)}
        optimizer |= {where: size for where, size in tensors.items() if where not in weights}
    return {"weights": _sum(weights), "gradients": _sum(gradients), "optimizer": _sum(optimizer)}


def _sum(sizes: dict[int, int]) -> int:
    return sum(sizes.values())


def measure(folder: Path, groups: Groups, dtype: str, recompute: str, lengths: Iterable[int]) -> dict[str, list[int]]:
    """What -> [predicted, measured] bytes for one update of packed sequences of these lengths."""
    hf_config = read_hf_config(folder)
    model = ModelConfig(path=str(folder), dtype=dtype, recompute=recompute)
    optimizer, parallel = OptimizerConfig(), ParallelConfig()
    chunks = build_model(hf_config, model, groups)
    load_hf(folder, megatron_shards(chunks, hf_config, groups))
    training = build_training(chunks, optimizer, parallel, total_steps=1)
    policy = Policy(training.chunks, groups, vocab_size=hf_config.vocab_size, chunk_tokens=CHUNK_TOKENS)
    samples = _samples(lengths, hf_config.vocab_size)
    positions = sum(sample.positions for sample in samples)
    batches = pack_mini_batch(samples, GRPO(), rank=0, num_ranks=1, budget=positions, max_response=positions)
    batches = [batch.to(groups.device) for batch in batches]
    training.zero_grad()
    peak = peak_bytes(lambda: forward_backward(policy, batches, GRPO().loss))
    training.step()
    state = trained_state(hf_config, groups.layout, 0, model, optimizer, parallel)
    found = {what: [getattr(state, what), size] for what, size in measured_state(training).items()}
    shape = transformer_config(hf_config, model, groups.layout)
    of = activations(
        shape,
        groups.layout,
        0,
        model,
        positions,
        CHUNK_TOKENS,
        hf_config.vocab_size,
        fused_norms=torch.cuda.is_available(),
    )
    return found | {"activations": [of.kept + max(of.working, of.logits), peak]}


def _samples(lengths: Iterable[int], vocab_size: int) -> list[Sample]:
    """Random tokens, the second half of each sequence being its response."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in lengths:
        tokens = torch.randint(vocab_size, (length + 1,), generator=generator).tolist()
        samples.append(Sample(tuple(tokens), length // 2, 1.0, (0.0,) * (length // 2)))
    return samples


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Model = "10M",
    sequences: Annotated[int, typer.Option(min=1, help="in one micro-batch")] = 16,
    length: Annotated[int, typer.Option(min=0, help="tokens of each; 0: 96 to 160")] = 0,
    json: Json = False,
) -> None:
    """Predicted and measured bytes of one update on one rank, by dtype and recomputation."""
    lengths = [length or 96 + 37 * i % 65 for i in range(sequences)]
    with asked_model(model, seed=0) as folder:
        groups = process_groups.init(ParallelLayout(), timeout_s=60, seed=0)
        try:
            found = {" ".join(v): measure(folder, groups, *v, lengths) for v in VARIANTS}
        finally:
            process_groups.destroy()
    if json:
        print(
            json_module.dumps({"benchmark": "plan_memory", "model": model, "positions": sum(lengths), "bytes": found})
        )
        return
    print(f"{'variant':<20}{'what':<14}{'predicted MB':>14}{'measured MB':>14}{'error':>9}")
    for variant, rows in found.items():
        for what, (predicted, measured) in rows.items():
            error = predicted / measured - 1
            print(f"{variant:<20}{what:<14}{predicted / 1e6:>14.2f}{measured / 1e6:>14.2f}{error:>9.1%}")


if __name__ == "__main__":
    app()
