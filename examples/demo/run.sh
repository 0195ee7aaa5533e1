#!/usr/bin/env bash
# The whole demo: random model -> SFT warm start -> GRPO on two trainer ranks (EP=2) with a vLLM engine -> summary.
# SEED=1 RUNS=/some/folder examples/demo/run.sh     runs it with another seed, somewhere else
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${SEED:-0}
runs=${RUNS:-runs}
common=(seed="$seed" output_dir="$runs")

rm -rf "$runs/demo"
python -m tools.make_demo_model "$runs/demo/model" --seed "$seed"
mcore-rl train examples/demo/sft.yaml "${common[@]}" model.path="$runs/demo/model"
mcore-rl train examples/demo/grpo.yaml --nproc-per-node 2 "${common[@]}" model.path="$runs/demo/sft/hf"
python -m tools.summarise "$runs/demo/sft" "$runs/demo/grpo"
