"""Mistakes and accidents of a run: what the user is told, how it exits, and that nothing is left behind."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import Started, assert_nothing_left, command, rows, tiny

EP2 = {"parallel": {"ep": 2, "timeout_s": 60}}
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
LONG_GENERATION = {"rollout": {"group_size": 32, "max_response_tokens": 400}, "steps": 1000}


MISTAKES = {
    "model.path=nowhere": ["model.path='nowhere' does not exist", "Hugging Face folder"],
    "model.path=bert": ["BertForMaskedLM", "supported: Qwen3MoeForCausalLM"],
    "model.path=lacking": ["lacks tensors", "model.layers.0.mlp.experts.0.gate_proj.weight"],
    "parallel.ep=2": ["parallel.ep*etp=2*1 must divide", "tp*cp*dp=1*1*1=1", "start more ranks"],
    "parallel.ep=2 parallel.pp=3 --nproc-per-node=2": [
        "2 ranks cannot hold parallel.tp*pp*cp=1*3*1=3",
        "multiple of 3",
    ],
    "parallel.ep=3 --nproc-per-node=3": ["parallel.ep=3 must divide the model's num_experts=16", "1, 2, 4, 8, 16"],
    "batch.prompts=3 modle.path=x steps=0 rollout.temperature=hot": [
        "unknown key 'batch.prompts'; did you mean 'batch.prompts_per_step'",
        "unknown key 'modle'; did you mean 'model'",
        "steps=0: Input should be greater than or equal to 1",
        "rollout.temperature='hot': Input should be a valid number",
    ],
    "algorithm.name=grpo algorithm.clip=0.1": ["'grpo' has no field 'clip'; did you mean 'clip_low'"],
    "algorithm.name=grp": ["unknown algorithm 'grp'; did you mean 'grpo'"],
    "reward=tiny_rewards:nothing": ["has no function 'nothing'", "did you mean"],
    "data.task=file data.train_file=empty.jsonl": ["'empty.jsonl' is empty", "one object a line"],
    "data.task=file data.train_file=broken.jsonl": ["broken.jsonl:2: malformed JSON", "one JSON object"],
    "data.task=file data.train_file=bare.jsonl reward=auto": ["'bare.jsonl:1' has none", "set data.answer_key"],
    "data.task=file data.train_file=long.jsonl": ["long.jsonl:2: prompt has 2000 tokens", "1016", "shorten"],
    "data.task=digit_sort data.max_prompt_tokens=5": ["take up to 17 tokens, the limit is 5", "lower data.params.n"],
    "rollout.max_response_tokens=1024": ["leaves no room for a prompt", "1024 positions", "lower it"],
    "rollout.max_model_len=3": ["rollout.max_model_len=3", "longest prompt (3 tokens)", "1024 positions"],
    "rollout.stop_token_ids=[3,99]": ["rollout.stop_token_ids=[99]", "0..19"],
    "batch.mini_batches=9": ["batch.mini_batches=9", "8 samples", "raise batch.prompts_per_step"],
    "optimizer.min_lr=1": ["optimizer.min_lr=1: must be at most optimizer.lr=0.001"],
    "name=old": ["runs/old' already holds a run", "resume=true", "another name"],
    "output_dir=/proc/none": ["'/proc/none/new' cannot be made", "choose another output_dir"],
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, model):
    """A folder of things that are wrong, and of a config that is right."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("mistakes")

    tiny(
        folder,
        model,
        name="new",
        data={"task": "file", "params": {}, "train_file": "good.jsonl", "eval_file": "good.jsonl"},
    )
    config = (folder / "config.yaml").read_text().replace("n: 6", "")
    (folder / "config.yaml").write_text(config)
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"architectures": ["BertForMaskedLM"], "model_type": "bert"}')
    shutil.copytree(model, folder / "lacking")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.experts.0.gate_proj.weight"]
    save_file(weights, folder / "lacking" / "model.safetensors", metadata={"format": "pt"})
    good = json.dumps({"prompt": "12=", "answer": "12"})
    (folder / "good.jsonl").write_text(good + "\n")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text(good + '\n{"prompt": "34=",\n')
    (folder / "bare.jsonl").write_text('{"prompt": "12="}\n')
    (folder / "long.jsonl").write_text(good + "\n" + json.dumps({"prompt": "1" * 2000, "answer": "1"}) + "\n")
    (folder / "runs" / "old").mkdir(parents=True)
    (folder / "runs" / "old" / "metrics.jsonl").write_text('{"step": 0}\n')
    return folder


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_answered_in_words_before_anything_starts(mistakes, worker, arguments):
    code, out, err = worker(command, mistakes, "train", "config.yaml", *arguments.split())
    assert code == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err, (code, out, err)
    assert err.count("\n") <= 5
    for words in MISTAKES[arguments]:
        assert words in err
    assert not (mistakes / "runs" / "new").exists(), "a refused run leaves no folder"


def test_a_reward_that_is_no_number_ends_the_run(tmp_path, model, worker):
    tiny(tmp_path, model, reward="tiny_rewards:nan")
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and "on prompt 'digit_sort/" in line and "returned nan (float)" in line


def test_a_corrupted_expert_is_named_at_the_sync(tmp_path, model, worker):
    tiny(tmp_path, model)
    code, _, err = worker(train_with_a_corrupted_expert, tmp_path)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and f"{EXPERT} arrived with other bits than the trainer has" in line
    assert set(rows(tmp_path / "runs" / "run")) == {0}, "the step with wrong weights is not logged"


