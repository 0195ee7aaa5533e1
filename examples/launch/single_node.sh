#!/usr/bin/env bash
# One node, all its GPUs (or RANKS processes on a CPU).
#   examples/launch/single_node.sh examples/demo/grpo.yaml name=mine
set -euo pipefail

config=${1:?usage: $0 CONFIG key.sub=value ...}
shift
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}

if ((gpus > 0)); then
    # does it fit? exit code 1: no, 2: the layout is wrong
    memory_gb=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1 | awk '{print $1 / 1024}')
    mcore-rl plan "$config" "$@" --world-size "$ranks" --gpus-per-node "$gpus" --gpu-memory-gb "$memory_gb"
fi
exec mcore-rl train "$config" "$@" --nproc-per-node "$ranks"
