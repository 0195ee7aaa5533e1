"""Benchmarks: each times two ways to the same, checked result, side by side in one process.

python -m tools.bench.rollout | train_step | weight_sync | packing | logprob | checkpoint ...   (docs/benchmarks.md)

Every process computes on one thread unless OMP_NUM_THREADS says otherwise. It is set here because this module is
imported before torch, which reads it once.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
