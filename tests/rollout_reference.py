"""What the rollout tests compare vLLM with: Hugging Face log-probs, and an exporter over a checkpoint's own files."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mcore_rl.types import Prompt, RolloutGroup, Trajectory
from mcore_rl.weights.checksums import checksum
from mcore_rl.weights.shards import Region, Shard

ONE_RANK = SimpleNamespace(rank=0, world_size=1)
EOS = 1


def save_character_tokenizer(folder: Path) -> None:
    """<pad> 0, <eos> 1, then the printable ASCII characters: 97 tokens."""
    characters = ["<pad>", "<eos>", *(string.digits + string.ascii_letters + string.punctuation + " ")]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def load_hf(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def tokens_of(trajectory: Trajectory) -> Tensor:
    """[T] prompt and response."""
    return torch.from_numpy(np.concatenate([trajectory.prompt_ids, trajectory.response_ids])).long()


def responses(groups: Sequence[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    """[group][trajectory] its tokens."""
    return [[tuple(t.response_ids.tolist()) for t in group.trajectories] for group in groups]


@torch.no_grad()
def hf_logits(model: torch.nn.Module, trajectory: Trajectory) -> Tensor:
    """[T_resp, V], the logits that each token of the response was drawn from."""
    return model(input_ids=tokens_of(trajectory)[None]).logits[0, len(trajectory.prompt_ids) - 1 : -1].double()


def max_error(model: torch.nn.Module, groups: Sequence[RolloutGroup], temperature: float = 1.0) -> float:
    """Largest difference between the engine's log-probs and those of `model`."""
    errors = []
    for trajectory in (t for group in groups for t in group.trajectories):
        expected = (hf_logits(model, trajectory) / temperature).log_softmax(-1)
        chosen = expected.gather(1, torch.from_numpy(trajectory.response_ids).long()[:, None])[:, 0]
        errors.append((chosen - torch.from_numpy(trajectory.rollout_logprobs)).abs().max().item())
    return max(errors)


def make_prompts(lengths: Sequence[int], vocab_size: int = 97) -> list[Prompt]:
    """Fixed, all different."""
    return [
        Prompt(f"test/{i}", tuple((7 * i + 11 * j + i * j) % (vocab_size - 2) + 2 for j in range(length)), "")
        for i, length in enumerate(lengths)
    ]


class CheckpointExporter:
    """The trainer's side of a weight update, over the tensors of a saved checkpoint.

    With several ranks each writes every other tensor, so only all of them together write the whole model.
    """

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1):
        self.tensors = load_file(Path(folder) / "model.safetensors")
        self.rank, self.world_size = rank, world_size

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def write_into(self, targets: Sequence[Shard]) -> list[int]:
        mine = set(list(self.tensors)[self.rank :: self.world_size])
        for target in targets:
            if target.hf_name in mine:
                target.view.copy_(self._part(target))
        return self.checksums(targets)

    def checksums(self, targets: Sequence[Region]) -> list[int]:
        if self.world_size > 1:
            torch.distributed.barrier()
        return [checksum(self._part(t).to(t.dtype), t.box, t.factors) for t in targets]

    def _part(self, target: Region) -> Tensor:
        return self.tensors[target.hf_name][tuple(slice(low, high) for low, high in target.box)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.tensors.items())
