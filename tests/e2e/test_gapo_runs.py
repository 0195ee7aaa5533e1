"""GAPO through the whole loop: a frozen discriminator is a reward model, a learning one never changes within a batch,
and a resumed run is the run that was not stopped.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from runs import Started, command, numbers, rows, tiny
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

CONSTRAINTS = {
    "data": {"task": "digit_constraints", "params": {}},
    "reward": "auto",
    "batch": {"mini_batches": 2},
    "rollout": {"max_response_tokens": 10},
}
SMALL = {"lr": 1e-3, "batch_size": 16, "warmup_steps": 3, "eval_examples": 8, "buffer_size": 24}
KINDS = ("real", "rejected", "fake")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, model):
    """The demo's backbone with a random head."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("classifier")
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32).save_pretrained(folder)
    return folder


def train(worker, folder, name, *overrides):
    code, out, err = worker(command, folder, "train", "config.yaml", f"name={name}", *overrides)
    assert code == 0, err
    return rows(folder / "runs" / name)


def test_a_frozen_discriminator_is_ppo_on_a_reward_model_bit_for_bit(tmp_path, model, worker, classifier):
    """Frozen by no updates, and by a band that it is always above."""
    tiny(tmp_path, model, steps=3, algorithm={"name": "ppo", "kl_coef": 0.01},
         reward_model={"path": str(classifier)}, **CONSTRAINTS)  # fmt: skip
    ppo = numbers(train(worker, tmp_path, "ppo"))
    assert len({row["reward/mean"] for row in ppo.values() if "reward/mean" in row}) == 3  # and it is not nothing
    for name, frozen in (("none", {"discriminator_steps": 0}), ("band", {"band_low": 0.0, "band_high": 0.0})):
        tiny(tmp_path, model, steps=3, algorithm={"name": "gapo", "normalise_reward": False} | frozen,
             discriminator=SMALL | {"path": str(classifier), "warmup_rounds": 0}, **CONSTRAINTS)  # fmt: skip
        gapo = numbers(train(worker, tmp_path, name))
        own = {key for row in gapo.values() for key in row if key.startswith("discriminator/")}
        assert gapo[3]["discriminator/updates"] == 0 and not any("train_" in key for key in own)
        ignored = {*own, "memory/discriminator_parameters", "memory/reward_model_parameters", "memory/trainer_peak_gb"}
        for step, row in ppo.items():
            assert without(gapo[step], ignored) == without(row, ignored)
    before, after = (load_file(f / "model.safetensors") for f in (classifier, tmp_path / "runs/none/hf_discriminator"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    exported = json.loads((tmp_path / "runs/none/hf_discriminator/config.json").read_text())
    assert exported["architectures"] == ["Qwen3MoeForSequenceClassification"]


def without(row, keys):
    return {key: value for key, value in row.items() if key not in keys}


def who_changes_when(folder: Path) -> list[tuple[str, str]]:
    """Every use of the discriminator and every update, with a digest of the discriminator's weights at its start."""
    from mcore_rl.config import load_config
    from mcore_rl.step import discriminating, judging, updating
    from mcore_rl.train import train

    os.chdir(folder)
    events, scored_by, optimise = [], [], updating.optimise

    def spied(original, name):
        def call(*args):
            if name == "score":  # of the discriminator
                scored_by.append(args[2])
            weights = [p.detach().numpy().tobytes() for c in scored_by[0].chunks for p in c.parameters()]
            what = args[5] if name == "update" else name  # of the model
            events.append((what, hashlib.sha256(b"".join(weights)).hexdigest()))
            return original(*args)

        return call

    with (
        patch.object(judging, "sequence_scores", spied(judging.sequence_scores, "score")),
        patch.object(updating, "optimise", spied(optimise, "update")),
        patch.object(discriminating, "optimise", spied(optimise, "update")),
    ):
        train(load_config("config.yaml"))
    return events


def test_no_batch_is_scored_by_two_versions(tmp_path, model, worker):
    """Scores, then the policy's updates, then the discriminator's: its new weights are first asked in the next step."""
    tiny(tmp_path, model, steps=3, algorithm={"name": "gapo", "discriminator_steps": 2, "band_high": 1.0},
         discriminator=SMALL | {"warmup_rounds": 1}, batch={"mini_batches": 2, "epochs": 2},
         **without(CONSTRAINTS, {"batch"}))  # fmt: skip
    events = worker(who_changes_when, tmp_path)
    warm_up, loop = events[:3], events[3:]
    assert [what for what, _ in warm_up] == ["score", "score", "discriminator"]
    versions = []
    for step in range(3):
        names, digests = zip(*loop[5 * step : 5 * step + 5])
        assert names == ("score", "score", "critic", "policy", "discriminator")  # generated and held-out ones scored
        assert len(set(digests)) == 1
        versions.append(digests[0])
    assert len(loop) == 15 and len({warm_up[0][1], *versions}) == 4


def test_resumed_run_is_the_whole_one(tmp_path, model, worker):
    """Weights and optimizer of the discriminator, buffer, normaliser, band, data cursor: all of them act in step 3."""
    sections = CONSTRAINTS | {"checkpoint": {"every": 2, "export_hf": False}}
    tiny(tmp_path, model, steps=4, algorithm={"name": "gapo", "baseline": "group"},
         discriminator=SMALL | {"warmup_rounds": 2, "warmup_accuracy": 0.99}, **sections)  # fmt: skip
    whole = numbers(train(worker, tmp_path, "run"))
    for key in ("accuracy", "real_score", "train_fake_score", "updates", "score_std", "loss"):
        assert len({row[f"discriminator/{key}"] for step, row in whole.items() if step}) > 2, key
    assert whole[0]["discriminator/warmup_rounds"] == 2
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints" / "step_000004")
    resumed = numbers(train(worker, tmp_path, "run", "resume=true"))
    assert resumed == whole


def test_two_ranks_with_pairs_learn_what_one_does(tmp_path, model, worker):
    sections = dict(
        steps=2,
        algorithm={"name": "gapo", "discriminator_objective": "bradley_terry", "discriminator_steps": 2},
        discriminator=SMALL | {"warmup_rounds": 1, "lr": 1e-4},
        **CONSTRAINTS,
    )
    tiny(tmp_path, model, **sections)
    one = train(worker, tmp_path, "one")
    config = tiny(tmp_path, model, name="two", parallel={"ep": 2, "timeout_s": 60}, **sections)
    with Started(tmp_path, config, ranks=2) as run:
        assert run.wait() == 0, run.err.read_text()
        assert "discriminator, warm-up 1: 0.500 right on held-out sequences\n" in run.out.read_text()
    two = rows(run.run_dir)
    scores = [f"discriminator/train_{kind}_score" for kind in KINDS]
    for name in ("discriminator/accuracy", "discriminator/loss", "reward/audit_mean", "policy/loss", *scores):
        assert one[1][name] == pytest.approx(two[1][name], abs=1e-4), name
    assert one[1]["discriminator/loss"] != one[2]["discriminator/loss"]
    for name in ("one", "two"):  # what they leave is a sequence classifier, whatever the layout
        scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / name / "hf_discriminator")
        assert scorer.num_labels == 1 and scorer.score.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"task": "digit_sort", "params": {"n": 6}}}, ["fake_share=0.5 asks for rejected", "fake_share=1"]),
        ({"data": {"task": "reasoning_gym/chain_sum", "params": {}}}, ["no reference responses"]),
        ({"discriminator": {"path": "nowhere"}}, ["discriminator.path='nowhere' does not exist"]),
        ({"discriminator": {"batch_size": 7}}, ["discriminator.batch_size=7", "multiple of 2"]),
        ({"discriminator": {"warm_up_rounds": 7}}, ["did you mean 'discriminator.warmup_rounds'"]),
        ({"reward_model": {"path": "classifier"}}, ["the discriminator is the reward"]),
        ({"rollout": {"max_response_tokens": 8}}, ["9 tokens", "rollout.max_response_tokens=8"]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_mistakes_are_refused_before_anything_starts(tmp_path, model, worker, classifier, sections, words):
    (tmp_path / "classifier").symlink_to(classifier)
    tiny(tmp_path, model, algorithm={"name": "gapo"}, **CONSTRAINTS | sections)
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 2 and err.startswith("error: ") and all(w in err for w in words), err
    assert not (tmp_path / "runs").exists()
