#!/usr/bin/env bash
# Everything that only a GPU can show, on one GPU, in minutes; docs/gpu.md says what has been run.
#   tools/gpu_check.sh            all
#   tools/gpu_check.sh trainer    without vLLM: torch and megatron-core (and TransformerEngine where it is installed)
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:-all}

nvidia-smi --query-gpu=name,memory.total,memory.used,driver_version --format=csv
python - <<'PYTHON'
import importlib.metadata
import torch

for package in ("torch", "megatron-core", "transformer-engine", "transformers", "vllm"):
    try:
        print(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(package, "is not installed")
print("CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version())
PYTHON

tests=(tests/gpu/test_trainer.py tests/gpu/test_runs.py)
if [[ $part == all ]]; then
    tests+=(tests/gpu/test_engine.py)
fi
python -m pytest -m gpu -v -s "${tests[@]}"
nvidia-smi --query-gpu=memory.used --format=csv # as before: nothing was left behind
