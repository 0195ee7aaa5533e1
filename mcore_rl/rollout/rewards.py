"""Rewards: a number for a response, by name, by pattern, or by any Python function `module:function`."""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
import os
import re
import sys
import threading
from collections.abc import Callable

from mcore_rl.data.task import Task
from mcore_rl.types import Prompt, Trajectory

Reward = Callable[[Prompt, Trajectory], float]
MATH_TIMEOUT_S = 5  # for parsing and for comparing one response


def load_reward(spec: str | list[str], task: Task) -> Reward:
    """The reward function that `spec` names; a list is the sum of its rewards.

    `auto` is the task's own choice; `exact_match` compares the extracted answer as text, `math_verify` as mathematics;
    `task_score` is the task's scorer, by its older name `reasoning_gym`; `regex:PATTERN` is 1 where the pattern is
    found in the response (`.` matches line ends too); `module:function` is called as f(prompt, trajectory).

    The returned function raises ValueError where a reward raises or returns anything but a finite number, naming the
    reward, the prompt, the response and the value.

    Raises:
        ValueError: unknown name (names the nearest), a pattern that does not compile, a function that cannot be
            imported, a reward that needs answers on prompts without any.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if not specs:
        raise ValueError("reward=[] is empty; name at least one reward, for example exact_match")
    rewards = [_checked(name, _load(name, task)) for name in specs]
    if len(rewards) == 1:
        return rewards[0]
    return lambda prompt, trajectory: sum(reward(prompt, trajectory) for reward in rewards)


def exact_match(task: Task) -> Reward:
    """1 where the extracted answer is the prompt's answer, both without surrounding white space."""
    _require_answers("exact_match", task)
    return lambda prompt, trajectory: float(task.extract_answer(trajectory.text) == str(prompt.answer).strip())


def math_verify(task: Task) -> Reward:
    """1 where the response's final expression equals the answer mathematically (library math-verify)."""
    _require_answers("math_verify", task)
    from math_verify import parse, verify

    def reward(prompt: Prompt, trajectory: Trajectory) -> float:
        # the library keeps time with SIGALRM, which only the main thread may use; elsewhere it would fail in silence
        timeout = MATH_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
        gold = parse(str(prompt.answer), parsing_timeout=timeout)
        if not gold:
            raise ValueError(f"answer {prompt.answer!r} is not a mathematical expression; use exact_match")
        target = parse(trajectory.text, parsing_timeout=timeout)
        return float(verify(gold, target, timeout_seconds=timeout))

    return reward


def task_score(task: Task) -> Reward:
    """The task's own scorer, in reasoning-gym usually in [0, 1] with partial credit."""
    task.score(task.train_prompt(0), "")  # a task without a scorer says so before anything starts
    return lambda prompt, trajectory: task.score(prompt, trajectory.text)


BUILT_IN: dict[str, Callable[[Task], Reward]] = {
    "exact_match": exact_match,
    "math_verify": math_verify,
    "reasoning_gym": task_score,
    "task_score": task_score,
}


def _load(spec: str, task: Task) -> Reward:
    spec = task.reward_default if spec == "auto" else spec
    if spec in BUILT_IN:
        return BUILT_IN[spec](task)
    kind, colon, rest = spec.partition(":")
    if kind == "regex" and colon:
        return _regex(rest)
    if colon:
        return _import_function(spec, kind, rest)
    names = ["auto", *BUILT_IN, "regex:PATTERN", "module:function"]
    near = difflib.get_close_matches(spec, names, n=1, cutoff=0.0)[0]
    raise ValueError(f"reward {spec!r} is unknown; did you mean {near!r}? allowed: {', '.join(names)}")


def _regex(pattern: str) -> Reward:
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward regex:{pattern}: the pattern does not compile: {error}") from error
    return lambda prompt, trajectory: float(compiled.search(trajectory.text) is not None)


def _import_function(spec: str, module: str, name: str) -> Reward:
    if os.getcwd() not in sys.path:  # a console script does not see the user's folder, `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        namespace = vars(importlib.import_module(module))
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"reward {spec!r}: module {module!r} cannot be imported: {error}; "
            f"put it into the working folder {os.getcwd()!r} or on PYTHONPATH"
        ) from error
    function = namespace.get(name)
    if not callable(function):
        functions = [key for key, value in namespace.items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, functions, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}?" if near else "it defines no function"
        raise ValueError(f"reward {spec!r}: module {module!r} has no function {name!r}; {hint}")
    return function


def _checked(spec: str, reward: Reward) -> Reward:
    def checked(prompt: Prompt, trajectory: Trajectory) -> float:
        where = f"reward {spec!r} on prompt {prompt.id!r}, response {trajectory.text[:80]!r}"
        try:
            value = reward(prompt, trajectory)
        except Exception as error:  # noqa: BLE001  the user's function may raise anything; the run ends with this message
            raise ValueError(f"{where}: raised {type(error).__name__}: {error}") from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{where}: returned {value!r} ({type(value).__name__}); it must return a finite number")
        return float(value)

    return checked


def _require_answers(name: str, task: Task) -> None:
    prompt = task.train_prompt(0)
    if prompt.answer is None:
        raise ValueError(
            f"reward {name!r} compares with an answer and prompt {prompt.id!r} has none; "
            f"set data.answer_key to the key that holds it (other keys there: {', '.join(prompt.metadata) or 'none'})"
        )
