"""Every layout of the trainer into a running vLLM: after three updates in a row both give the same log-probs.

`python test_sync_layouts.py CASES` is one trainer rank; rank 0 keeps its engines from case to case.
"""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny_hf
from worlds import each_world, run_worlds, slug

TOLERANCE = 1e-4
USUAL = [dict(tp=2, dp=2, ep=2), dict(pp=2, vpp=2, dp=2)]
REST = [
    dict(dp=4, ep=4),
    dict(dp=4, ep=2, etp=2),
    dict(tp=2, dp=2),
    dict(tp=4, ep=2),  # more ranks than key/value heads
    dict(pp=2, dp=2),
    dict(tp=2, dp=2, ep=2, etp=2),
    dict(tp=2, pp=2, ep=2),
    dict(tp=2, pp=2, vpp=2, ep=2),
    dict(cp=2, dp=2, ep=4),
    dict(cp=2, tp=2, ep=2),
]
ENGINES: dict[int, object] = {}  # by tensor parallelism, on rank 0


def open_once(source: str, tensor_parallel_size: int):
    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.rollout.vllm.engine import open_engine

    if tensor_parallel_size not in ENGINES:
        rollout = RolloutConfig(
            placement="child",
            tensor_parallel_size=tensor_parallel_size,
            kv_cache_gb=0.05,
            max_model_len=64,
            startup_timeout_s=600,
        )
        ENGINES[tensor_parallel_size] = open_engine(
            rollout, WeightSyncConfig(backend="shm"), source, "float32", 32, world_size=4, seed=0
        )
    return ENGINES[tensor_parallel_size]


def sync_case(case: dict, groups) -> None:
    """One rank in one layout."""
    from rollout_reference import make_prompts

    from mcore_rl.algorithms.grpo import GRPO
    from mcore_rl.config import BatchConfig, ModelConfig, RolloutConfig, WeightSyncConfig
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.forward import Policy
    from mcore_rl.parallel.collectives import on_rank_0_only
    from mcore_rl.rollout.transfer.transfer import connect
    from mcore_rl.step.syncing import probe_difference
    from mcore_rl.weights.hf_read import load_hf
    from mcore_rl.weights.shards import megatron_shards
    from mcore_rl.weights.sync import WeightExporter

    hf_config = read_hf_config(Path(case["source"]))
    chunks = build_model(hf_config, ModelConfig(path=case["source"]), groups)
    load_hf(case["source"], megatron_shards(chunks, hf_config, groups))
    exporter = WeightExporter(chunks, hf_config, groups)
    config = SimpleNamespace(
        weight_sync=WeightSyncConfig(backend="shm", probe_tokens=8),
        rollout=RolloutConfig(max_response_tokens=8),
        batch=BatchConfig(micro_batch_tokens=256),
        seed=0,
    )
    task = SimpleNamespace(eval_prompts=lambda count: make_prompts([5 + i % 20 for i in range(count)]))
    plan = SimpleNamespace(config=config, task=task, algorithm=GRPO())
    policy = Policy(chunks, groups, vocab_size=hf_config.vocab_size)
    found = {}
    for workers in case["engines"]:
        engine = on_rank_0_only(groups, partial(open_once, case["source"], workers))
        transfer = connect(engine, exporter, config.weight_sync, groups)
        differences, versions = [], []
        for version in (1, 2, 3):
            with torch.no_grad():
                for param in (p for chunk in chunks for p in chunk.parameters()):
                    param.add_(torch.sin(50 * param), alpha=0.02)  # the same on every replica
            transfer.send(version)
            differences.append(probe_difference(plan, groups, policy, engine, version))
            versions.append(engine.policy_version if engine else version)
        transfer.close()
        found[workers] = dict(differences=differences, versions=versions, detour=transfer.detour)
    if groups.rank == 0:
        Path(case["out"]).write_text(json.dumps(found))
        if case["last"]:
            for engine in ENGINES.values():
                engine.close()


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """layout -> workers of the engine -> what was found; one world of processes for all selected cases."""
    folder = tmp_path_factory.mktemp("sync")
    source = save_tiny_hf(tmp_path_factory.mktemp("sync_model"), moe_intermediate_size=64)
    items = [i for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    wanted: dict[str, tuple[dict, list[int]]] = {}
    for params in (item.callspec.params for item in items):
        wanted.setdefault(slug(params["layout"]), (params["layout"], []))[1].append(params["workers"])
    cases = [
        dict(source=str(source), out=str(folder / name), layout=layout, engines=workers, last=False)
        for name, (layout, workers) in wanted.items()
    ]
    cases[-1]["last"] = True
    run_worlds(__file__, cases, 4, timeout_s=240 + 120 * len(cases))
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


CASES = [pytest.param(layout, 1, id=f"{slug(layout)}-into-1") for layout in USUAL] + [
    pytest.param(layout, workers, id=f"{slug(layout)}-into-{workers}", marks=pytest.mark.slow)
    for layout in USUAL + REST
    for workers in (1, 2)
    if layout in REST or workers == 2
]


@pytest.mark.parametrize(("layout", "workers"), CASES)
def test_the_engine_is_the_trainer(layout, workers, found):
    of_case = found[slug(layout)][str(workers)]
    assert of_case["detour"] == "" and of_case["versions"] == [1, 2, 3]
    assert len(of_case["differences"]) == 3 and max(of_case["differences"]) < TOLERANCE, of_case


if __name__ == "__main__":
    each_world(sys.argv[1], sync_case)
