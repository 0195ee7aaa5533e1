#!/usr/bin/env bash
# A vLLM server as rollout engine, on GPUs (or a node) that the trainer does not use. Start it, then train with
#   rollout.placement=server rollout.server_url=http://THIS_HOST:8000
#   CUDA_VISIBLE_DEVICES=4,5,6,7 TP=4 examples/launch/vllm_server.sh MODEL 18432
set -euo pipefail

model=${1:?usage: $0 MODEL MAX_MODEL_LEN}
length=${2:?usage: $0 MODEL MAX_MODEL_LEN}
backend=${BACKEND:-nccl} # how weights come: nccl over GPUs; gloo, or on the trainer's own host shm, on a CPU

flags=(
    --model "$model"
    --host "${HOST:-0.0.0.0}" # reachable by everybody who reaches this host: keep it inside the cluster
    --port "${PORT:-8000}"
    --max-model-len "$length"
    --tensor-parallel-size "${TP:-1}"
    --dtype "${DTYPE:-bfloat16}"
    --logprobs-mode processed_logprobs # of the distribution that is sampled from
    --enable-scale-out                 # the route that takes token ids
    --weight-transfer-config "{\"backend\": \"$backend\"}"
    --worker-extension-cls mcore_rl.rollout.transfer.worker_extension.WorkerExtension
)
if [[ $backend != nccl ]]; then
    flags+=(--enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens "$((length > 8192 ? length : 8192))")
    flags+=(--kv-cache-memory-bytes "${KV_CACHE_BYTES:-500000000}")
    export VLLM_CPU_OMP_THREADS_BIND=nobind
fi
export VLLM_SERVER_DEV_MODE=1 # serves the routes that replace weights
exec python -m vllm.entrypoints.openai.api_server "${flags[@]}" "${@:3}"
