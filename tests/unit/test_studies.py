"""tools.studies tabulates what runs have logged, and says which runs an arm consists of."""

import json

from mcore_rl.algorithms import available, load
from mcore_rl.config import load_config
from tools.studies import ARMS, DEMO, STUDIES, WARM_STARTS
from tools.study_tables import (
    BY_LENGTH,
    COST,
    ENDED_ITSELF,
    FALL,
    LEARNING,
    Column,
    against_first,
    collapsed,
    held,
    mean,
    median,
    sign_flip,
    table,
)

ROWS = [
    {"step": 0, "eval/accuracy": 0.25, "memory/policy_parameters": 8e5, "memory/critic_parameters": 8e5},
    {"step": 1, "policy/entropy": 0.5, "policy/clip_frac": 0.01, "time/update_s": 1.0},
    {"step": 2, "policy/entropy": 0.25, "policy/clip_frac": 0.03, "time/update_s": 9.0},
    {"step": 20, "policy/entropy": 0.125, "policy/clip_frac": 0.05, "time/update_s": 2.0, "eval/accuracy": 0.75},
]


def write(folder, seed, arm, rows, finished=True):
    run_dir = folder / f"seed{seed}" / arm
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (run_dir / "report.png").touch()


def test_a_cell_is_of_one_run_or_of_all():
    assert Column("after", lambda rows: rows[-1]["eval/accuracy"]).cell([ROWS, ROWS]) == "0.75 0.75"
    assert Column("clipped", mean("policy/clip_frac"), "{:.2f}", "mean").cell([ROWS]) == "0.03"
    assert Column("update", median("time/update_s"), "{:.1f}", "mean").cell([ROWS]) == "2.0", "of 1, 2, 9"
    assert Column("never logged", mean("policy/gate_mean")).cell([ROWS]) == "-"
    assert held(ROWS) == [8e5, 8e5]


def test_collapsed_is_a_reward_that_does_not_come_back():
    def of(*rewards):
        return collapsed([{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards)])

    assert of(0.2, 0.4, 0.8, 0.5, 0.41) is None
    assert of(0.2, 0.8, 0.3, 0.5, 0.1, 0.0) == 4, "the dip at 2 was made good"
    assert of() is None


def test_a_table_has_the_finished_runs_only(tmp_path):
    write(tmp_path, 0, "grpo", ROWS)
    write(tmp_path, 1, "grpo", ROWS)
    write(tmp_path, 2, "grpo", ROWS, finished=False)
    write(tmp_path, 0, "sapo", ROWS, finished=False)
    lines = table(tmp_path, ["grpo", "sapo"], [0, 1, 2], LEARNING).splitlines()
    assert len(lines) == 3 and lines[1].count("|") == lines[0].count("|") == len(LEARNING) + 3
    assert lines[2] == "| grpo | 0 1 | 0.25 0.25 | 0.75 0.75 | - | - | 0.500 | 0.125 | 0.125 | 3.00% | - | - | - |"
    assert "| 2 | 1.60 | " in table(tmp_path, ["grpo"], [0], COST).splitlines()[2]

    (tmp_path / "seed0" / "grpo" / "accuracy_20.json").write_text('{"eval/accuracy": 0.5}')
    assert table(tmp_path, ["grpo"], [0, 1], BY_LENGTH).splitlines()[2] == "| grpo | 0 1 | - | - | 0.50 - |"


def test_a_run_that_ended_itself_counts_with_what_it_has(tmp_path):
    rewards = (0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
    rows = [{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards)]
    write(tmp_path, 0, "dapo", rows)
    write(tmp_path, 1, "dapo", rows[:4], finished=False)
    assert table(tmp_path, ["dapo"], [0, 1], FALL).splitlines()[2].startswith("| dapo | 0 | 0.50 | 0.20 |")
    (tmp_path / "seed1" / "dapo" / ENDED_ITSELF).touch()
    both = table(tmp_path, ["dapo"], [0, 1], FALL).splitlines()[2]
    assert both.startswith("| dapo | 0 1 | 0.50 0.50 | 0.20 0.35 | 0.275 | - 3 |")


def test_arms_against_the_first_by_seed(tmp_path):
    """Signs can be flipped in eight ways; with differences of 1, 2 and 3 only two are as far from 0."""
    for seed in range(3):
        write(tmp_path, seed, "grpo", [{"step": 1, "reward/mean": 0.0}])
        write(tmp_path, seed, "gspo", [{"step": 1, "reward/mean": float(seed + 1)}])
    first, second = against_first(tmp_path, ["grpo", "gspo"], [0, 1, 2]).splitlines()[2:]
    assert first == "| grpo | 0.000 | 3 of 3 |  |  |" and second == "| gspo | 2.000 | 0 of 3 | +2.000 | 0.25 |"
    assert sign_flip([1.0, -1.0]) == 1.0


def test_arms_are_configurations_that_exist():
    for arm in ARMS.values():
        fields = dict(load_config(DEMO / arm.config, arm.changes).algorithm)
        name = fields.pop("name")
        assert name in available() and load(name, **fields) and arm.warm_start in WARM_STARTS
    assert {arm for arms in STUDIES.values() for arm in arms} == set(ARMS)
