#!/usr/bin/env bash
# The step-size sweep of stability.sh on a deeper model with more experts: 8 MoE layers of 32, top-4. OLD is the warm start
# after 10 steps of GRPO, NEW one more. A quarter of an hour on an idle core.
# RUNS=/some/folder examples/demo/deeper.sh     runs it somewhere else
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${RUNS:-runs/deeper}

for seed in 0 1 2; do
    at=$runs/$seed/demo
    run=(seed="$seed" output_dir="$runs/$seed" parallel.ep=1 rollout.placement=child)
    rl=(examples/demo/grpo.yaml "${run[@]}" optimizer.schedule=constant checkpoint.every=0)
    python -m tools.make_demo_model "$at/model" --seed "$seed" --size deep
    mcore-rl train examples/demo/sft.yaml "${run[@]}" model.path="$at/model"
    mcore-rl train "${rl[@]}" model.path="$at/sft/hf" steps=10 evaluate.every=10
    mcore-rl train "${rl[@]}" model.path="$at/grpo/hf" name=demo/next steps=1 evaluate.every=0
    python -m tools.demo_prompts "$at/model" --seed "$seed" --n 240 --out "$runs/$seed/prompts.jsonl"
    asked=(--prompts "$runs/$seed/prompts.jsonl" --max-tokens 19 --out "$runs/pair$seed")
    moe-stability sweep "$at/grpo" "$at/next" --limit 240 "${asked[@]}"
    moe-stability compare "$at/grpo" "$at/next" --no-sweep --no-objectives "${asked[@]}"
done
moe-stability report "$runs"/pair{0,1,2} --out "$runs/report"
