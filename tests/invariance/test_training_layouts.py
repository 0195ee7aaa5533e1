"""The same training whatever the layout: a step of every algorithm, of critic and discriminator, and trajectories.

Of a frozen rollout everything that training makes is compared with one rank in fp32 that packs all of it into one
micro-batch: log-probs; loss, every metric and all gradients (gathered to HF names) of one step of each; the
metrics of five steps of GRPO, GSPO and PPO through the loop's own phases, and the weights after them. After the third
step the reference becomes the policy; in some cases it is cut another way.

    pytest tests/invariance/test_training_layouts.py -m ""              all layouts, minutes
    pytest tests/invariance/test_training_layouts.py -m "" -k 4ranks    those of 4 ranks
    pytest tests/invariance/test_training_layouts.py                    a part that has every axis
"""

import math
from pathlib import Path

import pytest
import torch
from frozen_rollout import relative
from layout_runs import STEPS, TRAJECTORIES
from tiny_models import save_tiny_hf
from worlds import run_worlds, slug

REFERENCE = dict(layout={}, budget=10_000, optimizers=["sgd", "adam"])
USUAL = [
    dict(layout={}, budget=40, recompute="full"),
    dict(layout=dict(dp=2, ep=2), budget=60, distributed_optimizer=True, overlap_grad_reduce=True),
    dict(layout=dict(tp=2, ep=2), budget=60, reference=dict(pp=2)),
    dict(layout=dict(pp=2, vpp=2), budget=60, reference=dict(ep=2)),
    dict(layout=dict(cp=2, ep=2), budget=60),
    dict(layout=dict(cp=2, tp=2), budget=60, recompute="selective"),
]
REST = [
    dict(layout={}, budget=40),
    dict(layout={}, budget=100),
    dict(layout={}, budget=100, padded=True),
    dict(layout={}, budget=10_000, recompute="full"),
    dict(layout={}, budget=10_000, recompute="selective"),
    dict(layout={}, budget=60, distributed_optimizer=True),
    dict(layout=dict(dp=2), budget=60),
    dict(layout=dict(dp=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(dp=2), budget=40, overlap_grad_reduce=True),
    dict(layout=dict(dp=2, ep=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(dp=2, ep=2), budget=60),
    dict(layout=dict(dp=2, ep=2), budget=60, recompute="selective"),
    dict(layout=dict(tp=2), budget=60),
    dict(layout=dict(tp=2, ep=2), budget=60),
    dict(layout=dict(pp=2, vpp=2), budget=60),
    dict(layout=dict(tp=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(tp=2, ep=1, etp=2), budget=60),
    dict(layout=dict(tp=2, ep=2), budget=100, padded=True),
    dict(layout=dict(tp=2, ep=2), budget=60, recompute="full"),
    dict(layout=dict(pp=2), budget=60),
    dict(layout=dict(pp=2), budget=60, recompute="full"),
    dict(layout=dict(pp=2, vpp=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(cp=2), budget=60),
    dict(layout=dict(cp=2), budget=40),
    dict(layout=dict(cp=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(cp=2), budget=100, padded=True),
    dict(layout=dict(cp=2, ep=2), budget=60, recompute="full"),
    dict(layout=dict(dp=4, ep=2, etp=2), budget=60),
    dict(layout=dict(dp=4, ep=4), budget=60, distributed_optimizer=True),
    dict(layout=dict(tp=2, dp=2, ep=2), budget=60),
    dict(layout=dict(tp=2, dp=2, ep=2, etp=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(tp=2, pp=2), budget=60),
    dict(layout=dict(pp=2, vpp=2, dp=2, ep=2), budget=40, overlap_grad_reduce=True, distributed_optimizer=True),
    dict(layout=dict(pp=2, dp=2), budget=40, overlap_grad_reduce=True, recompute="full"),
    dict(layout=dict(tp=2, pp=2), budget=60, reference=dict(ep=4), distributed_optimizer=True),
    dict(layout=dict(dp=4, ep=2), budget=60, reference=dict(cp=2, tp=2)),
    dict(layout=dict(tp=2, pp=2, vpp=2, ep=2), budget=60),
    dict(layout=dict(cp=2, tp=2, ep=2), budget=60),
    dict(layout=dict(cp=2, tp=2, ep=2, etp=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(cp=2, tp=2), budget=60, recompute="full"),
    dict(layout=dict(cp=2, dp=2, ep=2), budget=60),
    dict(layout=dict(cp=2, dp=2, ep=4), budget=60, distributed_optimizer=True),
    dict(layout=dict(cp=2, pp=2), budget=60),
    dict(layout=dict(cp=2, pp=2, vpp=2, ep=2), budget=60),
    dict(layout=dict(cp=4), budget=100),
    dict(layout=dict(tp=2, pp=2, dp=2, ep=2), budget=60),
    dict(layout=dict(tp=2, pp=2, dp=2, ep=2, etp=2), budget=60, distributed_optimizer=True),
    dict(layout=dict(tp=2, pp=2, cp=2, ep=2), budget=60),
]
TOLERANCE = 1e-5
ALL = USUAL + [pytest.param(case, marks=pytest.mark.slow) for case in REST]


def ranks_of(case: dict) -> int:
    return math.prod(case["layout"].get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


def name_of(case: dict) -> str:
    extras = (
        f"{k}_{slug(v) if isinstance(v, dict) else v}" for k, v in case.items() if k not in ("layout", "optimizers")
    )
    return "-".join([f"{ranks_of(case)}ranks", slug(case["layout"]), *extras])


@pytest.fixture(scope="module")
def outcome(request, tmp_path_factory):
    """`outcome(case)`: what a case of the selected tests found. Ranks are started once for each number of them."""
    source = save_tiny_hf(tmp_path_factory.mktemp("layouts_model"))
    folder = tmp_path_factory.mktemp("training_layouts")
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = [REFERENCE, *(item.callspec.params["case"] for item in items)]
    started = set()

    def outcome(case: dict) -> dict:
        ranks, out = ranks_of(case), folder / name_of(case)
        if ranks not in started:
            started.add(ranks)
            cases = [
                c | dict(source=str(source), out=str(folder / name_of(c))) for c in selected if ranks_of(c) == ranks
            ]
            worker = str(Path(__file__).with_name("layout_runs.py"))
            run_worlds(worker, cases, ranks, timeout_s=120 + 120 * len(cases))
        assert out.exists(), f"the first test on {ranks} ranks says why they failed"
        return torch.load(out, weights_only=False)

    return outcome


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_same_training(case, outcome):
    want, got = outcome(REFERENCE), outcome(case)
    assert got["steps"].keys() == want["steps"].keys()
    logprobs = want["steps"]["logprobs"]
    assert got["steps"]["logprobs"].keys() == logprobs.keys()
    for key, values in logprobs.items():
        assert got["steps"]["logprobs"][key] == pytest.approx(values, abs=TOLERANCE)
    for name in got["steps"].keys() - {"logprobs"}:
        check_step(name, got["steps"][name], want["steps"][name])
    assert got["trajectories"], "nothing to compare"
    for which, trajectory in got["trajectories"].items():
        check_trajectory(which, trajectory, want["trajectories"][which])


def check_step(name: str, got: dict, want: dict) -> None:
    """Sums over some 60 tokens, of which those of both signs may be near 0."""
    assert got["sums"] == pytest.approx(want["sums"], rel=TOLERANCE, abs=TOLERANCE), name
    for tensor, grad in got.get("grads", {}).items():
        assert relative(grad, want["grads"][tensor]) < TOLERANCE, (name, tensor)


def check_trajectory(which: tuple[str, str], got: dict, want: dict) -> None:
    for step, (metrics, expected) in enumerate(zip(got["steps"], want["steps"], strict=True)):
        assert metrics == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), (which, step)
    for tensor, weight in want["weights"].items():
        assert relative(got["weights"][tensor], weight) < TOLERANCE, (which, tensor)


def test_the_reference_is_not_trivial(outcome):
    """The comparison can fail: gradients of different algorithms differ, all parameters get one, the steps move."""
    want = outcome(REFERENCE)
    grads = want["steps"]["grpo"]["grads"]
    assert all(g.abs().max() > 0 for g in grads.values())
    assert relative(want["steps"]["sapo"]["grads"]["lm_head.weight"], grads["lm_head.weight"]) > 1e-2
    assert len(want["trajectories"]) == 2 * len(TRAJECTORIES)
    for steps in (t["steps"] for t in want["trajectories"].values()):
        losses = [metrics["policy/loss"] for metrics in steps]
        assert len(set(losses)) == STEPS and all(map(math.isfinite, losses))
        assert any(metrics["policy/clip_frac"] > 0 for metrics in steps)
    kl = [metrics["policy/kl_ref"] for metrics in want["trajectories"]["grpo", "adam"]["steps"]]
    assert kl[0] > 1e-3 and kl[3] < 0.1 * kl[2], "after the third step the reference is the policy"
