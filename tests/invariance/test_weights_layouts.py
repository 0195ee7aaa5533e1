"""Real Megatron models over real processes: HF folder -> ranks -> HF folder is bit-equal in every layout."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_hf
from worlds import each_world, run_worlds, slug

RANKS = 4
UNTIED = [
    dict(dp=4, ep=2),
    dict(tp=2, dp=2),
    dict(pp=2, dp=2),
    dict(pp=2, vpp=2, dp=2),
    dict(tp=2, dp=2, ep=2),
    dict(tp=2, dp=2, ep=2, etp=2),
    dict(tp=2, pp=2, ep=2),
    dict(cp=2, dp=2, ep=4),
]
TIED = [dict(tp=2, pp=2), dict(pp=2, vpp=2, dp=2)]


def round_trip(case: dict, groups) -> None:
    """One rank in one layout."""
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from mcore_rl.config import ModelConfig
    from mcore_rl.launch import RunFailure
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.weights.checksums import checksum
    from mcore_rl.weights.hf_read import load_hf
    from mcore_rl.weights.shards import Shard, megatron_shards
    from mcore_rl.weights.sync import WeightExporter, export_hf

    def plain_shard(name: str, view: torch.Tensor) -> Shard:
        box = tuple((0, size) for size in view.shape)
        return Shard(
            hf_name=name, factors=tuple((size,) for size in view.shape), box=box, rank=-1, dtype=view.dtype, view=view
        )

    source, out = Path(case["source"]), Path(case["out"])
    hf_config = read_hf_config(source)
    chunks = build_model(hf_config, ModelConfig(path=str(source)), groups)
    for param in (p for chunk in chunks for p in chunk.parameters()):
        param.data.fill_(float("nan"))  # what loading forgets must show
    load_hf(source, megatron_shards(chunks, hf_config, groups))
    exporter = WeightExporter(chunks, hf_config, groups, bucket_bytes=100_000)
    names = [name for name, _ in exporter]
    assert names == [name for name, _, _ in exporter.metadata()]
    export_hf(exporter, out / "loaded", source)

    # With a distributed optimizer Megatron moves the parameters into its buffers; the exporter must follow them.
    params = [p for chunk in chunks for p in chunk.parameters()]
    before = [p.data_ptr() for p in params]
    wrap = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = [DistributedDataParallel(chunk.config, wrap, chunk) for chunk in chunks]
    assert len(wrapped) == len(chunks) and all(p.data_ptr() != old for p, old in zip(params, before))
    for param in params:
        param.data.mul_(2)
    numel = sum(torch.Size(shape).numel() for _, _, shape in exporter.metadata())
    shared = torch.from_file(str(out / "shared"), shared=True, size=numel)
    pieces = shared.split([torch.Size(shape).numel() for _, _, shape in exporter.metadata()])
    views = {n: piece.view(shape) for (n, _, shape), piece in zip(exporter.metadata(), pieces)}
    targets = [plain_shard(name, view) for name, view in views.items()]
    if groups.rank == 0:
        shared.fill_(float("nan"))
    for _ in range(2):  # the second time from the cached pairs, after another change
        dist.barrier()
        sums = exporter.write_into(targets)
        dist.barrier()
        assert not shared.isnan().any()
        assert sums == exporter.checksums(targets) == [checksum(t.view, t.box, t.factors) for t in targets]
        for param in params:
            param.data.mul_(2)
    export_hf(exporter, out / "moved", source)
    (out / "order.json").write_text(json.dumps(names))

    (out / "taken").mkdir(exist_ok=True)
    (out / "taken" / "file").write_text("")
    with pytest.raises(ValueError if groups.rank == 0 else RunFailure) as failure:
        export_hf(exporter, out / "taken", source)  # rank 0 fails; nobody hangs, everybody knows why
    cause = failure.value if groups.rank == 0 else failure.value.__cause__
    assert "taken' exists and is not a model folder" in str(cause)


@pytest.fixture(scope="module")
def tied_moe_dir(tmp_path_factory) -> Path:
    return save_tiny_hf(tmp_path_factory.mktemp("tied_moe"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def results(tiny_moe_dir, tied_moe_dir, tmp_path_factory) -> Path:
    """Folder with one folder a case; the processes are started once for all of them."""
    folder = tmp_path_factory.mktemp("layouts")
    cases = [(tiny_moe_dir, folder / slug(axes), axes) for axes in UNTIED]
    cases += [(tied_moe_dir, folder / f"tied-{slug(axes)}", axes) for axes in TIED]
    keys = ("source", "out", "layout")
    run_worlds(__file__, [dict(zip(keys, (str(source), str(out), axes))) for source, out, axes in cases], RANKS)
    return folder


@pytest.mark.parametrize("axes", UNTIED, ids=slug)
def test_round_trip(axes, results, tiny_moe_dir):
    check(tiny_moe_dir, results / slug(axes))


@pytest.mark.parametrize("axes", TIED, ids=slug)
def test_round_trip_with_tied_embeddings(axes, results, tied_moe_dir):
    check(tied_moe_dir, results / f"tied-{slug(axes)}")


def check(source: Path, out: Path) -> None:
    """The files as loaded, the shared memory as last written (4x), the files after the last change (8x)."""
    original = load_file(source / "model.safetensors")
    loaded, moved = (load_file(out / name / "model.safetensors") for name in ("loaded", "moved"))
    assert loaded.keys() == moved.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(moved[name], 8 * tensor), name
    order = json.loads((out / "order.json").read_text())
    shared = torch.from_file(str(out / "shared"), size=sum(x.numel() for x in original.values()))
    assert torch.equal(shared, torch.cat([4 * original[name].flatten() for name in order]))


if __name__ == "__main__":
    each_world(sys.argv[1], round_trip)
