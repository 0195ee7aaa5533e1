"""Planned parameters and bytes against those of models that were really built, over real processes."""

import json
import sys
from itertools import product
from pathlib import Path

import pytest
from tiny_models import save_tiny_hf
from worlds import each_world, run_worlds, slug

RANKS = 4
LAYOUTS = [
    dict(dp=4, ep=2),
    dict(tp=2, dp=2, ep=2, etp=2),
    dict(tp=2, pp=2, ep=2),
    dict(pp=2, vpp=2, dp=2, ep=2),
    dict(cp=2, dp=2, ep=4),
]
KINDS = list(product(("moe", "tied"), ("float32", "bfloat16"), (False, True)))


def build_and_measure(case: dict, groups) -> None:
    """One rank in one layout: every kind of model, planned and built."""
    from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.heads import as_scorer
    from mcore_rl.model.optimizer import build_training
    from mcore_rl.planning.memory import frozen_state, trained_state
    from tools.bench.plan_memory import measured_state

    found = {}
    for name, dtype, sharded in KINDS:
        hf_config = read_hf_config(case[name])
        if sharded and name == "moe":
            hf_config = as_scorer(hf_config)
        model, optimizer = ModelConfig(path=case[name], dtype=dtype), OptimizerConfig()
        parallel = ParallelConfig(distributed_optimizer=sharded)
        chunks = build_model(hf_config, model, groups)
        built = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        frozen_bytes = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
        training = build_training(chunks, optimizer, parallel, total_steps=1)
        training.zero_grad()
        training.step()
        stage = groups.coords.pp
        planned = trained_state(hf_config, groups.layout, stage, model, optimizer, parallel)
        frozen = frozen_state(hf_config, groups.layout, stage, model)
        found["-".join((name, dtype, "sharded" if sharded else "whole"))] = {
            "planned": vars(planned) | {"frozen": frozen.bytes},
            "built": measured_state(training) | {"parameters": built, "frozen": frozen_bytes},
        }
    Path(case["out"], f"{groups.rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def results(tiny_moe_dir, tmp_path_factory) -> Path:
    tied = save_tiny_hf(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("planned")
    cases = []
    for axes in LAYOUTS:
        (folder / slug(axes)).mkdir()
        cases.append({"layout": axes, "moe": str(tiny_moe_dir), "tied": str(tied), "out": str(folder / slug(axes))})
    run_worlds(__file__, cases, RANKS)
    return folder


@pytest.mark.parametrize("axes", LAYOUTS, ids=slug)
def test_planned_is_built(axes, results):
    for rank in range(RANKS):
        found = json.loads((results / slug(axes) / f"{rank}.json").read_text())
        assert len(found) == len(KINDS)
        for kind, both in found.items():
            planned, built = both["planned"], both["built"]
            assert built["parameters"] == planned["parameters"] > 10_000, (kind, rank)
            assert built["frozen"] == planned["frozen"], (kind, rank)
            if kind.endswith("whole"):
                assert built == planned, (kind, rank)
            else:
                # Buffers are padded; a rank's share of the states leaves out the padding that falls into it.
                assert built["weights"] == pytest.approx(planned["weights"], rel=0.02), (kind, rank)
                assert built["gradients"] == pytest.approx(planned["gradients"], rel=0.02), (kind, rank)
                assert planned["optimizer"] * 0.9 < built["optimizer"] <= planned["optimizer"], (kind, rank)


if __name__ == "__main__":
    each_world(sys.argv[1], build_and_measure)
