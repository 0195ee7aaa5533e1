import os
import subprocess
import sys

import pytest

from mcore_rl.config import DataConfig
from mcore_rl.data.tasks import build_task
from tools.make_demo_model import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class CharacterTokenizer:
    """Stands in for a byte-level tokenizer of a real model: every text can be encoded, there is no chat template."""

    eos_token_id = 0
    chat_template = None

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]

    def num_special_tokens_to_add(self):
        return 0


def test_digit_sort_answer_and_reference_response(tokenizer):
    task = build_task(DataConfig(params={"n": 5}), tokenizer, seed=0)
    prompt = task.train_prompt(7)
    digits, equals = prompt.text[:-1], prompt.text[-1]
    assert (len(digits), equals) == (5, "=")
    assert prompt.answer == "".join(sorted(digits))
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    prompt_ids, response_ids = task.sft_example(7)
    assert prompt_ids == prompt.token_ids
    assert tokenizer.decode(response_ids[:-1]) == f"#{prompt.answer}"
    assert response_ids[-1] == tokenizer.eos_token_id
    assert task.max_prompt_tokens == len(prompt.token_ids) == 6


def test_prompts_are_functions_of_seed_and_index(tokenizer):
    one, same, other = (build_task(DataConfig(), tokenizer, seed) for seed in (3, 3, 4))
    assert [one.train_prompt(i) for i in (9, 2, 9)] == [same.train_prompt(i) for i in (9, 2, 9)]
    assert one.eval_prompts(20)[:5] == same.eval_prompts(5)
    assert one.train_prompt(0) != other.train_prompt(0)
    assert len({one.train_prompt(i).text for i in range(200)}) == 200


def test_evaluation_prompts_are_never_trained_on_whatever_the_seed(tokenizer):
    def task(seed):
        return build_task(DataConfig(params={"n": 3}), tokenizer, seed)

    # 3 digits have 1,000 prompts: drawing 4,000 would meet nearly all of them
    trained = {task(seed).train_prompt(i).text for seed in (0, 1) for i in range(4000)}
    held_out = {p.text for seed in (0, 1) for p in task(seed).eval_prompts(1000)}
    assert len(trained) > 700
    assert len(held_out) > 80
    assert not trained & held_out


def test_digit_sort_of_several_lengths(tokenizer):
    task = build_task(DataConfig(task="digit_sort", params={"n": 6, "min_n": 4}), tokenizer, seed=0)
    lengths = [len(task.train_prompt(i).answer) for i in range(100)]
    assert set(lengths) == {4, 5, 6} and max(len(task.train_prompt(i).token_ids) for i in range(100)) == 7
    with pytest.raises(ValueError, match="min_n=7: must be a whole number of digits between 2 and n=6"):
        build_task(DataConfig(task="digit_sort", params={"n": 6, "min_n": 7}), tokenizer, seed=0)


def test_digit_sort_extracts_what_follows_the_last_hash(tokenizer):
    task = build_task(DataConfig(), tokenizer, 0)
    assert task.extract_answer("#12#0123 ") == "0123"
    assert task.extract_answer("0123") is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dict(task="digitsort"), "digit_sort"),
        (dict(task="reasoning_gym/chain_sums"), "chain_sum"),
        (dict(params={"m": 3}), "data.params.m is unknown"),
        (dict(params={"n": 1}), "between 2 and 512"),
        (dict(params={"n": "8"}), "data.params.n='8'"),
        (dict(max_prompt_tokens=16), "take up to 17 tokens, the limit is 16"),
        (dict(task="reasoning_gym/chain_sum", params={"max_term": 3}), "max_terms"),
        (dict(task="reasoning_gym/chain_sum", params={"min_terms": -1}), "min_terms must be positive"),
        (dict(task="reasoning_gym/word_ladder"), "PYTHONHASHSEED=0"),
        (dict(task="file"), "data.train_file"),
    ],
)
def test_mistakes_are_named(tokenizer, monkeypatch, data, message):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match=message):
        build_task(DataConfig(**data), tokenizer, 0)


