"""Real Megatron models over real processes: HF folder -> ranks -> HF folder is bit-equal in every layout."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def main(worlds: str) -> None:
    """One rank: every (source, out, layout, port) in turn."""
    from mcore_rl.parallel import groups as process_groups
    from mcore_rl.parallel.layout import ParallelLayout

    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's store keeps the keys of the previous world
    for source, out, axes, port in json.loads(worlds):
        os.environ["MASTER_PORT"] = str(port)
        groups = process_groups.init(ParallelLayout(**axes), timeout_s=60, seed=0)
        try:
            round_trip(Path(source), Path(out), groups)
        finally:
            process_groups.destroy()


def round_trip(source: Path, out: Path, groups) -> None:
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from mcore_rl.config import ModelConfig
    from mcore_rl.model.build import build_model, read_hf_config
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
    if groups.rank == 0:
        shared.fill_(float("nan"))
    for _ in range(2):  # the second time from the cached pairs, after another change
        dist.barrier()
        exporter.write_into(views)
        dist.barrier()
        assert not shared.isnan().any()
        for param in params:
            param.data.mul_(2)
    export_hf(exporter, out / "moved", source)
    (out / "order.json").write_text(json.dumps(names))

    (out / "taken").mkdir(exist_ok=True)
    (out / "taken" / "file").write_text("")
    with pytest.raises(ValueError, match="taken' exists and is not a model folder"):
        export_hf(exporter, out / "taken", source)  # rank 0 fails; nobody hangs, everybody is told


def slug(axes: dict) -> str:
    return "-".join(f"{name}{size}" for name, size in axes.items())


def free_ports(count: int) -> list[int]:
    """Ports that are free and stay so: below those that the system hands to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


@pytest.fixture(scope="module")
def tied_moe_dir(tmp_path_factory) -> Path:
    from conftest import save_tiny_hf

    return save_tiny_hf(tmp_path_factory.mktemp("tied_moe"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def results(tiny_moe_dir, tied_moe_dir, tmp_path_factory) -> Path:
    """Folder with one folder a case; the processes are started once for all of them."""
    folder = tmp_path_factory.mktemp("layouts")
    cases = [(tiny_moe_dir, folder / slug(axes), axes) for axes in UNTIED]
    cases += [(tied_moe_dir, folder / f"tied-{slug(axes)}", axes) for axes in TIED]
    worlds = [(str(source), str(out), axes, port) for (source, out, axes), port in zip(cases, free_ports(len(cases)))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, json.dumps(worlds)], env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, stderr = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks on SIGTERM; a kill would leave them behind
            raise
    assert process.returncode == 0, "\n".join(line for line in stderr.splitlines() if line.startswith("[rank"))
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
    main(sys.argv[1])