def train_with_a_corrupted_expert(folder: Path) -> tuple[int, str, str]:
    """From the second sync on, one projection of one expert arrives with noise."""
    from mcore_rl.weights.sync import WeightExporter

    write_into, syncs = WeightExporter.write_into, []

    def corrupting(self, targets):
        checksums = write_into(self, targets)
        syncs.append(1)
        if len(syncs) > 1:
            (expert,) = [target.view for target in targets if target.hf_name == EXPERT]
            expert.add_(expert.std() * (expert.detach().clone().normal_()))
        return checksums

    WeightExporter.write_into = corrupting
    try:
        return command(folder, "train", "config.yaml", "optimizer.lr=1e-9")
    finally:
        WeightExporter.write_into = write_into


WRONG_USE = [{"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, {"rms_norm_eps": 1e-2}]


@pytest.mark.parametrize("engine_config", WRONG_USE, ids=lambda config: next(iter(config)))
def test_right_weights_that_are_used_wrongly_are_found_by_the_probe(tmp_path, model, worker, engine_config):
    """Every bit is the trainer's, every matrix packed rightly; only the log-probs tell."""
    tiny(tmp_path, model)
    code, _, err = worker(train_with_another_engine, tmp_path, model, engine_config)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and "weight sync of policy version 0 is wrong: on two probes of 2 sequences" in line
    assert "allowed is weight_sync.max_logprob_diff=0.001" in line
    assert rows(tmp_path / "runs" / "run") == {}


def train_with_another_engine(folder: Path, model: Path, engine_config: dict) -> tuple[int, str, str]:
    """The engine has the trainer's weights under another config.json."""
    from mcore_rl import run

    open_engine, other = run.open_engine, shutil.copytree(model, folder / "other")
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | engine_config))
    run.open_engine = lambda *args, **options: open_engine(*args, **options | {"model_path": str(other)})
    try:
        return command(folder, "train", "config.yaml")
    finally:
        run.open_engine = open_engine


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB on the checkpoint folder of the run: room for one checkpoint of 11 MB."""
    folder = tmp_path / "runs" / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_at_a_checkpoint(tmp_path, model, worker, small_disk):
    tiny(tmp_path, model, steps=3, checkpoint={"every": 1, "export_hf": False})
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert_disk_full(code, [line for line in err.splitlines() if line.startswith("error: ")], small_disk)
    # the checkpoint before it loads: the run continues after step 1, into the same trouble
    code, out, err = worker(command, tmp_path, "train", "config.yaml", "resume=true")
    assert code == 1 and "run: continues after step 1\n" in out
    assert set(rows(tmp_path / "runs" / "run")) == {0, 1, 2}


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_of_two_ranks(tmp_path, model, small_disk):
    config = tiny(tmp_path, model, steps=3, checkpoint={"every": 1, "export_hf": False}, **EP2)
    with Started(tmp_path, config, ranks=2) as run:
        assert_disk_full(run.wait(), run.errors(), small_disk)
        assert_nothing_left(run, set())


def assert_disk_full(code: int, lines: list[str], folder: Path) -> None:
    (line,) = lines
    assert code == 1 and f"checkpoint '{folder}/step_000002' cannot be written: disk full, 0 bytes are free" in line
    assert [path.name for path in folder.iterdir()] == ["step_000001"]


# --- runs in processes of their own


def test_a_reward_that_raises_in_a_run_of_two_ranks(tmp_path, model):
    with Started(tmp_path, tiny(tmp_path, model, reward="tiny_rewards:raises", **EP2), ranks=2) as run:
        assert run.wait() == 2, run.err.read_text()
        assert_nothing_left(run, set())
        (line,) = run.errors()
        assert "on prompt 'digit_sort/" in line and "raised KeyError: 'no such thing'" in line
        assert "Traceback" not in run.err.read_text()


def test_a_killed_engine_ends_the_run_with_the_cause(tmp_path, model):
    with Started(tmp_path, tiny(tmp_path, model, **EP2, **LONG_GENERATION), ranks=2) as run:
        run.wait_for_step(1)
        engine, shared = run.engine(), run.shared_files()
        engine.kill()
        started = time.monotonic()
        assert run.wait(30) == 1
        assert time.monotonic() - started < 15
        assert_nothing_left(run, shared)
        (line,) = run.errors()
        assert f"the engine's process {engine.pid} died during" in line and "killed by SIGKILL" in line
        assert "Traceback" not in run.err.read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path, model):
    config = tiny(tmp_path, model, **LONG_GENERATION, parallel={"ep": 2, "timeout_s": 20})
    with Started(tmp_path, config, ranks=2) as run:
        run.wait_for_step(1)
        shared = run.shared_files()
        run.rank(1).suspend()
        started = time.monotonic()
        assert run.wait(120) == 1
        assert time.monotonic() - started < 20 + 30 + 20, "the limit, what torchrun gives a rank to end, and the rest"
        assert_nothing_left(run, shared)
        (line,) = run.errors()
        assert "rank 0 lost rank 1, which does not answer, in a collective (limit 20 s)" in line
        assert "Traceback" not in run.err.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_launcher_takes_everything_with_it(tmp_path, model, number):
    with Started(tmp_path, tiny(tmp_path, model, **EP2, **LONG_GENERATION), ranks=2) as run:
        run.wait_for_step(0)
        assert len(run.processes()) >= 4, "launcher, two ranks, engine"
        shared = run.shared_files()
        os.kill(run.process.pid, number)
        assert run.wait(30) == 128 + number
        assert_nothing_left(run, shared)
        assert f"error: stopped by {number.name}" in run.errors()
        assert "Traceback" not in run.err.read_text()
