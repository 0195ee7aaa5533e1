"""The plan between two layouts: the same wherever it is made, made once, every byte accounted for."""

import copy
import hashlib
import os
import subprocess
import sys

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.parameters import model_parameters
from mcore_rl.weights.plan import plan_between
from tools.bench.weight_plan import MODELS

SRC, DST = ParallelLayout(tp=2, pp=2, dp=2, ep=4), ParallelLayout(tp=4, ep=2, etp=2)


def small_config():
    config = copy.deepcopy(MODELS["Qwen3-30B-A3B"])
    config.num_hidden_layers, config.num_experts = 2, 8
    return config


def digest() -> str:
    """Of every copy in its order."""
    plan = plan_between(small_config(), SRC, DST, itemsize=2)
    text = "\n".join(f"{c.src.rank} {c.dst.rank} {c.src.hf_name} {c.box}" for c in plan.copies)
    return hashlib.sha256(f"{plan}\n{text}".encode()).hexdigest()


def test_two_processes_make_the_same_plan():
    """Whatever the seed of Python's hashes."""
    code = "from test_plan_between import digest; print(digest())"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {digest()}


def test_made_once():
    first = plan_between(small_config(), SRC, DST, itemsize=2)
    assert plan_between(small_config(), SRC, DST, itemsize=2) is first
    assert plan_between(small_config(), SRC, ParallelLayout(tp=2), itemsize=2) is not first


def test_bytes_of_every_rank():
    config = small_config()
    plan = plan_between(config, SRC, DST, itemsize=2)
    assert sum(plan.sent.values()) == sum(plan.received.values()) == plan.bytes
    assert set(plan.received) == set(range(8, 12))  # the ranks of DST count on after the eight of SRC
    # norms and routers are on all four ranks of DST, of everything else each holds a quarter
    total, _ = model_parameters(config)
    replicated = 2 * (2 * config.hidden_size + 2 * config.head_dim + 8 * config.hidden_size) + config.hidden_size
    assert plan.bytes == 2 * (total + 3 * replicated)
    assert set(plan.received.values()) == {2 * ((total - replicated) // 4 + replicated)}
    assert str(plan).startswith(f"{len(plan.copies)} copies, {plan.bytes:,} bytes\n  rank 0 -> rank 8: ")
