"""Write the demo's policy: a Qwen3-MoE of 0.86M parameters with random weights and a character tokenizer.

python -m tools.make_demo_model runs/demo/model --seed 0
python -m tools.make_demo_model runs/dense/model --size dense     # its control: no experts, as much work a token
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = "0123456789=#,+-*:/"  # 20 symbols with the special ones: tensor parallelism of 2 and 4 needs no padding
# system prompt, a colon; the question, an equals sign; the answer
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}:"
    "{% elif message['role'] == 'user' %}{{ message['content'] }}="
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
SIZES = {  # hidden size, layers, heads (of 32: the smallest vLLM has a CPU kernel for), experts, ...
    "0.9m": dict(d=64, layers=4, heads=2, experts=16, top_k=2, ffn=64),
    "dense": dict(d=64, layers=4, heads=2, experts=0, top_k=2, ffn=64),
    "deep": dict(d=64, layers=8, heads=2, experts=32, top_k=4, ffn=32),
}


def make_tokenizer():
    """One token a character, nothing added, nothing removed: decode(encode(x)) == x for every text over CHARACTERS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))  # no unknown token: a character outside raises
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_config(tokenizer, d: int, layers: int, heads: int, experts: int, top_k: int, ffn: int):
    """The config of one entry of SIZES: Qwen3-MoE, or without experts Qwen3 with an MLP as wide as top_k of them."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        intermediate_size=ffn * top_k,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    if not experts:
        return Qwen3Config(**common)
    of_experts = dict(num_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=ffn, norm_topk_prob=True)
    return Qwen3MoeConfig(**common, **of_experts)


def make_demo_model(out: Path, seed: int = 0, size: str = "0.9m") -> int:
    """Write config, safetensors and tokenizer into the folder `out`; returns the number of parameters.

    Raises:
        ValueError: unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; allowed: {', '.join(SIZES)}")
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(tokenizer, **SIZES[size]))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(p.numel() for p in model.parameters())


def main(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
    size: Annotated[str, typer.Option(help=f"one of {', '.join(SIZES)}")] = "0.9m",
) -> None:
    """Write the demo's model and tokenizer as a Hugging Face folder."""
    count = make_demo_model(out, seed, size)
    print(f"{out}: {size}, {count:,} parameters, seed {seed}")


if __name__ == "__main__":
    typer.run(main)
