"""SFT and DPO sample nothing where evaluate.sample=false: they run to the end where vLLM cannot be imported, and with
data that no reward could compare with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import rows, tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = [{"prompt": f"{d}=", "response": f"#{d}", "chosen": f"#{d}", "rejected": d} for d in "2468"]


@pytest.mark.parametrize("algorithm, seen", [("sft", "policy/loss"), ("dpo", "eval/pairs_accuracy")])
def test_without_vllm(tmp_path, model, algorithm, seen):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    config = tiny(tmp_path, model, algorithm={"name": algorithm}, steps=2, evaluate={"every": 1, "sample": False})
    config |= {"data": {"task": "file", "train_file": "data.jsonl", "eval_file": "data.jsonl"}}
    del config["reward"]
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "mcore_rl.cli", "train", "config.yaml"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    by_step = rows(tmp_path / "runs" / "run")
    assert seen in by_step[2] and not [name for name in by_step[2] if name.startswith("weight_sync/")]
    assert (tmp_path / "runs" / "run" / "hf" / "config.json").exists()
