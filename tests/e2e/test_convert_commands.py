"""The converters on what a run leaves, and a run on what the converters make."""

import json

import torch
from runs import Started, command, numbers, rows, tiny
from safetensors.torch import load_file

PPO = {"algorithm": {"name": "ppo"}, "critic": {"lr": 1e-3}}
EP2 = {"parallel": {"ep": 2, "distributed_optimizer": True, "timeout_s": 400}}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_from_training_and_into_training(tmp_path, model, worker):
    with Started(tmp_path, tiny(tmp_path, model, steps=1, **PPO, **EP2), ranks=2) as run:
        assert run.wait(400) == 0, run.err.read_text()
    checkpoints = run.run_dir / "checkpoints"

    # hf/ is the export of the live model, over two ranks; the converter reads the files that Megatron wrote
    code, _, err = worker(command, tmp_path, "convert", str(checkpoints), "out", "--to", "hf")
    assert code == 0, err
    assert contents(tmp_path / "out") == contents(run.run_dir / "hf")

    # the critic is a model of its own, with a score head
    critic = checkpoints / "step_000001" / "critic"
    code, _, err = worker(command, tmp_path, "convert", str(critic), "critic", "--to", "hf", "--dtype", "bfloat16")
    assert code == 0, err
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForSequenceClassification"] and config["dtype"] == "bfloat16"
    head = load_file(tmp_path / "critic" / "model.safetensors")["score.weight"]
    assert head.shape == (1, 64) and head.dtype is torch.bfloat16 and head.any()
    code, out, _ = worker(command, tmp_path, "verify", "critic", str(critic))
    assert code == 1 and "is torch.bfloat16 and torch.float32, the values are the same when rounded" in out

    # a run starts from a Megatron checkpoint as it does from the folder it was made of
    options = ["--to", "megatron", "--tp", "2", "--pp", "3", "--ep", "4"]
    assert worker(command, tmp_path, "convert", "out", "megatron", *options)[0] == 0
    assert worker(command, tmp_path, "verify", "megatron", str(checkpoints))[0] == 0
    for name in ("out", "megatron"):
        tiny(tmp_path, tmp_path / name, name=f"from_{name}", steps=1, checkpoint={"export_hf": name == "out"})
        code, _, err = worker(command, tmp_path, "train", "config.yaml")
        assert code == 0, err
    first, second = (numbers(rows(tmp_path / "runs" / f"from_{name}")) for name in ("out", "megatron"))
    assert first == second and set(first) == {0, 1}
    code, _, err = worker(command, tmp_path, "generate", "megatron", "12=")
    assert code == 2 and "is a Megatron checkpoint, which vLLM cannot read" in err and "--to hf" in err
