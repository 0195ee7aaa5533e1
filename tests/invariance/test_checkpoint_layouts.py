"""A checkpoint written in one layout goes on in any other with the same losses, and in its own with the same bits.

PPO, so that two models are in it. It is written by a thread while the run that wrote it goes on.
"""

import sys
from pathlib import Path

import pytest
import torch
from frozen_rollout import relative
from layout_runs import config_of, one_step, open_run, weights_of
from worlds import each_world, run_worlds, slug

SAVED, STEPS = 2, 4  # the step after which it is written, and all
WRITERS = {
    "whole": dict(layout=dict(tp=2, ep=2), budget=60),
    "sharded": dict(layout=dict(dp=2, ep=2), budget=60, distributed_optimizer=True),
}
READERS = {
    2: [
        ("whole", dict(tp=2, ep=2)),
        ("whole", dict(pp=2, vpp=2)),
        ("whole", dict(cp=2, ep=2)),
        ("sharded", dict(dp=2, ep=2)),
        ("sharded", dict(tp=2)),
    ],
    1: [("whole", {}), ("sharded", {})],
}
OTHER_READERS = {
    2: [
        ("whole", dict(pp=2)),
        ("whole", dict(tp=2, etp=2)),
        ("sharded", dict(pp=2, vpp=2)),
        ("sharded", dict(cp=2)),
    ],
    4: [
        ("whole", dict(tp=2, pp=2, ep=2)),
        ("whole", dict(cp=2, tp=2)),
        ("sharded", dict(tp=2, dp=2, ep=2, etp=2)),
        ("sharded", dict(pp=2, dp=2, ep=2)),
    ],
}


def run_case(case: dict, groups) -> None:
    """One rank that writes or reads a checkpoint."""
    from mcore_rl.config import CheckpointConfig
    from mcore_rl.model.checkpoint import Progress, load_checkpoint
    from mcore_rl.model.checkpoint_writer import CheckpointWriter

    folder = Path(case["folder"])
    run = open_run(config_of(case), groups, "ppo", dict(kl_coef=0.05), "adam")
    if case["reads"]:
        progress = load_checkpoint(folder, run.models.trained, groups)
        assert progress == Progress(step=SAVED, prompts_seen=10 * SAVED, kl_coef=0.05)
        steps = [one_step(run, step) for step in range(SAVED, STEPS)]
    else:
        checkpoints = CheckpointWriter(folder, run.models.trained, groups, CheckpointConfig(asynchronous=True))
        for step in range(SAVED):
            one_step(run, step)
        checkpoints.save(Progress(step=SAVED, prompts_seen=10 * SAVED, kl_coef=0.05))
        steps = []
        for step in range(SAVED, STEPS):
            steps.append(one_step(run, step))
            checkpoints.poll()
        checkpoints.wait()
    found = {"steps": steps, "weights": weights_of(run)}
    if groups.rank == 0:
        torch.save(found, case["out"])


def name_of(reader: tuple[str, dict]) -> str:
    return f"{reader[0]}-{slug(reader[1])}"


@pytest.fixture(scope="module")
def outcomes(request, tiny_moe_dir, tmp_path_factory):
    """What the writers and the readers of the selected tests found, by name."""
    folder = tmp_path_factory.mktemp("checkpoint_layouts")
    items = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    wanted = {name_of(item.callspec.params["reader"]) for item in items}

    def case(writer: str, name: str, reads: bool, **changed) -> dict:
        paths = dict(source=str(tiny_moe_dir), folder=str(folder / f"{writer}.checkpoints"), out=str(folder / name))
        return WRITERS[writer] | changed | paths | dict(reads=reads)

    for ranks in (2, 1, 4):
        readers = [r for r in (*READERS.get(ranks, ()), *OTHER_READERS.get(ranks, ())) if name_of(r) in wanted]
        cases = [case(writer, writer, reads=False) for writer in WRITERS] if ranks == 2 else []
        cases += [case(writer, name_of((writer, axes)), reads=True, layout=axes) for writer, axes in readers]
        if cases:
            run_worlds(__file__, cases, ranks, timeout_s=120 + 120 * len(cases))
    return {path.name: torch.load(path, weights_only=False) for path in folder.iterdir() if path.is_file()}


ALL = [r for of_ranks in READERS.values() for r in of_ranks] + [
    pytest.param(r, marks=pytest.mark.slow) for of_ranks in OTHER_READERS.values() for r in of_ranks
]


@pytest.mark.parametrize("reader", ALL, ids=name_of)
def test_goes_on_as_the_run_that_wrote_it(reader, outcomes):
    writer, axes = reader
    got, want = outcomes[name_of(reader)], outcomes[writer]
    if axes == WRITERS[writer]["layout"]:
        assert got["steps"] == want["steps"]
        assert all(torch.equal(got["weights"][name], weight) for name, weight in want["weights"].items())
    for metrics, expected in zip(got["steps"], want["steps"], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for name, weight in want["weights"].items():
        assert relative(got["weights"][name], weight) < 1e-5, name


def test_the_comparison_can_fail(outcomes):
    first, second = outcomes["whole"]["steps"]
    for name in ("policy/loss", "critic/loss", "optimizer/grad_norm_mean"):
        assert abs(first[name] - second[name]) > 1e-3


if __name__ == "__main__":
    each_world(sys.argv[1], run_case)
