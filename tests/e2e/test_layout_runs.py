"""A whole run is the same run under every layout: what its engine samples, what it learns, and the weights at its end.

Two steps with the real engine, which takes its weights from that layout before each of them: what a layout changed in a
weight, a log-prob or a reward would show in the second step's samples and numbers.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from runs import Started, numbers, rows, tiny
from safetensors.torch import load_file
from test_gapo_runs import CONSTRAINTS, SMALL, classifier  # noqa: F401, a fixture

RUNS = {
    "grpo": dict(algorithm={"name": "grpo", "kl_coef": 0.1}),
    "gspo": dict(algorithm={"name": "gspo"}, moe={"log_every": 1}),
    "replay": dict(algorithm={"name": "grpo"}, moe={"routing_replay": "rollout"}),
    "reward_model": dict(algorithm={"name": "ppo", "kl_coef": 0.1}, critic={"lr": 1e-3}, reward_model={}),
    "gapo": dict(algorithm={"name": "gapo"}, discriminator=SMALL | {"warmup_rounds": 1}, **CONSTRAINTS),
}
CASES = [
    pytest.param("gapo", dict(cp=2, ep=2), 2, id="gapo-cp2ep2"),
    *(
        pytest.param(name, layout, ranks, id=f"{name}-{''.join(f'{a}{n}' for a, n in layout.items())}-{ranks}",
                     marks=pytest.mark.slow)
        for name, layout, ranks in (
            ("grpo", dict(cp=2), 2),
            ("grpo", dict(ep=2), 4),
            ("gspo", dict(tp=2, pp=2), 4),
            ("gspo", dict(pp=2, vpp=2), 2),
            ("replay", dict(cp=2, ep=2), 2),
            ("reward_model", dict(cp=2, ep=2), 2),
            ("reward_model", dict(tp=2, ep=2), 2),
            ("gapo", dict(tp=2, pp=2, ep=2), 4),
        )
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, classifier):  # noqa: F811
    """(metrics by step, weights by name) of a run of `RUNS` under a layout; each is run once."""
    done = {}

    def finish(name: str, layout: dict[str, int], ranks: int):
        key = (name, *layout.items(), ranks)
        if key not in done:
            folder = tmp_path_factory.mktemp(name)
            sections = deepcopy(RUNS[name])
            for section in sections.keys() & {"reward_model", "discriminator"}:
                sections[section]["path"] = str(classifier)
            optimizer = {"lr": 1e-3, "eps": 1e-4}
            config = tiny(folder, model, parallel=layout, optimizer=optimizer, **sections)
            with Started(folder, config, ranks=ranks) as run:
                assert run.wait(600) == 0, run.err.read_text()[-3000:]
            weights = load_file(run.run_dir / "hf" / "model.safetensors")
            done[key] = numbers(rows(run.run_dir)), weights
        return done[key]

    return finish


@pytest.mark.parametrize("name, layout, ranks", CASES)
def test_the_same_run(finished, name, layout, ranks):
    want, weights = finished(name, {}, 1)
    got, their_weights = finished(name, layout, ranks)
    assert got.keys() == want.keys() == {0, 1, 2}
    for step, row in want.items():
        compared = {key: value for key, value in row.items() if not is_of_the_layout(key)}
        assert {key: got[step].get(key) for key in compared} == pytest.approx(compared, rel=1e-3, abs=1e-5), step
        assert got[step].get("weight_sync/logprob_max_diff", 0) < 1e-5
    for key, tensor in weights.items():
        assert torch.allclose(their_weights[key], tensor, rtol=1e-4, atol=1e-5), key
    assert their_weights.keys() == weights.keys()


def is_of_the_layout(key: str) -> bool:
    """Sizes and rounding differences, which a layout may change."""
    return key.startswith(("memory/", "mismatch/", "weight_sync/", "batch/"))
