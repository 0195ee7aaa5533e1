"""Log-probs and entropies in chunks against logits that exist all at once: time and peak memory, gradients included.

python -m tools.bench.logprob --tokens 4096 --vocab 32768 --json
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from mcore_rl.functional.logprob import token_logprobs
from tools.bench.models import Json, Repeats, Seed
from tools.bench.side_by_side import check_equal, device_peak_bytes, environment, interleave, show, throughput

MAX_RELATIVE_DIFF = 1e-5


def measure(tokens: int, hidden_size: int, vocab: int, chunks: list[int], repeats: int, seed: int) -> dict:
    """Check, then measure; see docs/benchmarks.md for the keys."""
    started = environment()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device).requires_grad_()
    weight = (0.05 * torch.randn(vocab, hidden_size, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator).to(device)
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        f"chunks of {n}": partial(token_logprobs, vocab_size=vocab, chunk_tokens=n) for n in chunks
    }
    ways["materialised"] = materialised
    steps = {name: partial(gradients, way, hidden, weight, targets) for name, way in ways.items()}
    first, *others = (step() for step in steps.values())
    worst = max(((a - b).norm() / b.norm()).item() for other in others for a, b in zip(first, other, strict=True))
    equal = check_equal({"relative_diff": (worst, MAX_RELATIVE_DIFF)})
    del first, others
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    return {
        "benchmark": "logprob",
        **throughput(interleave(steps, repeats), tokens),
        "equal": equal,
        "peak_bytes": peaks,
        "work": {"logits_bytes": tokens * vocab * 4, "output_bytes": (tokens + vocab) * hidden_size * 4},
        "environment": started,
    }


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same as one writes it with all logits, in as few copies as autograd allows."""
    log_p = F.log_softmax(F.linear(hidden, weight), dim=-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def gradients(way: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Log-probs, entropies, and the gradients of a function of both."""
    logprobs, entropy = way(hidden, weight, targets)
    found = torch.autograd.grad((logprobs * entropy.detach()).sum() + entropy.square().sum(), (hidden, weight))
    return logprobs.detach(), entropy.detach(), *found


def peak_bytes(step: Callable[[], object]) -> int:
    """Memory above what was held before, at its most: of the device, or of this process."""
    if torch.cuda.is_available():
        return device_peak_bytes(step)
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of earlier steps would hide a part of this one's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = _of_this_process("VmRSS")
    step()
    return _of_this_process("VmHWM") - before


def _of_this_process(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=1, help="response positions of a micro-batch")] = 4096,
    hidden_size: Annotated[int, typer.Option(min=1)] = 256,
    vocab: Annotated[int, typer.Option(min=2)] = 32768,
    chunks: Annotated[list[int], typer.Option(min=1, help="logprob_chunk_tokens; can be given several times")] = [  # noqa: B006
        256,
        1024,
    ],
    repeats: Repeats = 3,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Log-probs and entropies with their gradients, in chunks against all logits at once, in fp32."""
    work = dict(tokens=tokens, hidden_size=hidden_size, vocab=vocab, chunks=list(chunks), repeats=repeats, seed=seed)
    show(measure(**work) | {"settings": work}, json)


if __name__ == "__main__":
    app()
