"""How long the plan of a weight transfer takes for the shapes of large models, and what every rank sends and receives.

python -m tools.bench.weight_plan

Integers only: no weights, no processes, no GPU. 32 trainer ranks give a bf16 model to 16 others.
"""

from __future__ import annotations

import json as json_module
import time
from typing import Annotated

import typer
from transformers import DeepseekV3Config, PretrainedConfig, Qwen3MoeConfig

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.parameters import model_parameters
from mcore_rl.weights.plan import plan_between
from tools.bench.models import QWEN3_30B
from tools.bench.side_by_side import environment, spread

BF16_BYTES = 2
TRAINER = ParallelLayout(tp=2, pp=2, dp=8, ep=8)
RECEIVER = ParallelLayout(tp=4, dp=4, ep=16)
# https://huggingface.co/deepseek-ai/DeepSeek-V3: config.json
MODELS: dict[str, PretrainedConfig] = {
    "Qwen3-30B-A3B": Qwen3MoeConfig(**QWEN3_30B),
    # the 61 layers of the model proper, without the module that predicts a second token
    "DeepSeek-V3": DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        n_shared_experts=1,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
}


def measure(name: str) -> dict:
    """Times of the first plan and of the second request, and the traffic."""
    config = MODELS[name]
    wall, cpu = time.perf_counter(), time.process_time()
    plan = plan_between(config, TRAINER, RECEIVER, BF16_BYTES)
    first = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    start = time.perf_counter()
    assert plan_between(config, TRAINER, RECEIVER, BF16_BYTES) is plan
    again = time.perf_counter() - start
    total, _ = model_parameters(config)
    return {
        "model": name,
        "parameters": total,
        "first": first,
        "again_seconds": again,
        "copies": len(plan.copies),
        "gigabytes": plan.bytes / 1e9,
        "peers": len(plan.peers),
        "sent_gb": {rank: size / 1e9 for rank, size in plan.sent.items()},
        "received_gb": {rank: size / 1e9 for rank, size in plan.received.items()},
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    ranks: Annotated[bool, typer.Option(help="also what every rank sends and receives")] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Plan two large models from 32 ranks to 16."""
    started = environment()
    results = [measure(name) for name in MODELS]
    if json:
        print(json_module.dumps({"benchmark": "weight_plan", "models": results, "environment": started}))
        return
    print(f"from {TRAINER}, {TRAINER.world_size} ranks\n  to {RECEIVER}, {RECEIVER.world_size} ranks")
    for r in results:
        sent, received = (spread(list(r[side].values())) for side in ("sent_gb", "received_gb"))
        print(
            f"{r['model']}: {r['parameters'] / 1e9:.2f}B parameters, {r['copies']:,} copies between {r['peers']} pairs "
            f"of ranks, {r['gigabytes']:.1f} GB in bf16\n"
            f"  planned in {r['first']['seconds']:.2f} s ({r['first']['cpu_seconds']:.2f} s of the processor), asked "
            f"again in {1e3 * r['again_seconds']:.2f} ms\n"
            f"  a rank sends {sent['min']:.2f} to {sent['max']:.2f} GB ({len(r['sent_gb'])} ranks), "
            f"receives {received['min']:.2f} to {received['max']:.2f} GB"
        )
        if ranks:
            for side in ("sent_gb", "received_gb"):
                print(f"  {side}: " + ", ".join(f"{rank}: {size:.2f}" for rank, size in r[side].items()))


if __name__ == "__main__":
    app()
