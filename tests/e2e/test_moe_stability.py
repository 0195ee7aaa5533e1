"""moe-stability's commands on a pair of tiny checkpoints, as typed; what they leave is read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_hf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mcore_rl.cli.stability import as_hf
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.convert import to_megatron
from moe import cli
from moe.record import hf
from moe.studies.engine import EngineAnswer
from moe.studies.study import Study, pooled

ROOT = Path(__file__).parents[2]


def nudged(source: Path, target: Path, by: float) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * weight.std(correction=0) * torch.randn_like(weight))
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path, Path]:
    """OLD, NEW, and rollouts of token ids with rewards."""
    folder = tmp_path_factory.mktemp("pair")
    old = save_tiny_hf(folder / "old", num_hidden_layers=2)
    new = nudged(old, folder / "new", 0.02)
    generator = torch.Generator().manual_seed(0)
    lines = []
    for i in range(24):
        tokens = torch.randint(1, 97, (10,), generator=generator).tolist()
        lines.append(json.dumps({"prompt": [i // 4 + 1], "response": tokens, "reward": i % 2}) + "\n")
    (folder / "rollouts.jsonl").write_text("".join(lines))
    return old, new, folder / "rollouts.jsonl"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(x) for x in arguments])
    if isinstance(result.exception, ValueError):
        return 2, str(result.exception)  # `cli.main` tells it and exits so
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_compare_gives_the_whole_report(pair, tmp_path):
    old, new, rollouts = pair
    later = nudged(old, tmp_path / "later", 0.05)
    out = tmp_path / "out"
    asked = ("--rollouts", rollouts, "--grad-prompts", 3, "--parameters", "layers.1.*gate", "--draws", 50, "--out", out)
    code, output = run("compare", old, new, later, *asked)
    assert code == 0, output
    verdicts = {v["claim"]: v for v in json.loads((out / "verdicts.json").read_text())}
    proved = [v for v in verdicts.values() if v["proved"]]
    assert len(proved) == 7 and all(v["standing"] == "guaranteed-holds" for v in proved)
    assert verdicts["flips-happen"]["standing"] == "supported"
    alone = verdicts["near-ties"]  # one replicate is one seed
    assert alone["standing"] == "not shown" and alone["reason"] == "1 of 3 seeds, for it so far"
    assert verdicts["fp32-agrees"]["reason"].startswith("not run yet: moe-stability mismatch")
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 9 and "http" not in html.split("<body>")[1]  # nothing to load
    places = [html.index(f"<h2>{i}. ") for i in range(1, 8)]
    assert places == sorted(places)
    assert {p.stem for p in (out / "plots").glob("*.png")} >= {"flips", "updates", "laws", "chi", "noise", "routers"}
    (replicate,) = pooled([out])
    assert set(replicate.studies) == {"compare", "sweep", "objectives", "exact"}
    names = replicate.estimates
    assert names["update/2/flips/set"].value > names["update/1/flips/set"].value
    assert (out / "compare.csv").read_text().startswith("name,value,low,high\n")

    three = [out]  # the same numbers three times stand in for three seeds
    for i in (2, 3):
        for study in replicate.studies.values():
            study.save(tmp_path / f"out{i}")
        three.append(tmp_path / f"out{i}")
    code, output = run("report", *three, "--out", tmp_path / "all")
    assert code == 0
    pooled_verdicts = {v["claim"]: v for v in json.loads((tmp_path / "all/verdicts.json").read_text())}
    assert len(pooled_verdicts["near-ties"]["findings"]) == 3
    assert pooled_verdicts["near-ties"]["standing"] == "supported"


def test_a_broken_theorem_is_exit_code_1(pair, tmp_path):
    old, new, rollouts = pair
    out = tmp_path / "out"
    flags = ("--no-sweep", "--no-objectives", "--draws", 20, "--out", out)
    assert run("compare", old, new, "--rollouts", rollouts, *flags)[0] == 0
    study = Study.load(out / "compare.json")
    broken = study.estimates | {"margins/violations": study.estimates["chi"]}
    Study("compare", study.command, study.facts, broken).save(out)
    code, output = run("report", out, "--out", out)
    assert code == 1 and "contradicted" in output


def test_parts_alone(pair, tmp_path):
    old, new, rollouts = pair
    common = ("--rollouts", rollouts, "--draws", 20, "--out", tmp_path)
    assert run("sweep", old, new, *common, "--alphas", "1,0.1,0.01")[0] == 0
    assert run("objectives", old, new, *common, "--grad-prompts", 2, "--parameters", "lm_head")[0] == 0
    assert run("bench-exact", "--out", tmp_path)[0] == 0
    assert set(pooled([tmp_path])[0].studies) == {"sweep", "objectives", "exact"}


def test_record_is_a_file_for_the_others(pair, tmp_path):
    old, new, rollouts = pair
    command = [sys.executable, "tools/moe_stability.py", "record", str(old), "--rollouts", str(rollouts)]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "routes of 4 bytes a token" in done.stdout  # 2 layers, top-2
    first = json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[0])
    assert len(first["logprobs"]) == len(first["response"]) == 10
    flags = ("--no-sweep", "--no-objectives", "--draws", 20, "--out", tmp_path / "again")
    assert run("compare", old, new, "--rollouts", tmp_path / "rollouts.jsonl", *flags)[0] == 0


def test_mismatch_with_an_engine_that_differs_by_routes(pair, tmp_path, monkeypatch):
    """The engine is the model itself in fp32 with other routes for some tokens: all of the mismatch is routing."""
    old, _, _ = pair
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": [i + 1]}) + "\n" for i in range(6)))

    @torch.no_grad()
    def engine(model, dtype, prompts, num_answers, max_tokens, seed, rounds):
        policy = hf.load_model(Path(model), torch.float32)
        given = [
            [p + a for a in group]
            for p, group in zip(prompts, hf.sample(policy, prompts, num_answers, max_tokens, seed))
        ]
        flat = [sequence for group in given for sequence in group]
        _, trace = hf.forward(policy, flat)
        if dtype == "bfloat16":
            trace.expert_ids[::5, 0] = torch.tensor([6, 7])
        logprobs, _ = hf.forward(policy, flat, trace)
        bounds = trace.cu_seqlens.tolist()
        answers = [
            EngineAnswer(s[1:], tuple(logprobs[i].tolist()), trace.expert_ids[bounds[i] : bounds[i + 1] - 1])
            for i, s in enumerate(flat)
        ]
        return [[answers[i : i + num_answers] for i in range(0, len(answers), num_answers)]] * rounds

    monkeypatch.setattr(cli.bridges, "engine", engine)
    asked = (
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--answers",
        4,
        "--max-tokens",
        8,
        "--draws",
        50,
        "--out",
        tmp_path,
    )
    code, output = run("mismatch", old, *asked)
    assert code == 0, output
    found = pooled([tmp_path])[0].estimates
    assert found["mismatch/float32/flips/set"].value == 0 and found["mismatch/float32/free/abs_max"].value < 1e-5
    assert found["mismatch/bfloat16/replayed/abs_max"].value < 1e-5 < found["mismatch/bfloat16/free/abs_max"].value
    assert found["mismatch/bfloat16/share_routing"].value == pytest.approx(1, abs=1e-4)
    assert found["mismatch/bfloat16/floor/other_answers"].value == 0
    monkeypatch.setattr(cli.bridges, "engine", None)
    assert "no rollout engine is at hand" in run("mismatch", old, *asked)[1]


def test_watch_judges_a_run(tmp_path):
    lines = [{"step": i, "moe/chi": 2.0, "moe/flip_any": 0.1, "moe/layer_00/flip_set": 0.1} for i in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "mo')
    code, output = run("watch", tmp_path)
    assert code == 0 and "watch after step 6" in output and "Try algorithm.name=gspo" in output
    html = (tmp_path / "moe-stability/report.html").read_text()
    assert html.count("data:image/png;base64,") == 2 and "Verdicts" not in html  # metrics over time, flips by layer
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line | {"mismatch/k3": 0.5}) + "\n" for line in lines)
    assert run("watch", tmp_path)[0] == 1
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "policy/loss": 0}\n')
    assert "train with moe.log_every=10" in run("watch", tmp_path)[1]


def test_a_megatron_checkpoint_is_converted(pair, tmp_path, monkeypatch):
    old, new, rollouts = pair
    checkpoint = to_megatron(new, tmp_path / "checkpoint", ParallelLayout(ep=2, dp=2))
    monkeypatch.setattr(cli.bridges, "as_hf", as_hf)
    flags = ("--no-sweep", "--no-objectives", "--draws", 20, "--rollouts", rollouts)
    for name, path in (("megatron", checkpoint), ("hf", new)):
        code, output = run("compare", old, path, *flags, "--out", tmp_path / name)
        assert code == 0, output
    megatron, hf_ = (Study.load(tmp_path / name / "compare.json").estimates for name in ("megatron", "hf"))
    assert megatron == hf_


def test_mistakes_are_told_before_anything_is_computed(pair, tmp_path):
    old, new, rollouts = pair
    other = save_tiny_hf(tmp_path / "other", num_hidden_layers=1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "text"}\n')
    for arguments, message in (
        ((old, new), "give either --prompts FILE"),
        ((old, new, "--rollouts", tmp_path / "none.jsonl"), "cannot read"),
        ((old, tmp_path / "nothing", "--rollouts", rollouts), "is no Hugging Face folder"),
        ((old, tmp_path, "--rollouts", rollouts), "is no Hugging Face folder"),
        ((old, other, "--rollouts", rollouts), "not the same architecture"),
        ((old, new, "--prompts", prompts), "has no tokenizer"),
        ((old, new, "--rollouts", rollouts, "--dtype", "int8"), "allowed are float64, float32, bfloat16"),
    ):
        code, output = run("compare", *arguments, "--out", tmp_path / "out")
        assert code == 2 and message in output, output
    assert "1,0.1,0.01" in run("sweep", old, new, "--rollouts", rollouts, "--alphas", "1,2")[1]
