"""Rollouts ahead of the training: the synchronous loop at 0, the bound, who sampled what, resuming, and accidents."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from runs import ROOT, Started, assert_nothing_left, command, numbers, rows, tiny

STEPS = {"steps": 6, "batch": {"mini_batches": 2}, "checkpoint": {"every": 2, "export_hf": False}}
ONE_OFF = {"rollout": {"group_size": 2, "max_response_tokens": 8, "kv_cache_gb": 0.05, "max_staleness": 1}}
CLOCKS = ("generate_s", "overlap_frac")
MEASURED = ("overlap", "mean_staleness")


def learned(run_dir):
    """step -> every number that does not come from a clock."""
    by_step = numbers(rows(run_dir)).items()
    return {step: {k: v for k, v in row.items() if not any(name in k for name in CLOCKS)} for step, row in by_step}


def assert_equal(one, other):
    """Up to the last bit of the engine's log-probs: which requests it computes together hangs on when they arrive."""
    assert one.keys() == other.keys()
    for step, row in other.items():
        assert one[step] == pytest.approx(row, rel=1e-6, abs=1e-6), step


@pytest.fixture(scope="module")
def one_off(tmp_path_factory, model, worker):
    """(folder, rows) of a run that is one step off."""
    folder = tmp_path_factory.mktemp("one_off")
    tiny(folder, model, name="whole", **STEPS | ONE_OFF)
    code, out, err = worker(command, folder, "train", "config.yaml")
    assert code == 0, err
    return folder, out, rows(folder / "runs" / "whole")


def test_one_step_off(one_off):
    """The first batch is of the weights it is trained with, every later one of those before: all deterministic."""
    _, out, by_step = one_off
    assert "warning: algorithm.correction" in out
    steps = [by_step[step] for step in range(1, 7)]
    assert [row["staleness/max"] for row in steps] == [0, 1, 1, 1, 1, 1]
    assert [row["staleness/mean"] for row in steps] == [0, 1, 1, 1, 1, 1]
    assert [row["rollout/stale_groups_frac"] for row in steps] == [0, 1, 1, 1, 1, 1]
    assert all(row["rollout/dropped_groups"] == 0 for row in steps)
    # tokens of the present weights agree with the trainer, those of older ones need not
    assert steps[0]["mismatch/abs_max"] < 1e-4 and "staleness/abs_max" not in steps[0]
    assert all("mismatch/abs_max" not in row and row["staleness/abs_max"] > 1e-4 for row in steps[1:])
    assert all(0 <= row["rollout/overlap_frac"] <= 1 for row in steps) and steps[2]["rollout/overlap_frac"] > 0


def test_a_resumed_run_is_the_run_that_was_not_interrupted(one_off, model, worker):
    """It is continued from the older of its checkpoints, which holds the batch that was generated ahead."""
    folder, _, whole = one_off
    shutil.copytree(folder / "runs" / "whole", folder / "runs" / "stopped")
    shutil.rmtree(folder / "runs" / "stopped" / "checkpoints" / "step_000006")
    tiny(folder, model, name="stopped", **STEPS | ONE_OFF)
    code, out, err = worker(command, folder, "train", "config.yaml", "resume=true")
    assert code == 0 and "stopped: continues after step 4\n" in out, err
    assert set(whole) == set(range(7))
    assert_equal(learned(folder / "runs" / "stopped"), learned(folder / "runs" / "whole"))


@pytest.mark.slow
def test_zero_is_the_synchronous_loop(tmp_path, model, worker):
    """In the trainer's process and in a child that could generate ahead; two engines sample what one does."""
    for name, *settings in (
        ("here",),
        ("child", "rollout.placement=child"),
        ("two", "rollout.num_engines=2"),
    ):
        tiny(tmp_path, model, name=name, **STEPS)
        assert worker(command, tmp_path, "train", "config.yaml", *settings)[0] == 0
    here, child, two = (learned(tmp_path / "runs" / name) for name in ("here", "child", "two"))
    assert_equal(child, here)
    assert_equal(two, here)
    assert {row["staleness/max"] for step, row in here.items() if step} == {0}


LONG = {
    "steps": 8,
    "batch": {"mini_batches": 2},
    "rollout": {"group_size": 8, "max_response_tokens": 200, "kv_cache_gb": 0.2, "max_staleness": 2, "partial": True},
    "algorithm": {"name": "grpo", "correction": "tis_token"},
}


@pytest.mark.slow
def test_long_responses_go_on_under_new_weights(tmp_path, model, worker):
    """Within the bound; and what the present weights sampled, continuations too, agrees with the trainer."""
    tiny(tmp_path, model, **LONG)
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 0, err
    steps = [row for step, row in rows(tmp_path / "runs" / "run").items() if step > 0]
    assert all(row["staleness/max"] <= 2 for row in steps)
    mixed = [row for row in steps if 0 < row["staleness/stale_tokens_frac"] < 1]
    assert mixed, "no response was in flight when weights changed"
    assert all(row["mismatch/abs_max"] < 1e-4 for row in mixed)


FOREVER = {
    "parallel": {"ep": 2, "timeout_s": 60},
    "rollout": {"group_size": 32, "max_response_tokens": 400, "kv_cache_gb": 0.2, "max_staleness": 1},
    "steps": 1000,
}


@pytest.mark.slow
def test_an_engine_that_dies_while_the_trainer_works(tmp_path, model):
    with Started(tmp_path, tiny(tmp_path, model, **FOREVER), ranks=2) as run:
        run.wait_for_step(1)
        engine, shared = run.engine(), run.shared_files()
        engine.kill()
        assert run.wait(60) == 1
        assert_nothing_left(run, shared)
        (line,) = run.errors()
        assert f"the engine's process {engine.pid} died during" in line and "killed by SIGKILL" in line


@pytest.mark.slow
def test_a_trainer_that_fails_while_the_engine_works(tmp_path, model):
    reward = "tiny_rewards:raises"  # in the second step, with the third's batch in flight
    with Started(
        tmp_path, tiny(tmp_path, model, reward=reward, **FOREVER | {"batch": {"prompts_per_step": 1}}), ranks=2
    ) as run:
        run.wait_for_step(0)
        shared = run.shared_files()
        assert run.wait(150) == 2
        started = time.monotonic()
        assert_nothing_left(run, shared)
        assert time.monotonic() - started < 15
        (line,) = run.errors()
        assert "raised KeyError: 'no such thing'" in line


@pytest.mark.slow
def test_the_benchmark():
    sizes = ["--prompts=2", "--max-tokens=8", "--steps=3", "--repeats=1"]
    command = [sys.executable, "-m", "tools.bench.async_rollout", "--json", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    modes = {"synchronous", "one step off", "one step off, partial"}
    assert result["contenders"].keys() == modes and len(result["ratios"]) == 2
    overlap, staleness = ({mode: result["contenders"][mode][name]["median"] for mode in modes} for name in MEASURED)
    assert overlap["synchronous"] < 0.01 and overlap["one step off"] > 0.01
    assert staleness["synchronous"] == 0 and staleness["one step off"] == 1 >= staleness["one step off, partial"]
