"""Real Megatron models over real processes: HF folder -> ranks -> HF folder is bit-equal in every layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

MOE_2 = [
    dict(ep=2, dp=2),
    dict(tp=2),
    dict(pp=2),
    dict(pp=2, vpp=2),
    dict(tp=2, ep=2),
    dict(tp=2, etp=2),
    dict(cp=2, ep=2),
    dict(dp=2),
]
MOE_4 = [dict(tp=2, dp=2, ep=2, etp=2), dict(tp=2, pp=2, ep=2), dict(dp=4, ep=4)]
TIED_4 = [dict(tp=2, pp=2), dict(pp=4)]


def main(source: str, out: str, layouts: str) -> None:
    """One rank: every layout in turn."""
    from mcore_rl.parallel import groups as process_groups
    from mcore_rl.parallel.layout import ParallelLayout

    for axes in json.loads(layouts):
        layout = ParallelLayout(**axes)
        groups = process_groups.init(layout, timeout_s=60, seed=0)
        try:
            round_trip(Path(source), Path(out) / slug(axes), groups)
        finally:
            process_groups.destroy()


def round_trip(source: Path, out: Path, groups) -> None:
    import torch.distributed as dist

    from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
    from mcore_rl.model.build import build_model, read_hf_config
    from mcore_rl.model.optimizer import build_training
    from mcore_rl.weights.hf_io import load_hf
    from mcore_rl.weights.shards import megatron_shards
    from mcore_rl.weights.sync import WeightExporter, export_hf

    hf_config = read_hf_config(source)
    chunks = build_model(hf_config, ModelConfig(path=str(source)), groups)
    for param in (p for chunk in chunks for p in chunk.parameters()):
        param.data.fill_(float("nan"))  # what loading forgets must show
    load_hf(source, megatron_shards(chunks, hf_config, groups))
    exporter = WeightExporter(chunks, hf_config, groups, bucket_bytes=100_000)
    names = [name for name, _ in exporter]
    assert names == [name for name, _, _ in exporter.metadata()]
    export_hf(exporter, out / "loaded", source)

    # DistributedDataParallel moves the parameters; the exporter must follow them.
    training = build_training(chunks, OptimizerConfig(), ParallelConfig(), total_updates=1)
    with torch.no_grad():
        for param in (p for chunk in training.chunks for p in chunk.parameters()):
            param.mul_(2)
    numel = sum(torch.Size(shape).numel() for _, _, shape in exporter.metadata())
    shared = torch.from_file(str(out / "shared"), shared=True, size=numel)
    pieces = shared.split([torch.Size(shape).numel() for _, _, shape in exporter.metadata()])
    views = {n: piece.view(shape) for (n, _, shape), piece in zip(exporter.metadata(), pieces)}
    if groups.rank == 0:
        shared.fill_(float("nan"))
    for _ in range(2):  # the second time from the cached pairs, after another change
        dist.barrier()
        exporter.write_into(views)
        dist.barrier()
        assert not shared.isnan().any()
        for param in (p for chunk in training.chunks for p in chunk.parameters()):
            param.data.mul_(2)
    export_hf(exporter, out / "moved", source)  # 8x

    (out / "taken").mkdir(exist_ok=True)
    (out / "taken" / "file").write_text("")
    with pytest.raises(ValueError, match="taken' exists and is not a model folder"):
        export_hf(exporter, out / "taken", source)  # rank 0 fails; nobody hangs, everybody is told


def slug(axes: dict) -> str:
    return "-".join(f"{name}{size}" for name, size in axes.items())


def launch(ranks: int, source: Path, out: Path, layouts: list[dict]) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    command += [str(source), str(out), json.dumps(layouts)]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def moe_2(tiny_moe_dir, tmp_path_factory):
    return launch(2, tiny_moe_dir, tmp_path_factory.mktemp("moe_2"), MOE_2)


@pytest.fixture(scope="module")
def moe_4(tiny_moe_dir, tmp_path_factory):
    return launch(4, tiny_moe_dir, tmp_path_factory.mktemp("moe_4"), MOE_4)


@pytest.fixture(scope="module")
def tied_4(tiny_tied_dir, tmp_path_factory):
    return launch(4, tiny_tied_dir, tmp_path_factory.mktemp("tied_4"), TIED_4)


def check(source: Path, out: Path) -> None:
    original = load_file(source / "model.safetensors")
    loaded, moved = (load_file(out / name / "model.safetensors") for name in ("loaded", "moved"))
    assert loaded.keys() == moved.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(moved[name], 8 * tensor), name


def check_shared(source: Path, out: Path) -> None:
    """The last `write_into` was at 4x."""
    original = load_file(source / "model.safetensors")
    total = sum(x.numel() for x in original.values())
    shared = torch.from_file(str(out / "shared"), size=total)
    from transformers import AutoConfig

    from mcore_rl.weights.shards import hf_shapes

    names = list(hf_shapes(AutoConfig.from_pretrained(source)))
    assert torch.equal(shared, torch.cat([4 * original[name].flatten() for name in names]))


@pytest.mark.parametrize("axes", MOE_2, ids=slug)
def test_two_ranks(axes, moe_2, tiny_moe_dir):
    check(tiny_moe_dir, moe_2 / slug(axes))
    check_shared(tiny_moe_dir, moe_2 / slug(axes))


@pytest.mark.parametrize("axes", MOE_4, ids=slug)
def test_four_ranks(axes, moe_4, tiny_moe_dir):
    check(tiny_moe_dir, moe_4 / slug(axes))
    check_shared(tiny_moe_dir, moe_4 / slug(axes))


@pytest.mark.parametrize("axes", TIED_4, ids=slug)
def test_tied_embeddings_over_pipeline_stages(axes, tied_4, tiny_tied_dir):
    check(tiny_tied_dir, tied_4 / slug(axes))
    check_shared(tiny_tied_dir, tied_4 / slug(axes))


if __name__ == "__main__":
    main(*sys.argv[1:])
