"""What "auto" stands for, on a host with GPUs and without, and what cannot work."""

import pytest

from mcore_rl.config import RolloutConfig, WeightSyncConfig, load_config
from mcore_rl.rollout.placement import resolve

URL = "http://host:8000"


@pytest.mark.parametrize(
    ("rollout", "world", "cuda", "expected"),
    [
        ({}, 1, False, ("in_process", "shm")),
        ({}, 2, False, ("child", "shm")),
        ({"tensor_parallel_size": 2}, 1, False, ("child", "shm")),
        ({"max_staleness": 1}, 1, False, ("child", "shm")),
        ({"num_engines": 2}, 1, False, ("child", "shm")),
        ({"placement": "server", "server_url": URL}, 1, False, ("server", "shm")),
        ({}, 1, True, ("in_process", "shm")),
        ({}, 8, True, ("child", "ipc")),
        ({"tensor_parallel_size": 2}, 8, True, ("child", "shm")),
        ({"placement": "server", "server_url": URL}, 8, True, ("server", "nccl")),
    ],
    ids=str,
)
def test_auto(rollout, world, cuda, expected):
    assert resolve(RolloutConfig(**rollout), WeightSyncConfig(), world, cuda) == expected


def test_several_servers_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("name: run\nmodel: {path: .}\n")
    config = load_config(tmp_path / "run.yaml", ["rollout.server_url=[http://a:8000,http://b:8000]"])
    assert config.rollout.server_url == ["http://a:8000", "http://b:8000"]
    with pytest.raises(ValueError, match="rollout.server_url"):
        load_config(tmp_path / "run.yaml", ["rollout.server_url=3"])


@pytest.mark.parametrize(
    ("rollout", "backend", "world", "cuda", "words"),
    [
        ({"placement": "in_process"}, "auto", 2, False, "needs one trainer rank, got 2"),
        ({"placement": "server"}, "auto", 1, False, "needs rollout.server_url"),
        ({"placement": "server", "server_url": []}, "auto", 1, False, "needs rollout.server_url"),
        ({"placement": "server", "server_url": URL, "sleep": True}, "auto", 1, True, "a server has its own"),
        ({"placement": "in_process", "max_staleness": 1}, "auto", 1, False, "cannot generate while that trains"),
        ({"placement": "in_process", "num_engines": 2}, "auto", 1, False, "is for rollout.placement='child'"),
        (
            {"placement": "server", "server_url": URL, "num_engines": 2},
            "auto",
            1,
            False,
            "a list in rollout.server_url",
        ),
        ({"num_engines": 2}, "auto", 8, True, "would share that of rank 0; use servers"),
        ({"partial": True}, "auto", 2, False, "set max_staleness to 1 or more"),
        ({"sleep": True, "max_staleness": 1}, "auto", 2, True, "cannot leave it its memory"),
        ({}, "nccl", 2, False, "does not work for a host without CUDA"),
        ({}, "ipc", 1, True, "does not work for an engine in the trainer's process"),
        ({}, "nccl", 8, True, "needs GPUs that the trainer does not use"),
        ({"tensor_parallel_size": 2}, "ipc", 8, True, "needs an engine on rank 0's GPU"),
        ({"placement": "server", "server_url": URL}, "ipc", 8, True, "needs an engine on rank 0's GPU"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(rollout, backend, world, cuda, words):
    with pytest.raises(ValueError, match=words):
        resolve(RolloutConfig(**rollout), WeightSyncConfig(backend=backend), world, cuda)
