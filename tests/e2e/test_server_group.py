"""Two vLLM servers as one engine: the samples of one, the weights on both, and which of them died."""

import pytest
from rollout_reference import ONE_RANK, CheckpointExporter, load_hf, make_prompts, max_error
from test_vllm_server import open_on, start_server, stop_group

from mcore_rl.config import WeightSyncConfig
from mcore_rl.rollout.engine import RolloutError
from mcore_rl.rollout.transfer.transfer import connect
from mcore_rl.types import SamplingParams

TOLERANCE = 1e-5
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers(rollout_dirs, tmp_path_factory):
    """(processes, addresses); weights come by gloo, where every worker needs a rank of its own."""
    folder = tmp_path_factory.mktemp("servers")
    started = [start_server(rollout_dirs[0], folder / f"{i}.txt", "gloo") for i in range(2)]
    try:
        yield [process for process, _ in started], [url for _, url in started]
    finally:
        for process, _ in started:
            stop_group(process)


def test_two_servers_are_one_engine(servers, rollout_dirs):
    processes, urls = servers
    group = open_on(urls, rollout_dirs[0], startup_timeout_s=300)
    one = open_on(urls[0], rollout_dirs[0])
    assert group.num_workers == 2 and group.weight_backend == "gloo"
    prompts, params = make_prompts([5, 9, 20, 40, 3]), SamplingParams(n=3, max_tokens=24)
    assert group.generate(prompts, params, seed=3) == one.generate(prompts, params, seed=3)
    assert len(group.call_workers("rollout_facts")) == 2
    with pytest.raises(ValueError, match=r"'test/1' has 300 tokens"):
        group.generate(make_prompts([5, 300]), params, seed=0)

    hf = [load_hf(folder) for folder in rollout_dirs]
    current = CheckpointExporter(rollout_dirs[1])
    transfer = connect(group, current, WeightSyncConfig(backend="gloo"), ONE_RANK)
    first = dict(CheckpointExporter(rollout_dirs[0]).tensors)
    for version, tensors in ((1, current.tensors), (2, first)):
        current.tensors = tensors
        transfer.send(version)
        groups = group.generate(prompts, params, seed=0)
        # both servers answered, so a server with the old weights would show
        assert max_error(hf[version % 2], groups) < TOLERANCE < max_error(hf[(version + 1) % 2], groups)
        assert {t.policy_version for g in groups for t in g.trajectories} == {version}
    transfer.close()

    with pytest.raises(ValueError, match="names a server twice"):
        open_on([urls[0], urls[0] + "/"], rollout_dirs[0])
    processes[1].kill()
    with pytest.raises(RolloutError, match=urls[1]):
        group.generate(prompts, params, seed=0)
    with pytest.raises(RolloutError, match=f"{urls[1]} does not answer"):
        group.check_alive()
    group.close()
    one.close()
