"""A vLLM server, started as a user would, as the rollout engine: over HTTP on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, make_prompts, max_error, responses
from runs import python_path

from mcore_rl.config import RolloutConfig, WeightSyncConfig
from mcore_rl.rollout.engine import RolloutError
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.rollout.vllm.engine import open_engine
from mcore_rl.rollout.vllm.server import check_facts
from mcore_rl.types import Prompt, SamplingParams

REPOSITORY = Path(__file__).parents[2]
TOLERANCE = 1e-5
SQUARE = "model.layers.2.self_attn.k_proj.weight"  # [64, 64]


def start_server(model: Path, log: Path, backend: str = "shm") -> tuple[subprocess.Popen, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = """--host 127.0.0.1 --dtype float32 --max-model-len 200 --max-num-batched-tokens 2048 --enforce-eager
        --no-enable-chunked-prefill --kv-cache-memory-bytes 100000000 --logprobs-mode processed_logprobs
        --enable-scale-out --worker-extension-cls mcore_rl.rollout.transfer.worker_extension.WorkerExtension"""
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
    }
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command = [*module, *flags.split(), "--weight-transfer-config", f'{{"backend": "{backend}"}}']
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    return process, f"http://127.0.0.1:{port}"


def stop_group(process: subprocess.Popen) -> None:
    """Ends the server and, where it was killed, the engine that it left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def open_on(url: str | list[str], model: Path, startup_timeout_s: float = 60):
    rollout = RolloutConfig(placement="server", server_url=url, startup_timeout_s=startup_timeout_s)
    return open_engine(rollout, WeightSyncConfig(), str(model), "float32", 100, 1, 0)


@pytest.fixture(scope="module")
def server(rollout_dirs, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    process, url = start_server(rollout_dirs[0], log)
    try:
        try:
            engine = open_on(url, rollout_dirs[0], startup_timeout_s=240)  # waits until it is up
        except RolloutError as error:
            raise AssertionError(log.read_text()[-4000:]) from error
        yield process, url, engine
        engine.close()
    finally:
        stop_group(process)


@pytest.fixture(scope="module")
def engine(server):
    return server[2]


def test_generation(engine, rollout_dirs):
    hf = load_hf(rollout_dirs[0])
    prompts, params = make_prompts([1, 7, 40, 150]), SamplingParams(n=3, max_tokens=24)
    groups = engine.generate(prompts, params, seed=0)
    assert max_error(hf, groups) < TOLERANCE
    assert engine.generate(prompts, params, seed=0) == groups
    assert {t.finish_reason for g in groups for t in g.trajectories} <= {"stop", "length"}
    assert all(len(t.text) >= len(t.response_ids) - 5 for g in groups for t in g.trajectories)
    stopped = engine.generate(prompts, SamplingParams(n=3, max_tokens=60, stop=("a",)), seed=0)
    assert any(t.text.endswith("a") for g in stopped for t in g.trajectories)
    assert not any("a" in t.text[:-1] for g in stopped for t in g.trajectories)
    equal = engine.generate([Prompt(str(i), (5, 6, 7), "") for i in range(100)], SamplingParams(max_tokens=20), seed=0)
    assert len({said for (said,) in responses(equal)}) == 100


def test_the_same_samples_as_in_process(engine, rollout_engine):
    prompts, params = make_prompts([5, 9, 20]), SamplingParams(n=3, max_tokens=24)
    there, here = (e.generate(prompts, params, seed=3) for e in (engine, rollout_engine))
    assert responses(there) == responses(here)


def test_weight_updates(engine, rollout_dirs):
    hf = [load_hf(folder) for folder in rollout_dirs]
    exporters = [CheckpointExporter(folder) for folder in rollout_dirs]
    # 150 tokens fill a block of the prefix cache, which must not survive an update.
    prompts, params = make_prompts([150, 5]), SamplingParams(n=3, max_tokens=24)
    assert max_error(hf[0], engine.generate(prompts, params, seed=0)) < TOLERANCE
    current = CheckpointExporter(rollout_dirs[1])
    transfer = connect(engine, current, WeightSyncConfig(), ONE_RANK)
    for version in (1, 2):
        current.tensors = exporters[version % 2].tensors
        transfer.send(version)
        groups = engine.generate(prompts, params, seed=0)
        assert max_error(hf[version % 2], groups) < TOLERANCE
        assert groups[0].trajectories[0].policy_version == version
    transfer.close()


def test_an_update_that_arrives_wrong_is_refused_by_name(engine, rollout_dirs):
    class Transposing(CheckpointExporter):
        wrong = True

        def write_into(self, targets):
            checksums = super().write_into(targets)
            for view in [t.view for t in targets if self.wrong and t.hf_name == SQUARE]:
                view.copy_(view.T.clone())
            return checksums

    exporter = Transposing(rollout_dirs[1])
    transfer = connect(engine, exporter, WeightSyncConfig(), ONE_RANK)
    assert transfer.detour == ""
    with pytest.raises(RolloutError, match=f"{SQUARE} arrived with other bits"):
        transfer.send(3)
    exporter.wrong = False
    transfer.send(4)
    groups = engine.generate(make_prompts([5]), SamplingParams(max_tokens=8), seed=0)
    assert max_error(load_hf(rollout_dirs[1]), groups) < TOLERANCE
    assert groups[0].trajectories[0].policy_version == 4 and transfer.problems() == []
    transfer.close()


def test_mistakes_are_explained(engine, rollout_dirs):
    with pytest.raises(ValueError, match=r"'test/0' has 300 tokens.*199"):
        engine.generate(make_prompts([300]), SamplingParams(), seed=0)
    with pytest.raises(RolloutError, match="refused collective_rpc"):
        engine.call_workers("no_such_method")
    with pytest.raises(RolloutError, match="http://127.0.0.1:9 does not answer"):
        open_on("http://127.0.0.1:9", rollout_dirs[0], startup_timeout_s=1)
    good = {"weight_transfer": "shm", "logprobs_mode": "processed_logprobs", "device": "cpu", "chunked_prefill": False}
    check_facts(good)
    for change, flag in (
        ({"weight_transfer": None}, "--weight-transfer-config"),
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs"),
        ({"chunked_prefill": True}, "--no-enable-chunked-prefill"),
    ):
        with pytest.raises(ValueError, match=flag):
            check_facts(good | change)


def test_a_server_that_dies_is_reported(server):
    process, url, engine = server
    process.kill()
    with pytest.raises(RolloutError, match=url):
        engine.generate(make_prompts([5]), SamplingParams(), seed=0)
    with pytest.raises(RolloutError, match="does not answer"):
        engine.check_alive()
