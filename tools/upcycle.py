"""Make a mixture of experts of a dense Llama: every expert is the dense MLP with noise of its own (arXiv:2212.05055).

python -m tools.upcycle DENSE OUT --experts 8 --top-k 2 --noise 0.1 --seed 0

DENSE is a Hugging Face folder, or a folder with a GGUF file that `--gguf` names (transformers reads it with the
packages gguf and accelerate). OUT becomes a Mixtral with the same tokenizer. Without noise it computes what the dense
model does, whatever its random router chooses; with noise routing matters. For measurements on weights that were
really trained, not for a good model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from mcore_rl.weights.atomic import written_beside


def upcycle(dense: dict[str, Tensor], experts: int, noise: float, router_std: float, seed: int) -> dict[str, Tensor]:
    """Tensors of a Mixtral, by their names on disk, from those of a Llama.

    Args:
        noise: standard deviation of what is added to each element of an expert, over that of its matrix.
        router_std: of the elements of the routers.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        layer, found, matrix = name.partition(".mlp.")
        if not found:
            made[name] = tensor
            continue
        moe = f"{layer}.block_sparse_moe"
        matrix = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[matrix.removesuffix(".weight")]
        for expert in range(experts):
            added = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * (noise * tensor.std())
            made[f"{moe}.experts.{expert}.{matrix}.weight"] = tensor + added
        if matrix == "w1":
            shape = (experts, tensor.shape[1])
            made[f"{moe}.gate.weight"] = router_std * torch.randn(shape, generator=generator, dtype=tensor.dtype)
    return made


def main(
    dense: Path,
    out: Path,
    experts: Annotated[int, typer.Option(min=2)] = 8,
    top_k: Annotated[int, typer.Option(min=1)] = 2,
    noise: Annotated[float, typer.Option(min=0)] = 0.1,
    router_std: Annotated[float, typer.Option(min=0)] = 0.02,
    seed: int = 0,
    gguf: Annotated[str | None, typer.Option(help="file in DENSE")] = None,
) -> None:
    """Write OUT. Refuses an existing folder, and models that are no Llama."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

    if out.exists():
        raise typer.BadParameter(f"{str(out)!r} exists; choose another folder")
    if top_k > experts:
        raise typer.BadParameter(f"--top-k {top_k} of --experts {experts}; choose at most as many")
    model = AutoModelForCausalLM.from_pretrained(dense, gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dense, gguf_file=gguf)
    llama = model.config
    if llama.model_type != "llama":
        raise typer.BadParameter(f"{str(dense)!r} is a {llama.model_type}; a Llama is needed")
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    kept += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = MixtralConfig(
        **{name: getattr(llama, name) for name in kept},
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
        architectures=["MixtralForCausalLM"],
        dtype="float32",
    )
    state = {k: v for k, v in model.state_dict().items() if not (llama.tie_word_embeddings and k == "lm_head.weight")}
    tensors = {k: v.contiguous() for k, v in upcycle(state, experts, noise, router_std, seed).items()}
    with written_beside(out, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    print(f"{out}: {sum(v.numel() for v in tensors.values()):,} parameters, {experts} experts, top-{top_k}")


if __name__ == "__main__":
    typer.run(main)
