"""A run that was killed in the middle and resumed is the run that was not: every number of every later step."""

import shutil
import signal

import pytest
from runs import Started, assert_nothing_left, command, numbers, rows, tiny

KL = {"algorithm": {"name": "grpo", "kl_coef": 0.01}}
STEPS = {"steps": 6, "batch": {"mini_batches": 2}, "checkpoint": {"every": 2, "export_hf": False}}


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_it_means_something(by_step):
    """Losses and rewards are not zero and differ from step to step."""
    for name in ("policy/loss", "reward/mean", "mismatch/k3", "eval/accuracy"):
        values = [row[name] for row in by_step.values() if name in row]
        assert len(set(values)) > 2 and all(values), (name, values)


def test_one_rank(tmp_path, model, worker):
    """The reference follows the policy. What was killed also keeps it and the optimizer's state in the host's memory,
    which changes no number.
    """
    sections = STEPS | KL | {"reference": {"update_every": 2}}
    offloaded = sections | {
        "optimizer": {"lr": 1e-3, "offload": True},
        "reference": {"update_every": 2, "offload": True},
    }
    tiny(tmp_path, model, name="whole", **sections)
    assert worker(command, tmp_path, "train", "config.yaml")[0] == 0
    whole = rows(tmp_path / "runs" / "whole")
    assert set(whole) == set(range(7))
    assert_it_means_something(whole)
    assert checkpoints(tmp_path / "runs" / "whole") == ["step_000004", "step_000006"], "keep_last is 2"

    config = tiny(tmp_path, model, name="killed", reward="tiny_rewards:dies_in_step_4", **offloaded)
    with Started(tmp_path, config) as run:
        assert run.wait() == -signal.SIGKILL, run.err.read_text()
    assert set(rows(run.run_dir)) == {0, 1, 2, 3}
    assert checkpoints(run.run_dir) == ["step_000002"]
    with (run.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "pha')  # as if it had died in the middle of a line

    tiny(tmp_path, model, name="killed", **offloaded)
    code, out, err = worker(command, tmp_path, "train", "config.yaml", "resume=true")
    assert code == 0 and "killed: continues after step 2\n" in out, err
    assert numbers(rows(run.run_dir)) == numbers(whole)
    assert checkpoints(run.run_dir) == ["step_000004", "step_000006"]


def test_two_ranks_with_sharded_experts_and_optimizer(tmp_path, model):
    """The killed run is its own reference: it is resumed from the older of its checkpoints and repeats what it did.
    What KL is measured from has a layout of its own.
    """
    sections = STEPS | KL | {"parallel": {"ep": 2, "distributed_optimizer": True, "timeout_s": 60}}
    sections |= {"reference": {"update_every": 2, "parallel": {"pp": 2}}}
    with Started(tmp_path, tiny(tmp_path, model, reward="tiny_rewards:dies_in_step_6", **sections), ranks=2) as run:
        assert run.wait() == 1
        assert_nothing_left(run, set())  # rank 0 had no chance to stop its engine
        assert any("rank 0 (process " in line and "was killed by SIGKILL" in line for line in run.errors())
    killed = rows(run.run_dir)
    assert set(killed) == set(range(6))
    assert_it_means_something(killed)
    assert checkpoints(run.run_dir) == ["step_000002", "step_000004"]
    shutil.rmtree(run.run_dir / "checkpoints" / "step_000004")

    with Started(tmp_path, tiny(tmp_path, model, **sections), "resume=true", ranks=2) as run:
        assert run.wait() == 0, run.err.read_text()
        assert "run: continues after step 2\n" in run.out.read_text()
        assert_nothing_left(run, set())
    resumed = numbers(rows(run.run_dir))
    assert set(resumed) == set(range(7))
    for step, row in numbers(killed).items():
        assert resumed[step] == pytest.approx(row, rel=1e-6, abs=1e-6), step
    assert checkpoints(run.run_dir) == ["step_000004", "step_000006"]


@pytest.mark.slow
def test_another_layout_goes_on_with_the_same_losses(tmp_path, model):
    """From tensor and expert ranks to pipeline stages, by asynchronous saves; what it would have done is known."""
    sections = STEPS | {"checkpoint": STEPS["checkpoint"] | {"asynchronous": True, "keep_last": 9}}
    with Started(tmp_path, tiny(tmp_path, model, parallel={"tp": 2, "ep": 2}, **sections), ranks=2) as run:
        assert run.wait(600) == 0, run.err.read_text()
    whole = numbers(rows(run.run_dir))
    assert_it_means_something(whole)
    assert checkpoints(run.run_dir) == ["step_000002", "step_000004", "step_000006"]
    for late in ("step_000004", "step_000006"):
        shutil.rmtree(run.run_dir / "checkpoints" / late)
    with Started(tmp_path, tiny(tmp_path, model, parallel={"pp": 2}, **sections), "resume=true", ranks=2) as run:
        assert run.wait(600) == 0, run.err.read_text()
        assert "run: continues after step 2\n" in run.out.read_text()
        assert_nothing_left(run, set())
    resumed = numbers(rows(run.run_dir))
    assert set(resumed) == set(range(7))
    of_the_layout = ("memory/", "train/num_positions")
    for step, row in whole.items():
        same = {name: value for name, value in row.items() if not name.startswith(of_the_layout)}
        assert {name: resumed[step][name] for name in same} == pytest.approx(same, rel=1e-4, abs=1e-4), step
