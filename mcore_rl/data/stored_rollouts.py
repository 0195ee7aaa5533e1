"""Rollouts on disk as the arrays that they are: what a checkpoint keeps of batches that wait to be trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from mcore_rl.data.real_fake import Fake
from mcore_rl.types import Prompt, RolloutGroup, Trajectory

PER_TOKEN = ("prompt_ids", "response_ids", "rollout_logprobs", "versions", "loss_mask")
FACTS = ("finish_reason", "text", "reward", "rule_reward")


def write_rollouts(
    path: Path, groups: Mapping[str, Sequence[RolloutGroup]], fakes: Mapping[str, Sequence[Fake]]
) -> None:
    """Named lists of groups, without answers, and of generated responses, into one safetensors file."""
    trajectories = [t for of_name in groups.values() for g in of_name for t in g.trajectories]
    responses = [fake for of_name in fakes.values() for fake in of_name]
    arrays = {name: _flat([getattr(t, name) for t in trajectories]) for name in PER_TOKEN}
    arrays |= {
        "prompt_lengths": np.array([len(t.prompt_ids) for t in trajectories], np.int64),
        "response_lengths": np.array([len(t.response_ids) for t in trajectories], np.int64),
        "fake_examples": np.array([fake.example for fake in responses], np.int64),
        "fake_lengths": np.array([len(fake.response) for fake in responses], np.int64),
        "fake_responses": _flat([fake.response for fake in responses]),
    }
    if trajectories and trajectories[0].expert_ids is not None:
        arrays["expert_ids"] = np.concatenate([t.expert_ids for t in trajectories])
    table = {
        "groups": {name: [_facts(g) for g in of_name] for name, of_name in groups.items()},
        "fakes": {name: len(of_name) for name, of_name in fakes.items()},
    }
    save_file(arrays, path, {"table": json.dumps(table)})


def read_rollouts(path: Path) -> tuple[dict[str, tuple[RolloutGroup, ...]], dict[str, tuple[Fake, ...]]]:
    """What `write_rollouts` wrote. Raises SafetensorError where the file is damaged."""
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        table = json.loads(file.metadata()["table"])
    trajectories = _trajectories(arrays)
    groups = {
        name: tuple(
            RolloutGroup(
                Prompt(row["id"], tuple(row["token_ids"]), row["text"]),
                tuple(next(trajectories)(**facts) for facts in row["trajectories"]),
            )
            for row in rows
        )
        for name, rows in table["groups"].items()
    }
    responses = _parts(arrays["fake_responses"], arrays["fake_lengths"])
    fakes = (Fake(example, tokens) for example, tokens in zip(arrays["fake_examples"].tolist(), responses))
    return groups, {name: tuple(next(fakes) for _ in range(count)) for name, count in table["fakes"].items()}


def _facts(group: RolloutGroup) -> dict[str, Any]:
    facts = [{name: getattr(t, name) for name in FACTS} for t in group.trajectories]
    prompt = group.prompt
    return {"id": prompt.id, "token_ids": list(prompt.token_ids), "text": prompt.text, "trajectories": facts}


def _trajectories(arrays: Mapping[str, NDArray]) -> Iterator[Any]:
    """Makers of the trajectories, in their order, of the facts that are no arrays."""
    prompts, responses = arrays["prompt_lengths"], arrays["response_lengths"]
    lengths = {name: prompts if name == "prompt_ids" else responses for name in PER_TOKEN}
    if "expert_ids" in arrays:
        lengths["expert_ids"] = prompts + responses - 1
    columns = {name: _parts(arrays[name], n) for name, n in lengths.items()}
    for _ in range(len(prompts)):
        own = {name: next(parts) for name, parts in columns.items()}
        yield lambda own=own, **facts: Trajectory(**own, **facts)


def _flat(parts: Sequence[NDArray]) -> NDArray:
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _parts(flat: NDArray, lengths: NDArray[np.int64]) -> Iterator[NDArray]:
    ends = np.cumsum(lengths)
    return (flat[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist()))
