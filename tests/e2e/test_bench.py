"""The benchmarks run at their smallest size: keys and equality figures are checked, never a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import rollout, weight_plan
from tools.bench.side_by_side import check_equal, interleave, ratios

ROOT = Path(__file__).parents[2]
SPREAD = {"median", "min", "max"}
SMALL = {
    "rollout": ["--prompts", "4", "--prompt-tokens", "8", "--response-tokens", "8"],
    "train_step": ["--sequences", "4", "--prompt-tokens", "8", "--response-tokens", "16"],
    "weight_sync": [],
    "packing": ["--sequences", "4", "--prompt-tokens", "8", "--response-tokens", "16", "--budget", "48"],
    "checkpoint": [],
    "converter": [],
    "routing": ["--sequences", "4", "--prompt-tokens", "8", "--response-tokens", "16"],
}


def result_of(name: str) -> dict:
    command = [sys.executable, "-m", f"tools.bench.{name}", "--model", "tiny", "--repeats", "1", "--json", *SMALL[name]]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)  # nothing but the object
    assert result["benchmark"] == name
    assert result["environment"]["threads"] == 1
    assert result["settings"]["model"] == "tiny" and result["settings"]["repeats"] == 1
    for row in [*result["contenders"].values(), *result["ratios"].values()]:
        assert "seconds" in row
        assert all(figures.keys() == SPREAD and figures["min"] > 0 for figures in row.values())
    return result


def test_rollout():
    result = result_of("rollout")
    assert set(result["contenders"]) == {"vllm", "hf_generate"} and set(result["ratios"]) == {"hf_generate / vllm"}
    assert all("tokens_per_s" in row and "cpu_seconds" in row for row in result["contenders"].values())
    assert result["equal"]["greedy_tokens_different"] == 0
    assert 0 < result["equal"]["logprob_max_diff"] <= 1e-4
    assert result["rival_at_its_best"]["experts"] in result["rival_at_its_best"]["of"]


def test_train_step():
    result = result_of("train_step")
    assert set(result["contenders"]) == {"megatron", "transformers"}
    assert set(result["ratios"]) == {"transformers / megatron"}
    assert all("tokens_per_s" in row and "cpu_seconds" in row for row in result["contenders"].values())
    assert result["equal"].keys() == {"loss_relative_diff", "grad_norm_relative_diff"}
    assert all(value <= 1e-5 for value in result["equal"].values())


def test_packing():
    result = result_of("packing")
    assert set(result["ratios"]) == {"padded / packed"}
    positions = result["work"]["positions"]
    assert positions["padded"] > positions["packed"]
    assert result["work"]["bound"] == positions["padded"] / positions["packed"]
    assert 0 < result["equal"]["grad_norm_relative_diff"] <= 1e-5


def test_checkpoint():
    result = result_of("checkpoint")
    assert {"save / plain write", "load / plain read"} < set(result["ratios"]) and len(result["ratios"]) == 3
    assert result["equal"]["different_elements"] == 0 and result["work"]["bytes"] > 1e6


def test_logprob():
    """In a process of its own: one that has given memory back to its allocator has no peak to be seen."""
    sizes = ["--tokens", "512", "--hidden-size", "8", "--vocab", "4096", "--chunks", "32", "--repeats", "1", "--json"]
    command = [sys.executable, "-m", "tools.bench.logprob", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert set(result["contenders"]) == {"chunks of 32", "materialised"}
    assert 0 < result["equal"]["relative_diff"] <= 1e-5
    peaks, logits = result["peak_bytes"], result["work"]["logits_bytes"]
    assert peaks["materialised"] > 2 * logits > peaks["chunks of 32"]


def test_weight_sync():
    result = result_of("weight_sync")
    paths = {f"{path}, {place}" for path in ("shm", "export and reload") for place in ("child", "in_process")}
    assert set(result["contenders"]) == paths | {"memcpy"} and len(result["ratios"]) == 6
    phases = {
        "shm": {"write", "verify", "pack", "load", "read_back"},
        "export and reload": {"export", "reload"},
    }
    assert all(phases[path.split(", ")[0]] <= result["contenders"][path].keys() for path in paths)
    assert result["equal"]["logprob_max_diff"] <= 1e-5
    assert 0 < result["equal"]["trainer_logprob_max_diff"] <= 1e-4
    assert result["equal"]["updates_without_effect"] == 0


def test_routing():
    result = result_of("routing")
    assert set(result["ratios"]) == {f"{name} / none" for name in ("old", "rollout", "watch one micro-batch")}
    assert result["equal"]["grad_max_diff"] == 0 and result["work"]["bytes_per_token"] == 4


def test_converter():
    result = result_of("converter")
    assert set(result["ratios"]) == {f"{name} / cp" for name in ("to_megatron", "to_hf", "verify")}
    assert all("gb_per_s" in row for row in result["contenders"].values())
    assert result["equal"]["different_tensors"] == 0 and min(result["peak_mb"].values()) > 0


def test_weight_plan(capsys):
    weight_plan.main(ranks=False, json=True)
    qwen, deepseek = json.loads(capsys.readouterr().out)["models"]
    assert 30.5e9 < qwen["parameters"] < 30.6e9 and 671.0e9 < deepseek["parameters"] < 671.1e9
    for result in (qwen, deepseek):
        assert result["again_seconds"] < result["first"]["seconds"] / 10
        assert sum(result["sent_gb"].values()) == pytest.approx(result["gigabytes"])
        assert len(result["received_gb"]) == 16


def test_a_folder_that_is_no_model_is_refused():
    with pytest.raises(SystemExit, match="error: --model 'nowhere' is neither a Hugging Face folder .* tiny, 10M, 50M"):
        rollout.main(model="nowhere")


def test_results_that_differ_are_not_timed():
    assert check_equal({"a": (0.0, 0.0), "b": (1e-6, 1e-5)}) == {"a": 0.0, "b": 1e-6}
    for wrong in (2e-5, float("nan"), float("inf")):
        with pytest.raises(SystemExit, match="b is .*, allowed 1e-05"):
            check_equal({"a": (0.0, 0.0), "b": (wrong, 1e-5)})


def test_contenders_take_turns():
    calls = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "xyz"}, rounds=2)
    assert "".join(calls) == "zyx" + "xyz" + "zyx"  # the first round is not measured
    assert [len(t.wall_s) for t in timings.values()] == [2, 2, 2]


def test_ratio_is_taken_round_by_round():
    assert ratios([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}
