import sys
import threading

import numpy as np
import pytest

from mcore_rl.config import DataConfig
from mcore_rl.data.task import Task
from mcore_rl.data.tasks import build_task
from mcore_rl.rollout.rewards import load_reward
from mcore_rl.types import Prompt, Trajectory
from tools.make_demo_model import make_tokenizer


def said(text: str) -> Trajectory:
    return Trajectory((), (), (), finish_reason="stop", versions=0, text=text)


class OneAnswer(Task):
    """A task of a single prompt."""

    name = "one"

    def __init__(self, answer):
        self.prompt = Prompt("one/0", (1,), "?", answer, {"solution": "42"})

    def train_prompt(self, index):
        return self.prompt


def rewarded(spec, answer, text) -> float:
    task = OneAnswer(answer)
    return load_reward(spec, task)(task.prompt, said(text))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    def write(body: str, name: str = "my_reward") -> None:
        (tmp_path / f"{name}.py").write_text(body)
        sys.modules.pop(name, None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return write


def test_exact_match_takes_the_tasks_part_of_the_response():
    task = build_task(DataConfig(params={"n": 4}), make_tokenizer(), 0)
    reward, prompt = load_reward("exact_match", task), task.train_prompt(0)
    assert reward(prompt, said(f"#{prompt.answer}")) == 1.0
    assert reward(prompt, said(f"#9#{prompt.answer}")) == 1.0
    assert reward(prompt, said(prompt.answer)) == 0.0
    assert reward(prompt, said(f"#{prompt.answer}1")) == 0.0
    assert rewarded("exact_match", " Paris", "Paris \n") == 1.0
    assert rewarded("exact_match", 12, "12") == 1.0


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("1/2", "so it is $\\frac{1}{2}$", 1.0),
        ("1/2", "\\boxed{0.5}", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("1/2", "\\boxed{0.51}", 0.0),
        ("1/2", "I do not know", 0.0),
    ],
)
def test_math_verify(answer, text, value):
    gold = f"${answer}$"
    assert rewarded("math_verify", gold, text) == value


def test_math_verify_works_in_any_thread():
    values = []
    thread = threading.Thread(target=lambda: values.append(rewarded("math_verify", "$1/2$", "$0.5$")))
    thread.start()
    thread.join(timeout=60)
    assert values == [1.0]


def test_math_verify_refuses_answers_that_are_no_mathematics():
    with pytest.raises(ValueError, match="'math_verify' on prompt 'one/0'.*answer 'Paris' is not a mathematical"):
        rewarded("math_verify", "Paris", "$1$")


def test_regex_searches_the_whole_response():
    pattern = r"regex:\A<think>.*</think>\s*<answer>.+</answer>\Z"
    assert rewarded(pattern, None, "<think>a\nb</think> <answer>1</answer>") == 1.0
    assert rewarded(pattern, None, "<answer>1</answer>") == 0.0


def test_rewards_of_a_list_are_added(user_module):
    user_module("def half(prompt, trajectory):\n    return 0.5 * len(trajectory.text)\n")
    assert rewarded(["exact_match", "regex:4", "my_reward:half"], "42", "42") == 1.0 + 1.0 + 1.0


def test_auto_is_the_tasks_choice():
    class Scored(OneAnswer):
        reward_default = "reasoning_gym"

        def score(self, prompt, response):
            return len(response) / 10

    task = Scored("1")
    assert load_reward("auto", task)(task.prompt, said("abc")) == 0.3
    assert rewarded("auto", "1", "1") == 1.0  # exact_match


@pytest.mark.parametrize("value", ["1", "True", "np.float32(1)", "np.int64(1)"])
def test_any_finite_number_is_a_reward(user_module, value):
    user_module(f"import numpy as np\ndef f(prompt, trajectory):\n    return {value}\n")
    got = rewarded("my_reward:f", None, "x")
    assert got == 1.0
    assert type(got) is float
    assert np.isfinite(got)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return float('nan')", r"returned nan \(float\)"),
        ("return float('inf')", r"returned inf"),
        ("return 'high'", r"returned 'high' \(str\)"),
        ("return None", r"returned None"),
        ("return [1.0]", r"returned \[1.0\]"),
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_reward_names_function_prompt_response_and_value(user_module, body, message):
    user_module(f"def f(prompt, trajectory):\n    {body}\n")
    with pytest.raises(ValueError, match=f"reward 'my_reward:f' on prompt 'one/0', response 'hello': {message}"):
        rewarded("my_reward:f", None, "hello")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_mach", "did you mean 'exact_match'"),
        ("regex:(", "does not compile"),
        ("no_such_module_here:f", "cannot be imported"),
        ("json:dumsp", "no function 'dumsp'; did you mean 'dump"),
        ([], "empty"),
        ("reasoning_gym", "no scorer of its own"),
    ],
)
def test_mistakes_are_named_before_anything_runs(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec, OneAnswer("1"))


def test_a_module_that_does_not_parse(user_module):
    user_module("def f(:\n")
    with pytest.raises(ValueError, match="my_reward.*cannot be imported"):
        load_reward("my_reward:f", OneAnswer("1"))


@pytest.mark.parametrize("spec", ["exact_match", "math_verify"])
def test_rewards_that_compare_need_answers(spec):
    with pytest.raises(ValueError, match=r"set data.answer_key .*\(other keys there: solution\)"):
        load_reward(spec, OneAnswer(None))
