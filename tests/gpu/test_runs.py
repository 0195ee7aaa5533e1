"""Whole runs of the command line on one GPU that sample nothing: torch and megatron-core are enough."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture
def start(tmp_path):
    """`start(algorithm, steps, ...)` runs `mcore-rl train` on four examples and returns the rows of its metrics."""
    from runs import Started, on_examples, rows

    from tools.make_demo_model import make_demo_model

    make_demo_model(tmp_path / "model", seed=0)

    def run(algorithm: str, steps: int, *overrides: str, **sections) -> dict:
        config = on_examples(tmp_path, tmp_path / "model", algorithm, steps=steps, **sections)
        with Started(tmp_path, config, *overrides) as started:
            assert started.wait(200) == 0, started.err.read_text()[-4000:]
        return rows(started.run_dir)

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_sentences_are_learnt_by_heart(start, tmp_path, dtype):
    model = {"path": str(tmp_path / "model"), "dtype": dtype}
    found = start("sft", 40, model=model, optimizer={"lr": 1e-2})
    assert found[1]["policy/loss"] > 2.5 and found[40]["policy/loss"] < 0.3


def test_preferences_are_learnt(start):
    found = start("dpo", 10)
    assert abs(found[0]["eval/pairs_margin"]) < 1e-5 and found[10]["eval/pairs_accuracy"] == 1


def test_a_run_goes_on_where_it_ended(start):
    whole = start("sft", 6, name="whole")
    start("sft", 3)
    resumed = start("sft", 6, "resume=true")
    for step in (4, 5, 6):
        assert resumed[step]["policy/loss"] == pytest.approx(whole[step]["policy/loss"], rel=1e-3)
