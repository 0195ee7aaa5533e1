#!/usr/bin/env bash
# The evidence of docs/moe_stability.md: for three seeds a warm start, 30 steps of GRPO (OLD) and one more (NEW), and the
# same of a model without experts as a control; then what moe-stability says of each pair, and one report of all. Last,
# how far eight more steps lead away from OLD. Less than an hour on two idle cores.
# RUNS=/some/folder examples/demo/stability.sh     runs it somewhere else
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS:-runs/stability}

pair() {  # SEED SIZE FOLDER OVERRIDES...: make OLD and NEW of one model
    local seed=$1 size=$2 at=$3/demo
    local common=(seed="$seed" output_dir="$3" parallel.ep=1 optimizer.schedule=constant checkpoint.every=0)
    python -m tools.make_demo_model "$at/model" --seed "$seed" --size "$size"
    mcore-rl train examples/demo/sft.yaml seed="$seed" output_dir="$3" parallel.ep=1 model.path="$at/model"
    mcore-rl train examples/demo/grpo.yaml "${common[@]}" model.path="$at/sft/hf" steps=30 evaluate.every=30 "${@:4}"
    mcore-rl train examples/demo/grpo.yaml "${common[@]}" model.path="$at/grpo/hf" name=demo/next steps=1 evaluate.every=0 \
        moe.export_every=1
}

for seed in 0 1 2; do
    at=$runs/$seed/demo dense=$runs/dense$seed/demo
    pair "$seed" 0.9m "$runs/$seed" moe.log_every=5 rollout.return_routes=true
    pair "$seed" dense "$runs/dense$seed"
    python -m tools.demo_prompts "$at/model" --seed "$seed" --n 240 --out "$runs/$seed/prompts.jsonl"

    asked=(--prompts "$runs/$seed/prompts.jsonl" --max-tokens 19 --out "$runs/pair$seed")
    moe-stability compare "$at/grpo" "$at"/next/updates/step_000001/{1..8} --dense "$dense/grpo" "$dense/next" \
        --no-sweep --no-objectives "${asked[@]}"
    moe-stability sweep "$at/grpo" "$at/next" --limit 240 "${asked[@]}"
    moe-stability objectives "$at/grpo" "$at/next" --grad-prompts 24 "${asked[@]}"
    moe-stability mismatch "$at/grpo" "${asked[@]}"
done
moe-stability report "$runs"/pair{0,1,2} --out "$runs/report"

for seed in 0 1 2; do
    at=$runs/$seed/demo
    mcore-rl train examples/demo/grpo.yaml seed="$seed" output_dir="$runs/$seed" parallel.ep=1 optimizer.schedule=constant \
        model.path="$at/grpo/hf" name=demo/later steps=8 evaluate.every=0 checkpoint.every=0 moe.export_every=1
    moe-stability compare "$at/grpo" "$at"/later/updates/step_00000{1..8}/8 --no-sweep --no-objectives \
        --prompts "$runs/$seed/prompts.jsonl" --max-tokens 19 --out "$runs/later$seed"
done
