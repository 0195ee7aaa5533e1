"""SFT and DPO sample nothing where evaluate.sample=false: they run to the end where vLLM cannot be imported, and with
data that no reward could compare with."""

import pytest
from runs import Started, on_examples, rows


@pytest.mark.parametrize("algorithm, seen", [("sft", "policy/loss"), ("dpo", "eval/pairs_accuracy")])
def test_without_vllm(tmp_path, model, monkeypatch, algorithm, seen):
    config = on_examples(tmp_path, model, algorithm, steps=2, evaluate={"every": 1})
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Started(tmp_path, config) as run:
        assert run.wait(300) == 0, run.err.read_text()[-3000:]
    by_step = rows(run.run_dir)
    assert seen in by_step[2] and not [name for name in by_step[2] if name.startswith("weight_sync/")]
    assert (run.run_dir / "hf" / "config.json").exists()