def test_the_model_bounds_prompts_too(tokenizer):
    with pytest.raises(ValueError, match="the limit is 12"):
        build_task(DataConfig(), tokenizer, 0, max_model_tokens=12)


def test_reasoning_gym_is_split_scored_and_bounded():
    data = DataConfig(task="reasoning_gym/chain_sum", params={"max_terms": 3}, max_prompt_tokens=75)
    task = build_task(data, CharacterTokenizer(), 0)
    trained, held_out = [task.train_prompt(i) for i in range(60)], task.eval_prompts(20)
    assert trained == [build_task(data, CharacterTokenizer(), 0).train_prompt(i) for i in range(60)]
    assert max(len(p.token_ids) for p in trained + held_out) <= 75
    assert not {p.text for p in trained} & {p.text for p in held_out}
    prompt = trained[0]
    assert task.score(prompt, prompt.answer) == 1.0
    assert task.score(prompt, f"well <answer> {prompt.answer} </answer> yes") == 1.0
    assert task.score(prompt, "<answer>no</answer>") < 1.0
    with pytest.raises(ValueError, match="no reference responses"):
        task.sft_example(0)


def test_reasoning_gym_scorers_that_raise_give_nothing():
    task = build_task(DataConfig(task="reasoning_gym/prime_factorization"), CharacterTokenizer(), 0)
    with pytest.raises(ValueError, match="invalid literal"):
        task.scorer.score_answer("abc", task.train_prompt(0).metadata["entry"])
    assert task.score(task.train_prompt(0), "abc") == 0.0


def test_reasoning_gym_says_when_no_prompt_fits():
    task = build_task(DataConfig(task="reasoning_gym/chain_sum", max_prompt_tokens=5), CharacterTokenizer(), 0)
    with pytest.raises(ValueError, match="at most 5 tokens was found.*raise data.max_prompt_tokens"):
        task.train_prompt(0)


def test_composite_reasoning_gym_task():
    datasets = [{"name": "gcd", "weight": 2.0}, {"name": "lcm"}]
    data = DataConfig(task="reasoning_gym/composite", params={"datasets": datasets})
    task = build_task(data, CharacterTokenizer(), 0)
    prompts = [task.train_prompt(i) for i in range(40)]
    assert {p.metadata["entry"]["metadata"]["source_dataset"] for p in prompts} == {"gcd", "lcm"}
    assert all(task.score(p, p.answer) == 1.0 for p in prompts)


ALL_TASKS = """
import hashlib
from mcore_rl.config import DataConfig
from mcore_rl.data.tasks import ReasoningGym, _gym_names, build_task
from tests.unit.test_tasks import CharacterTokenizer
for name in _gym_names():
    if name == "composite": continue
    task = build_task(DataConfig(task="reasoning_gym/" + name, max_prompt_tokens=100_000), CharacterTokenizer(), 5)
    prompts = [task.train_prompt(i) for i in range(3)] + task.eval_prompts(1)
    assert all(0 <= task.score(p, "no answer") <= 1 for p in prompts), name
    answered = [p for p in prompts if isinstance(p.answer, str)]
    assert all(task.score(p, p.answer) > 0.9 for p in answered), (name, [task.score(p, p.answer) for p in answered])
    stable = name not in ReasoningGym.hash_dependent
    print(name, hashlib.sha256(repr(prompts).encode()).hexdigest() if stable else "", flush=True)
"""


@pytest.mark.slow
def test_every_reasoning_gym_task_loads_and_repeats_in_another_process():
    def listing(hash_seed):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", ALL_TASKS], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return [line for line in done.stdout.splitlines() if line]

    first, second = listing("1"), listing("2")
    assert len(first) > 100
    assert first == second
