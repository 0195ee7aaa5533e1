"""What the GPU tests compare with must itself be right: the same code on this CPU, against transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).parents[1] / "gpu" / "trainer_kit.py"
BODY = f"""
import json, sys
sys.path.insert(0, {str(KIT.parent)!r})
from pathlib import Path
import torch, trainer_kit as kit
folder = Path(sys.argv[1])
with kit.one_rank() as groups:
    ours, theirs = kit.logprobs(folder, groups, "float32", "local"), kit.hf_logprobs(folder, groups.device, "float32")
    step = kit.one_step(folder, groups)
assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "typer", "rich")]
print(json.dumps({{"error": (ours - theirs).abs().max().item(), **step}}))
"""


def test_the_trainers_kit_on_a_cpu(tiny_moe_dir):
    """Also: the trainer imports neither vLLM nor what the command line needs."""
    done = subprocess.run([sys.executable, "-c", BODY, tiny_moe_dir], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["error"] < 1e-5 and found["device"] == "cpu"
    assert found["grad_norm"] > 0.01 and found["loss"] == pytest.approx(-1.0, abs=1e-5)  # every advantage is 1
    gained = [b - a for a, b in zip(found["before"], found["after"], strict=True)]
    assert sum(gained) > 1 and len(gained) == sum((24, 40, 33, 1, 17))
