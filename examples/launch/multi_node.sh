#!/usr/bin/env bash
# Several nodes: the same command on every one of them.
#   HEAD=node-0 NNODES=2 NODE_RANK=0 examples/launch/multi_node.sh CONFIG key.sub=value ...     on node-0
#   HEAD=node-0 NNODES=2 NODE_RANK=1 examples/launch/multi_node.sh CONFIG key.sub=value ...     on the other
# HEAD is the name or address of node 0. Code, model and output_dir have the same paths everywhere; output_dir is shared.
set -euo pipefail

config=${1:?usage: HEAD=.. NNODES=.. NODE_RANK=.. $0 CONFIG key.sub=value ...}
shift
: "${HEAD:?name or address of node 0}" "${NNODES:?number of nodes}" "${NODE_RANK:?of this node, from 0}"
endpoint=$HEAD:${PORT:-29400}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}

# The network interface that the nodes see each other by; without it gloo and NCCL may pick a bridge of docker's.
if [[ -n ${INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
# export NCCL_DEBUG=INFO           # which transport every pair of GPUs uses, printed at start
# export NCCL_IB_HCA=mlx5          # only these InfiniBand adapters
# export NCCL_IB_DISABLE=1         # no InfiniBand: TCP only, slow, to find out whether the fabric is at fault
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron orders communication before computation by it under tensor parallelism
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# All nodes: can they meet there, is the port free, same commit, configuration, versions, clock, room in /dev/shm?
preflight=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --endpoint "$endpoint")
python -m mcore_rl.planning.preflight "$config" "$@" "${preflight[@]}"

launch=(
    --nnodes "$NNODES"
    --nproc-per-node "$ranks"
    --rdzv-endpoint "$endpoint"
    # torchrun's c10d rendezvous orders the nodes; this would put rank 0, with the log and a child engine, on HEAD:
    # --node-rank "$NODE_RANK"
)
exec mcore-rl train "$config" "$@" "${launch[@]}"
