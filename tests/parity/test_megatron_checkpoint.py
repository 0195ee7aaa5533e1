"""The converter's checkpoints are Megatron's: what Megatron saves it reads, what it writes Megatron loads, for every
family. Real models over real processes; the converter has none of that."""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tiny_models import FAMILIES, save_tiny_hf
from worlds import each_world, run_worlds

from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.convert import to_megatron
from mcore_rl.weights.stored import open_weights
from mcore_rl.weights.verify import compare

RANKS = 4
# family -> the layout of the ranks, the layout that the converter cuts for
CASES = {
    "deepseek_v3": (dict(tp=2, pp=2), dict(tp=4, pp=3, dp=2, ep=8)),
    "llama": (dict(tp=4), dict(pp=3)),
    "mixtral": (dict(tp=2, dp=2, ep=2, etp=2), dict(pp=2, vpp=2, dp=4, ep=4)),
    "olmoe": (dict(tp=2, pp=2, ep=2), dict(dp=2, etp=2)),
    "qwen2": (dict(tp=2, pp=2), dict(tp=4)),
    "qwen2_moe": (dict(pp=2, vpp=2, dp=2, ep=2), dict(tp=4, etp=2)),
    "qwen3": (dict(pp=2, vpp=2, dp=2), dict(tp=2, pp=4)),
    "qwen3_moe": (dict(dp=4, ep=4), dict(tp=2, dp=2, ep=2, etp=2)),
}
TIED = "qwen3"
SOME = {"deepseek_v3", "qwen3", "qwen3_moe"}


def save_and_load(case: dict, groups) -> None:
    """One rank: Megatron saves the model and loads the converted one; so does `load_weights`."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from mcore_rl.config import ModelConfig
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.checkpoint import _metadata
    from mcore_rl.weights.hf_read import load_hf
    from mcore_rl.weights.shards import megatron_shards
    from mcore_rl.weights.stored import load_weights

    source, saved = case["source"], Path(case["saved"])
    hf_config = read_hf_config(source)
    chunks = build_model(hf_config, ModelConfig(path=source), groups)
    load_hf(source, megatron_shards(chunks, hf_config, groups))

    def states():
        return {f"model{i}": chunk.sharded_state_dict(metadata=_metadata()) for i, chunk in enumerate(chunks)}

    def views():
        return {(s.hf_name, s.box): s.view for s in megatron_shards(chunks, hf_config, groups)}

    if groups.rank == 0:
        saved.mkdir()
    dist.barrier()
    dist_checkpointing.save(states(), str(saved))
    expected = {key: view.clone() for key, view in views().items()}
    for load in ("Megatron's", "ours"):
        for view in views().values():
            view.fill_(float("nan"))
        if load == "ours":
            load_weights(case["converted"], megatron_shards(chunks, hf_config, groups))
        else:
            loaded = dist_checkpointing.load(states(), case["converted"])
            for i, chunk in enumerate(chunks):
                chunk.load_state_dict(loaded[f"model{i}"], strict=True)
        for key, view in views().items():
            assert torch.equal(view, expected[key]), (load, source, key)


def check(families: Iterable[str], root: Path) -> None:
    cases = []
    for family in families:
        layout, cut = CASES[family]
        source = save_tiny_hf(root / f"{family}_hf", family=family, tie_word_embeddings=family == TIED)
        converted = to_megatron(source, root / f"{family}_converted", ParallelLayout(**cut))
        saved = root / f"{family}_saved"
        cases.append(dict(source=str(source), converted=str(converted), saved=str(saved), layout=layout))
    run_worlds(__file__, cases, RANKS)
    for case in cases:
        hf, megatron = open_weights(case["source"]), open_weights(case["saved"], config_dir=case["source"])
        assert compare(hf, megatron) == [] and megatron.specs.keys() == hf.specs.keys(), case["source"]
        assert compare(megatron, open_weights(case["converted"])) == [], case["source"]


def test_some_families(tmp_path):
    check(SOME, tmp_path)


@pytest.mark.slow
def test_other_families(tmp_path):
    check(CASES.keys() - SOME, tmp_path)


def test_no_family_is_forgotten():
    assert CASES.keys() == FAMILIES.keys()


if __name__ == "__main__":
    each_world(sys.argv[1], save_and_load)
