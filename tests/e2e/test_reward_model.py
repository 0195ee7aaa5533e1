"""A model as the reward: the loop gives every response the score that transformers gives its text."""

import os
import shutil
from pathlib import Path

import pytest
from runs import Started, command, rows, tiny

REWARD = {"reward_model": {"path": "classifier"}}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, model):
    """The demo's backbone with a random head, its tokenizer, and one of three labels beside it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("classifiers")
    for name, labels in (("classifier", 1), ("three", 3)):
        torch.manual_seed(1)
        scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels, dtype=torch.float32)
        scorer.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / name)
    shutil.copytree(folder / "classifier", folder / "foreign")
    tokenizer = (folder / "foreign" / "tokenizer.json").read_text()
    (folder / "foreign" / "tokenizer.json").write_text(
        tokenizer.replace('"7": 9', '"8": 9').replace('"8": 10', '"7": 10')
    )
    return folder


def compare_with_transformers(folder: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from mcore_rl.config import load_config
    from mcore_rl.planning.check import check_run_folder, make_plan
    from mcore_rl.run import open_run
    from mcore_rl.step.collecting import collect_rollouts, start_rollouts
    from mcore_rl.step.judging import model_rewards

    os.chdir(folder)
    seen = []
    config = load_config("config.yaml")
    check_run_folder(config)
    with open_run(make_plan(config, 1)) as run:
        generate = run.engine.generate
        run.engine.generate = lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1]
        started = start_rollouts(run.plan, run.groups, run.rollouts, run.start)
        sequences, _, metrics = collect_rollouts(run.plan, run.groups, run.models, run.rollouts, started)
        scored = model_rewards(run.plan, run.groups, run.models.reward_model, seen[0])
        rule = [run.plan.reward(g.prompt, t) for g in seen[0] for t in g.trajectories]
    rewards = torch.stack([g.rewards for g in scored])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    assert sequences.columns.advantages.tolist() == pytest.approx(advantages.flatten().tolist(), abs=1e-6)
    assert metrics["reward/mean"] == pytest.approx(rewards.mean().item()) and rewards.std() > 1e-2
    assert metrics["reward/audit_mean"] == pytest.approx(sum(rule) / 32)

    tokenizer = AutoTokenizer.from_pretrained("classifier")
    reference = AutoModelForSequenceClassification.from_pretrained("classifier", dtype=torch.float32).eval()
    # a text has no <pad>, which an untrained policy writes too
    pairs = [(g.prompt, t) for g in scored for t in g.trajectories if tokenizer.pad_token_id not in t.response_ids]
    assert len(pairs) > 8 and {t.finish_reason for _, t in pairs} == {"stop", "length"}
    for prompt, t in pairs:
        text = prompt.text + t.text + (tokenizer.eos_token if t.finish_reason == "stop" else "")
        with torch.no_grad():
            want = reference(**tokenizer(text, return_tensors="pt")).logits[0, 0].item()
        assert t.reward == pytest.approx(want, abs=1e-5)


def test_rewards_are_transformers_scores_of_the_texts(tmp_path, model, classifier, worker):
    shutil.copytree(classifier / "classifier", tmp_path / "classifier")
    tiny(tmp_path, model, rollout={"group_size": 8, "max_response_tokens": 24}, **REWARD)
    worker(compare_with_transformers, tmp_path)


def test_two_ranks_give_the_rewards_of_one_and_the_rule_stays_the_audit(tmp_path, model, classifier, worker):
    shutil.copytree(classifier / "classifier", tmp_path / "classifier")
    tiny(tmp_path, model, name="one", **REWARD)
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 0, err
    one = rows(tmp_path / "runs" / "one")
    config = tiny(tmp_path, model, name="two", parallel={"ep": 2, "timeout_s": 60}, **REWARD)
    with Started(tmp_path, config, ranks=2) as run:
        assert run.wait() == 0, run.err.read_text()
    two = rows(run.run_dir)
    for name in ("reward/mean", "reward/std", "reward/audit_mean", "eval/accuracy", "policy/loss"):
        assert one[1][name] == pytest.approx(two[1][name], abs=1e-5), name
    assert one[1]["reward/mean"] != one[1]["reward/audit_mean"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", ["reward_model.path='nowhere' does not exist"]),
        ("policy", ["Qwen3MoeForCausalLM, which has no score head", "ForSequenceClassification"]),
        ("three", ["num_labels=3", "num_labels=1"]),
        ("foreign", ["another tokenizer than the policy"]),
    ],
)
def test_what_is_no_reward_model_is_refused_before_anything_starts(tmp_path, model, classifier, worker, path, words):
    for name in ("three", "foreign"):
        shutil.copytree(classifier / name, tmp_path / name)
    shutil.copytree(model, tmp_path / "policy")
    tiny(tmp_path, model, reward_model={"path": path})
    code, _, err = worker(command, tmp_path, "train", "config.yaml")
    assert code == 2 and err.startswith("error: ") and all(w in err for w in words), err
    assert not (tmp_path / "runs").exists()
