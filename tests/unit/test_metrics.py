import io
import json
import math
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcore_rl.config import RunConfig
from mcore_rl.logs.metrics import RunLog, Timers, format_step, progress_display, read_metrics


def config(**logging) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "demo", "model": {"path": "x"}, "steps": 12, "logging": {"tensorboard": False, **logging}}
    )


def test_one_object_a_step_readable_while_the_run_goes_on(tmp_path):
    log = RunLog(tmp_path / "run", config())
    log.log(0, {"eval/accuracy": 0.25})
    log.log(1, {"reward/mean": torch.tensor(0.5), "reward/std": np.float32(0.25), "n": 3}, phase="grpo")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # not closed yet
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "phase": "train", "eval/accuracy": 0.25},
        {"step": 1, "phase": "grpo", "reward/mean": 0.5, "reward/std": 0.25, "n": 3.0},
    ]
    log.close()


def test_values_that_json_cannot_hold_are_null(tmp_path):
    log = RunLog(tmp_path, config())
    log.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    log.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "phase": "train", "a": None, "b": None, "c": 1.0}


def steps_after_resume(run_dir, resume_step):
    log = RunLog(run_dir, config(), resume_step=resume_step)
    log.log(99, {"x": 9.0})
    log.close()
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize(("resume_step", "kept"), [(2, [0, 1, 2]), (3, [0, 1, 2, 3]), (7, [0, 1, 2, 3]), (0, [])])
def test_resume_removes_what_the_new_run_will_write(tmp_path, resume_step, kept):
    log = RunLog(tmp_path, config())
    for step in range(4):
        log.log(step, {"x": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "pha')  # killed while writing
    assert steps_after_resume(tmp_path, resume_step) == [*kept, 99]


def test_resume_without_earlier_metrics(tmp_path):
    assert steps_after_resume(tmp_path / "new", 5) == [99]


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    log = RunLog(tmp_path, config())
    log.log(0, {"x": 1.0})
    log.close()
    with pytest.raises(ValueError, match=r"already holds a run of 1 logged lines; resume=true"):
        RunLog(tmp_path, config())


def test_damage_inside_the_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nbroken\n{"step": 1}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path / "no.jsonl")


def test_tensorboard_sees_the_run_and_its_resumption(tmp_path):
    log = RunLog(tmp_path, config(tensorboard=True))
    for step in (1, 2, 3):
        log.log(step, {"reward/mean": step / 10})
    log.close()
    time.sleep(1.1)  # event files are ordered by the second they were made in
    log = RunLog(tmp_path, config(tensorboard=True), resume_step=2)
    log.log(3, {"reward/mean": 0.9})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(e.step, round(e.value, 4)) for e in events.Scalars("reward/mean")]
    assert points == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        RunLog(tmp_path, config(wandb=True))


def test_timers_add_up_by_name_even_when_a_phase_fails():
    timers = Timers()
    for _ in range(2):
        with timers("collect"):
            time.sleep(0.02)
    with pytest.raises(KeyError), timers("update"):
        raise KeyError
    metrics = timers.metrics()
    assert list(metrics) == ["time/collect_s", "time/update_s"]
    assert 0.04 <= metrics["time/collect_s"] < 1
    assert 0 <= metrics["time/update_s"] < 0.04


def test_format_step_shows_what_is_there():
    assert format_step({"reward/mean": 0.5, "unknown": 1, "eval/accuracy": 0.25}) == "reward 0.500  accuracy 0.250"


def test_progress_is_a_line_a_step_where_there_is_no_terminal():
    stream = io.StringIO()
    with progress_display(config(), 3, stream=stream) as display:
        display.update(4, {"reward/mean": 0.5})
        display.update(12, {})
    assert stream.getvalue().splitlines() == ["demo  4/12  reward 0.500", "demo 12/12  "]


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress_display(config(), 3, stream=stream) as display:
        display.update(4, {"reward/mean": 0.5})
    assert "4/12" in stream.getvalue()
    assert "reward 0.500" in stream.getvalue()


def test_only_one_rank_shows_progress():
    stream = io.StringIO()
    with progress_display(config(), 0, enabled=False, stream=stream) as display:
        display.update(1, {"reward/mean": 0.5})
    assert stream.getvalue() == ""
