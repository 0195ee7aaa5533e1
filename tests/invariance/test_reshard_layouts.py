"""One live model into another layout of the same ranks, without a file: every tensor arrives, bit for bit."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_hf
from worlds import each_world, run_worlds

RANKS = 4
PAIRS = [
    (dict(dp=4, ep=2), dict(pp=2, tp=2)),
    (dict(pp=2, vpp=2, dp=2), dict(tp=2, dp=2, ep=2, etp=2)),
    (dict(tp=2, dp=2, ep=4), dict(dp=4)),
    (dict(dp=4), dict(pp=4)),
]
TIED = (dict(pp=2, vpp=2, dp=2), dict(tp=4))


def reshard_between(case: dict, groups) -> None:
    from mcore_rl.config import ModelConfig
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.forward import Policy, Scorer
    from mcore_rl.model.heads import as_scorer
    from mcore_rl.parallel import groups as process_groups
    from mcore_rl.parallel.layout import ParallelLayout
    from mcore_rl.weights.hf_read import load_hf
    from mcore_rl.weights.plan import plan_between
    from mcore_rl.weights.reshard import reshard
    from mcore_rl.weights.shards import megatron_shards
    from mcore_rl.weights.sync import WeightExporter, export_hf

    def model(groups, dtype: str = "float32"):
        with groups.active():
            chunks = build_model(hf_config, ModelConfig(path=case["source"], dtype=dtype), groups)
        for param in (p for chunk in chunks for p in chunk.parameters()):
            param.data.fill_(float("nan"))  # what nobody writes must show
        return Scorer(chunks, groups) if case["scorer"] else Policy(chunks, groups, hf_config.vocab_size)

    hf_config = read_hf_config(case["source"])
    if case["scorer"]:
        hf_config = as_scorer(hf_config)
    source = model(groups)
    shards = megatron_shards(source.chunks, hf_config, groups)
    load_hf(case["source"], [s for s in shards if s.hf_name != "score.weight"])
    for shard in shards:
        if shard.hf_name == "score.weight":
            shard.view.copy_(torch.arange(shard.view.numel()).view(shard.view.shape))
    other = process_groups.another(groups, ParallelLayout(**case["target"]), timeout_s=60)
    target = model(other)
    received = reshard(hf_config, source, target, bucket_bytes=100_000)
    plan = plan_between(hf_config, groups.layout, other.layout, 4, same_ranks=True)
    assert received == plan.received.get(groups.rank, 0)
    export_hf(WeightExporter(target.chunks, hf_config, other), case["out"], case["source"])
    narrow = model(other, "bfloat16")
    reshard(hf_config, source, narrow)
    for a, b in zip(target.chunks, narrow.chunks, strict=True):
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        for x, y in pairs:  # rows that pad the vocabulary belong to no tensor
            torch.testing.assert_close(x.to(y.dtype), y, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """(source folder, folder of what arrived, is a scorer) by number of the pair."""
    folders = {tied: tmp_path_factory.mktemp("source") for tied in (False, True)}
    for tied, folder in folders.items():
        save_tiny_hf(folder, moe=not tied, num_hidden_layers=4, tie_word_embeddings=tied)
    out = tmp_path_factory.mktemp("out")
    cases = [(source, target, False, False) for source, target in PAIRS]
    cases += [(*TIED, True, False), (*PAIRS[0], False, True)]
    described = [
        {
            "layout": source,
            "target": target,
            "source": str(folders[tied]),
            "out": str(out / str(i)),
            "scorer": scorer,
        }
        for i, (source, target, tied, scorer) in enumerate(cases)
    ]
    run_worlds(__file__, described, RANKS)
    return described


@pytest.mark.parametrize("number", range(len(PAIRS) + 2))
def test_every_tensor_arrives(worlds, number):
    def tensors(folder) -> dict[str, torch.Tensor]:
        from pathlib import Path

        return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}

    case = worlds[number]
    source, arrived = tensors(case["source"]), tensors(case["out"])
    if case["scorer"]:
        score = arrived.pop("score.weight")
        assert torch.equal(score.flatten(), torch.arange(score.numel(), dtype=score.dtype))
        source.pop("lm_head.weight")
    assert source.keys() == arrived.keys() and len(source) > 20
    assert all(torch.equal(source[name], arrived[name]) for name in source)


if __name__ == "__main__":
    each_world(sys.argv[1], reshard_between)
