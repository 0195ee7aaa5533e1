"""The model of a benchmark, a folder of the user's or a Qwen3-MoE with random weights, and the options they share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mcore_rl.types import Prompt
from tools.bench.side_by_side import quiet_stdout

# https://huggingface.co/Qwen/Qwen3-30B-A3B: config.json
QWEN3_30B = dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
    tie_word_embeddings=False,
    max_position_embeddings=40960,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    hidden_act="silu",
)
SIZES = {
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
    "10M": dict(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
    ),
    "50M": dict(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
    ),
    "300M": dict(
        vocab_size=8192,
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=384,
    ),
}
# Two of the 48 layers of Qwen3-30B-A3B, for a GPU: 1.8B parameters, a third of them embedding and output matrix.
SIZES["30B-A3B-2-layers"] = {name: QWEN3_30B[name] for name in SIZES["tiny"]} | dict(num_hidden_layers=2)

Model = Annotated[str, typer.Option(help=f"HF folder, or one of {', '.join(SIZES)} (random weights)")]
Sequences = Annotated[int, typer.Option(min=1, help="of one update")]
PromptTokens = Annotated[int, typer.Option(min=1)]
ResponseTokens = Annotated[int, typer.Option(min=1, help="of the longest; the shortest has a quarter")]
Repeats = Annotated[int, typer.Option(min=1, help="measured rounds")]
Seed = Annotated[int, typer.Option(min=0)]
Json = Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")]

# transformers' implementations worth trying on a CPU; batched_mm copies the experts' weights for every token.
EXPERTS = ("grouped_mm", "eager")
_MAX_POSITIONS = 4096
# Wider than the usual 0.02: the most likely token then stands clear of the next, and rounding cannot swap them.
_WEIGHT_STD = 0.05


@contextmanager
def asked_model(model: str, seed: int) -> Iterator[Path]:
    """Its folder while it is measured: libraries print to stderr then, and a mistake of the user ends the program."""
    try:
        with quiet_stdout(), model_folder(model, seed) as folder:
            yield folder
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


@contextmanager
def model_folder(model: str, seed: int) -> Iterator[Path]:
    """A temporary HF folder without tokenizer, end-of-sequence and padding token.

    Every response then has the full length, and no row of the embedding is left out of training as padding.

    Args:
        model: a name of SIZES or a HF folder, whose safetensors are linked to and never written.
        seed: of the random weights.

    Raises:
        ValueError: neither a size nor a model folder.
    """
    with TemporaryDirectory(prefix="mcore_rl_bench_") as name:
        folder = Path(name)
        if model in SIZES:
            _write_random(folder, seed, SIZES[model])
        else:
            _link(Path(model), folder)
        yield folder


def load_hf_model(folder: Path, experts: str, dtype: str = "float32") -> PreTrainedModel:
    """The transformers model with sdpa attention and one of transformers' experts implementations."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation=experts
    )


def random_prompts(count: int, num_tokens: int, vocab_size: int, seed: int) -> list[Prompt]:
    """Prompts of equal length and uniformly drawn tokens."""
    ids = torch.randint(vocab_size, (count, num_tokens), generator=torch.Generator().manual_seed(seed))
    return [Prompt(f"bench/{i}", tuple(row), "") for i, row in enumerate(ids.tolist())]


def _write_random(folder: Path, seed: int, size: dict[str, int]) -> None:
    config = Qwen3MoeConfig(
        **size,
        intermediate_size=size["moe_intermediate_size"] * size["num_experts_per_tok"],
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=_MAX_POSITIONS,
        initializer_range=_WEIGHT_STD,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3MoeForCausalLM(config).save_pretrained(folder)


def _link(source: Path, folder: Path) -> None:
    if not (source / "config.json").is_file():
        raise ValueError(
            f"--model {str(source)!r} is neither a Hugging Face folder with a config.json nor one of {', '.join(SIZES)}"
        )
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": None, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
        (folder / file.name).symlink_to(file.resolve())
