"""Digits under constraints: the rule by hand, and what the generator promises."""

import random

import pytest

from mcore_rl.config import DataConfig
from mcore_rl.data.constraints import Constraints, Space, draw_answer
from mcore_rl.data.splits import EVAL, TRAIN, split_of
from mcore_rl.data.tasks import build_task
from mcore_rl.rollout.rewards import load_reward
from mcore_rl.types import Trajectory
from tools.make_demo_model import make_tokenizer

EVERYTHING = Constraints(6, order="+", forbidden="37", required="5")


@pytest.mark.parametrize(
    ("constraints", "answer", "broken"),
    [
        (EVERYTHING, "011255", ()),
        (EVERYTHING, "01125", ("length",)),
        (EVERYTHING, "0112559", ("length",)),
        (EVERYTHING, "011525", ("order",)),
        (EVERYTHING, "011355", ("forbidden",)),
        (EVERYTHING, "011266", ("required",)),
        (EVERYTHING, "73", ("length", "order", "forbidden", "required")),
        (EVERYTHING, "", ("digits",)),
        (EVERYTHING, "01125#", ("digits",)),
        (EVERYTHING, " 11255", ("digits",)),
        (Constraints(4, order="/"), "9911", ()),
        (Constraints(4, order="/"), "9912", ("order",)),
        (Constraints(4), "9192", ()),
        (Constraints(12, required="0"), "123456789012", ()),
    ],
)
def test_rule(constraints, answer, broken):
    assert constraints.broken(answer) == broken


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        (EVERYTHING, "6,+,-37,*5="),
        (Constraints(12), "12="),
        (Constraints(4, order="/", required="0"), "4,/,*0="),
        (Constraints(4, forbidden="019"), "4,-019="),
    ],
)
def test_prompt(constraints, text):
    assert constraints.text == text


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def task_of(tokenizer, seed=0, **params):
    return build_task(DataConfig(task="digit_constraints", params=params), tokenizer, seed)


def test_real_answers_meet_their_prompt_and_break_the_rejected_one(tokenizer):
    task = task_of(tokenizer)
    reward = load_reward("auto", task)
    held_out = task.eval_prompts(40)
    examples = [*map(task.real_example, range(200)), *task.eval_real_examples(40)]
    prompts = [*map(task.train_prompt, range(200)), *held_out]
    broken = set()
    for example, prompt in zip(examples, prompts, strict=True):
        assert example.prompt == prompt.token_ids and example.response[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(example.response[:-1])
        assert reward(prompt, Trajectory((), (), (), "stop", 0, text=text)) == 1
        assert reward(prompt, Trajectory((), (), (), "stop", 0, text=text + "0")) == 0
        ((other, same),) = example.rejected
        assert same == example.response and other != example.prompt
        fields = parse(tokenizer.decode(other))
        broken.update(fields.broken(text))
        assert fields.broken(text) and len(other) <= task.max_prompt_tokens
    assert broken == {"length", "order", "forbidden", "required"}
    assert task.sft_example(3) == (task.real_example(3).prompt, task.real_example(3).response)


def parse(text):
    length, *others = text.removesuffix("=").split(",")
    signs = {part[0]: part[1:] for part in others}
    order = next((sign for sign in "+/" if sign in signs), "")
    return Constraints(int(length), order, signs.get("-", ""), signs.get("*", ""))


def test_drawn_constraints_can_be_met_and_a_neighbour_differs_in_one():
    rng, space = random.Random(0), Space(range(4, 9), range(0, 4), order=True, required=True)
    for _ in range(300):
        constraints = space.draw(rng)
        assert parse(constraints.text) == constraints
        assert not constraints.broken(draw_answer(rng, constraints))
        for other in space.neighbours(rng, constraints):
            assert sum(a != b for a, b in zip(vars(constraints).values(), vars(other).values())) <= 1
            assert not set(other.forbidden) & set(other.required)


def test_a_prompt_alone_does_not_tell_that_it_is_rejected(tokenizer):
    """It asks for an order, a digit, and no more or fewer forbidden digits, exactly where the accepted one does."""

    def asks_for(prompt):
        c = parse(tokenizer.decode(prompt))
        return bool(c.order), len(c.forbidden), bool(c.required)

    examples = list(map(task_of(tokenizer).real_example, range(300)))
    patterns = {asks_for(e.prompt) for e in examples}
    assert len(patterns) > 12 and all(asks_for(e.prompt) == asks_for(e.rejected[0][0]) for e in examples)


def test_parameters_say_what_prompts_ask_for(tokenizer):
    params = dict(min_length=4, max_length=4, min_forbidden=2, max_forbidden=6, order=False, required=False)
    task = task_of(tokenizer, **params)
    asked = [parse(p.text) for p in [*map(task.train_prompt, range(300)), *task.eval_prompts(100)]]
    assert {len(c.forbidden) for c in asked} == {2, 3, 4, 5, 6}
    assert {(c.length, c.order, c.required) for c in asked} == {(4, "", "")}
    assert task.max_prompt_tokens == len("4,-012345=") == max(len(c.text) for c in asked)
    assert task_of(tokenizer).max_prompt_tokens == len("8,+,-012,*9=")


def test_no_evaluation_prompt_is_trained_on_not_even_as_a_rejected_one(tokenizer):
    one, other = (task_of(tokenizer, seed) for seed in (0, 1))
    trained = {p for i in range(500) for e in [one.real_example(i)] for p in (e.prompt, e.rejected[0][0])}
    held_out = {p.token_ids for task in (one, other) for p in task.eval_prompts(200)}
    assert len(trained) > 500 and len(held_out) > 200 and not trained & held_out
    assert {split_of(tokenizer.decode(p), one_in=8) for p in trained} == {TRAIN}
    assert {split_of(tokenizer.decode(p), one_in=8) for p in held_out} == {EVAL}
    assert [one.real_example(i) for i in (5, 2)] == [task_of(tokenizer).real_example(i) for i in (5, 2)]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"min_length": 1}, "2 <= min_length"),
        ({"min_length": 9}, "min_length=9 and max_length=8"),
        ({"max_length": "8"}, "max_length='8'"),
        ({"length": 8}, "data.params.length is unknown"),
        ({"min_forbidden": 4}, "min_forbidden=4 and max_forbidden=3"),
        ({"max_forbidden": 9}, "max_forbidden=9.*<= 8"),
        ({"order": "yes"}, "data.params.order='yes': must be true or false"),
    ],
)
def test_bad_parameters(tokenizer, params, words):
    with pytest.raises(ValueError, match=words):
        task_of(tokenizer, **params)
