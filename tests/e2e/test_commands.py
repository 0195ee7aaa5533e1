"""Every command on one small finished run, what the run leaves behind, and the variants of a run."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from runs import command, rows, tiny

from mcore_rl.config import load_config

KEYS = (
    *("reward/mean", "reward/std", "eval/accuracy", "response/length_mean", "policy/entropy", "policy/ratio_mean"),
    *("policy/clip_frac", "policy/kl_old", "rollout/tokens_per_s", "train/tokens_per_s", "weight_sync/seconds"),
    *("weight_sync/logprob_max_diff", "mismatch/k3", "time/collect_s", "time/update_s", "time/sync_s"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, worker):
    """The folder of a run of two steps that has come to its end."""
    folder = tmp_path_factory.mktemp("finished")
    tiny(folder, model, logging={"tensorboard": True, "report": True})
    code, out, err = worker(command, folder, "train", "config.yaml")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("run ")] == [
        ["run", "1/2"],
        ["run", "2/2"],
    ]
    return folder


def test_a_run_leaves_its_files(finished):
    run = finished / "runs" / "run"
    by_step = rows(run)
    assert set(by_step) == {0, 1, 2}
    for step in (1, 2):
        assert set(KEYS) <= set(by_step[step]) and by_step[step]["phase"] == "grpo"
        assert 0 <= by_step[step]["weight_sync/logprob_max_diff"] < 1e-4
        assert 0 <= by_step[step]["mismatch/k3"] < 1e-8
    assert load_config(run / "config.yaml") == load_config(finished / "config.yaml")
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (run / "hf").iterdir()}


def test_the_export_gives_the_trainers_logprobs_in_transformers(finished, model, worker):
    trained, exported, random = worker(logprobs_of_trainer_and_exports, finished, model)
    assert max(abs(a - b) for a, b in zip(trained, exported, strict=True)) < 1e-5
    assert max(abs(a - b) for a, b in zip(trained, random, strict=True)) > 1e-3, "training has changed the policy"


def logprobs_of_trainer_and_exports(folder: Path, model: Path) -> list[list[float]]:
    """Log-probs of the same tokens by the checkpoint in Megatron, by hf/ in transformers and by the untrained model."""
    from transformers import AutoModelForCausalLM

    from mcore_rl.data.scores import batch_of
    from mcore_rl.data.sequences import Sample
    from mcore_rl.model.forward import forward_only
    from mcore_rl.planning.check import make_plan
    from mcore_rl.run import open_run

    config = load_config(folder / "config.yaml", ["resume=true"])
    tokens = torch.randint(2, 20, (1, 40), generator=torch.Generator().manual_seed(0))
    batch = batch_of([Sample(tuple(tokens[0].tolist()), 39, 0.0, (0.0,) * 39)], [1.0])
    with redirect_stdout(io.StringIO()), open_run(make_plan(config, 1)) as run:
        assert run.start.step == 2
        found = [forward_only(run.models.policy, [batch])[0].logprobs.tolist()]
    for path in (config.run_dir / "hf", model):
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logprobs = hf(tokens).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return found


def test_generate(finished, worker):
    hf = str(finished / "runs" / "run" / "hf")
    arguments = ["generate", hf, "123456=", "654=", "--n=3", "--max-tokens=8", "--seed=1"]
    code, out, err = worker(command, finished, *arguments)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt"] for a in answers] == ["123456="] * 3 + ["654="] * 3
    assert all(len(a["response"]) <= 8 and a["logprob"] < 0 for a in answers)
    assert {a["finish_reason"] for a in answers} <= {"stop", "length"}
    assert worker(command, finished, *arguments)[1] == out, "the same seed gives the same answers"

    for arguments, words in {
        ("nowhere", "1="): "model.path='nowhere' does not exist",
        (hf, "two words"): "cannot encode 'two words'",
        (hf, "1" * 1020, "--max-tokens=8"): "1020 tokens",
    }.items():
        code, _, err = worker(command, finished, "generate", *arguments)
        assert code == 2 and err.startswith("error: ") and words in err, err


def test_evaluate_agrees_with_the_runs_last_evaluation(finished, model, worker):
    last = rows(finished / "runs" / "run")[2]
    code, out, err = worker(command, finished, "evaluate", "config.yaml")
    assert code == 0, err
    result = json.loads(out)
    assert result.pop("model") == str(finished / "runs" / "run" / "hf")
    assert result == {name: value for name, value in last.items() if name.startswith("eval/")}
    code, out, _ = worker(command, finished, "evaluate", "config.yaml", f"--model={model}")
    first = rows(finished / "runs" / "run")[0]
    assert json.loads(out)["eval/reward_mean"] == first["eval/reward_mean"]


def test_evaluate_asks_whatever_the_training_did(finished, model, worker):
    """SFT without sampling has no reward of its own."""
    overrides = ("algorithm.name=sft", "evaluate.sample=false")
    code, out, err = worker(command, finished, "evaluate", "config.yaml", *overrides, "--model", str(model))
    assert code == 0 and 0 <= json.loads(out.splitlines()[-1])["eval/accuracy"] <= 1, err


def test_dry_run_prints_a_config_that_loads_and_the_layout(tmp_path, model, worker):
    tiny(tmp_path, model)
    arguments = ["train", "config.yaml", "parallel.ep=2", "name=dry", "--nproc-per-node=2", "--dry-run"]
    code, out, err = worker(command, tmp_path, *arguments)
    assert code == 0, err
    text, _, table = out.partition("\n\n")
    (tmp_path / "printed.yaml").write_text(text)
    assert load_config(tmp_path / "printed.yaml") == load_config(
        tmp_path / "config.yaml", ["parallel.ep=2", "name=dry"]
    )
    header, sizes, _, *ranks = [line.split() for line in table.splitlines()]
    assert header[-2:] == ["ep", "etp"] and sizes[-2:] == ["2", "1"] and len(ranks) == 2
    assert not (tmp_path / "runs").exists()


def test_a_reference_policy(tmp_path, model, worker):
    tiny(tmp_path, model, algorithm={"name": "grpo", "kl_coef": 0.1}, logging={"report": False})
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 0, err
    by_step = rows(tmp_path / "runs" / "run")
    assert abs(by_step[1]["policy/kl_ref"]) < 1e-9, "policy and reference are still the same"
    assert by_step[2]["policy/kl_ref"] > 1e-5


def test_ppo_tells_its_critic_and_what_is_held(tmp_path, model, worker):
    tiny(tmp_path, model, algorithm={"name": "ppo", "kl_coef": 0.1}, critic={"lr": 1e-3}, rollout={"temperature": 0.7})
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 0, err
    by_step = rows(tmp_path / "runs" / "run")
    held = {role: by_step[0][f"memory/{role}_parameters"] for role in ("policy", "reference", "critic")}
    config = json.loads((model / "config.json").read_text())
    assert held["policy"] == held["reference"]
    assert config["tie_word_embeddings"] and held["critic"] - held["policy"] == config["hidden_size"], "the score head"
    assert by_step[1]["critic/explained_variance"] == pytest.approx(0, abs=1e-6), "a new head gives 0 everywhere"
    assert by_step[2]["critic/explained_variance"] != 0
    assert by_step[1]["mismatch/k3"] < 1e-8, "the trainer divides its logits by the temperature too"
    assert 0.1 < by_step[1]["memory/trainer_peak_gb"] <= by_step[2]["memory/trainer_peak_gb"] < 20


def test_bfloat16(tmp_path, model, worker):
    sections = {"model": {"path": str(model), "dtype": "bfloat16"}, "weight_sync": {"max_logprob_diff": 2.0}}
    tiny(tmp_path, model, **sections)
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 0, err
    last = rows(tmp_path / "runs" / "run")[2]
    assert 1e-4 < last["weight_sync/logprob_max_diff"] < 2.0, "rounded differently on the two sides, and seen"


def test_sft_on_a_file(tmp_path, model, worker):
    """Four sentences are learnt by heart; the first loss is that of a random policy, about log 20."""
    digits = ["12", "345", "6", "7890"]
    lines = [json.dumps({"prompt": f"{d}=", "answer": d, "response": f"#{d}"}) for d in digits]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    config = tiny(tmp_path, model, steps=60, algorithm={"name": "sft"}, evaluate={"every": 0, "temperature": 0.0})
    config |= {"reward": "exact_match", "optimizer": {"lr": 1e-2}}
    config["data"] = {"task": "file", "train_file": "data.jsonl", "eval_file": "data.jsonl"}
    config["reward"] = "regex:^#"
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 0, err
    by_step = rows(tmp_path / "runs" / "run")
    assert by_step[1]["policy/loss"] == pytest.approx(torch.tensor(20.0).log().item(), abs=0.3)
    assert by_step[60]["policy/loss"] < 0.3
    assert by_step[0]["eval/accuracy"] < 0.5 and by_step[60]["eval/accuracy"] == 1.0
