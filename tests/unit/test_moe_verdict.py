"""Verdicts on numbers whose truth is known, in each direction; alarms of training runs."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from moe.judge.claims import CLAIMS, STEPS
from moe.judge.verdict import (
    Claim,
    Standing,
    all_at_most,
    apart,
    at_most,
    exit_code,
    judge,
    largest_n,
    rising,
    within,
)
from moe.judge.watch import THRESHOLDS, Level, alarms_of, collapse, first_of_each, judge_run
from moe.measure.decompose import crossover, jump, parts
from moe.measure.stats import Answers, Estimate, estimates, mean_of
from moe.measure.sweep import ALPHAS, laws
from moe.show.report import ledger
from moe.studies.study import Study, pooled

BY_KEY = {claim.key: claim for claim in CLAIMS}


def claim(judged, proved=False, seeds=3) -> Claim:
    return Claim("key", 1, "text", judged, "compare", "source", proved, seeds)


def est(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high)


def standing(of: Claim, *replicates: dict) -> Standing:
    return judge(of, {str(i): e for i, e in enumerate(replicates)}).standing


ABOVE, BELOW, ACROSS = ({"x": est(*bounds)} for bounds in ((1.1, 2.0), (0.2, 0.9), (0.5, 1.5)))


@pytest.mark.parametrize(
    "replicates, expected",
    [
        ([ABOVE] * 3, Standing.SUPPORTED),
        ([BELOW] * 3, Standing.CONTRADICTED),
        ([ABOVE] * 2, Standing.NOT_SHOWN),  # too few seeds
        ([BELOW] * 2, Standing.NOT_SHOWN),
        ([ABOVE, ABOVE, ACROSS], Standing.NOT_SHOWN),
        ([ABOVE, ABOVE, BELOW], Standing.NOT_SHOWN),  # they disagree
        ([{}, {}], Standing.NOT_SHOWN),
        ([{"x": Estimate(1.5, math.nan, math.nan)}] * 3, Standing.NOT_SHOWN),
    ],
)
def test_an_empirical_claim_needs_every_interval_and_enough_seeds(replicates, expected):
    assert standing(claim(within("x", low=1)), *replicates) is expected


def test_a_statement_about_one_pair_needs_one():
    assert standing(claim(within("x", low=1), seeds=1), ABOVE) is Standing.SUPPORTED
    assert standing(claim(within("x", low=1), seeds=1), BELOW) is Standing.CONTRADICTED


def test_what_was_not_run_names_the_command():
    assert judge(claim(within("x")), {"a": {}}).reason == "not run yet: moe-stability compare"
    ran = judge(claim(within("x")), {"a": {"var_z": est(0, 1)}})
    assert ran.standing is Standing.NOT_SHOWN and ran.reason.startswith("run, but not measurable")


@pytest.mark.parametrize(
    "value, expected", [(0.0, Standing.HOLDS), (1.0, Standing.CONTRADICTED), (math.nan, Standing.CONTRADICTED)]
)
def test_a_theorem_holds_or_is_a_bug(value, expected):
    verdict = judge(claim(at_most("x", 0), proved=True), {"a": {"x": Estimate(value, value, value)}})
    assert verdict.standing is expected
    assert exit_code([verdict]) == (expected is Standing.CONTRADICTED)


def test_a_contradicted_observation_is_no_failure():
    assert exit_code([judge(claim(within("x", low=1)), {str(i): BELOW for i in range(3)})]) == 0


def test_every_way_to_judge_by_hand():
    exact = {f"exact/{i}/product/bias": est(x, x) for i, x in enumerate((0.0, 1e-15))}
    assert all_at_most("exact/", "/product/bias", 1e-9)(exact).side
    assert not all_at_most("exact/", "/product/bias", 1e-9)(exact | {"exact/2/product/bias": est(1, 1)}).side
    assert not all_at_most("exact/", "/product/bias", 1e-9)({"exact/2/product/bias": est(math.nan, math.nan)}).side
    assert all_at_most("none/", "", 1)(exact) is None
    pairs = {"a": est(2, 3), "b": est(0, 1), "c": est(0.5, 2.5)}
    assert apart("a", "b")(pairs).side and apart("b", "a")(pairs).side is False and apart("a", "c")(pairs).side is None
    up = {f"update/{k}/f": est(k, k + 0.5) for k in (1, 2, 3)}
    assert rising("update/", "/f")(up).side
    assert rising("update/", "/f")(up | {"update/2/f": est(4, 4.5)}).side is None  # not step by step
    down = {f"update/{4 - k}/f": e for k, e in zip((1, 2, 3), up.values())}
    assert rising("update/", "/f")(down).side is False and rising("update/", "/f")({"update/1/f": est(1, 2)}) is None
    curve = {f"i/{n}": est(n, n + 0.1) for n in (1, 2, 16)}
    assert largest_n("i", low=10)(curve).side and largest_n("i", high=10)(curve).side is False
    assert largest_n("none", low=1)(curve) is None


def test_what_lies_within_the_noise_floor_decides_nothing():
    e = {"chi": est(5, 6), "var_w": est(1e-9, 1e-9), "var_r": est(1e-13, 1e-13), "floor/var_z": est(1e-13, 1e-13)}
    finding = BY_KEY["sequence-nearer"].judge(e)
    assert finding.side is None and "var_r within 10 times the noise floor" in finding.text
    assert BY_KEY["sequence-nearer"].judge(e | {"var_r": est(1e-11, 1e-11)}).side


@pytest.mark.parametrize(
    "scale, expected", [(0.2, Standing.CONTRADICTED), (5.0, Standing.SUPPORTED), (1.0, Standing.NOT_SHOWN)]
)
def test_chi_in_both_directions(scale, expected):
    """Log-ratios drawn with a known chi = scale^2: the verdict names the ratio that is nearer."""
    generator = torch.Generator().manual_seed(0)
    answers = Answers(torch.arange(200).repeat_interleave(20), torch.arange(200) // 4)
    z_w, z_r = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    found = estimates(crossover(z_w, scale * z_r, answers), draws=300)
    assert found["chi"].value == pytest.approx(scale**2, rel=0.15)
    assert standing(BY_KEY["sequence-nearer"], found) is expected


def sweep_of(power_r: float) -> dict:
    """Steps whose z_w is smooth, and whose z_r comes from jumps at a rate of alpha^power_r."""
    steps, generator = [], torch.Generator().manual_seed(1)
    answers = Answers(torch.arange(400).repeat_interleave(20), torch.arange(400) // 4)
    smooth = torch.randn(8000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(8000, generator=generator, dtype=torch.float64)
    size = torch.randn(8000, generator=generator, dtype=torch.float64)
    for alpha in ALPHAS:
        flipped = uniform < 0.25 * alpha**power_r
        z_w, z_r = 0.1 * alpha * smooth, 0.05 * size * flipped
        step = parts(z_w, z_r, answers) | crossover(z_w, z_r, answers)
        step |= {name: mean_of(flipped.double(), answers.token_prompts) for name in ("set", "token_any")}
        steps.append(step | ({"jump": jump(z_r, flipped, answers)} if flipped.any() else {}))
    found = laws(steps, ALPHAS, draws=100)
    named = {f"sweep/{a:g}/{n}": e for a, s in zip(ALPHAS, steps) for n, e in estimates(s, 100).items()}
    return found | named


def test_the_laws_of_the_step_in_both_directions():
    lawful, lawless = sweep_of(1.0), sweep_of(0.3)
    for key in ("weights-square", "routing-linear", "flips-linear", "jump-flat", "chi-grows", "tails"):
        assert standing(BY_KEY[key], *[lawful] * 3) is Standing.SUPPORTED, key
    assert standing(BY_KEY["routing-linear"], *[lawless] * 3) is Standing.CONTRADICTED
    assert standing(BY_KEY["chi-crosses"], *[lawful] * 3) is Standing.SUPPORTED


def test_the_ledger_names_a_number_once_and_keeps_the_order_of_the_replicates():
    one = judge(claim(within("x", 0)), {"a": {"x": est(1, 2)}, "b": {"x": est(3, 4)}, "c": {"x": est(5, 6)}})
    two = judge(claim(apart("x", "y")), {"a": {"x": est(1, 2), "y": est(0, 0)}})
    none = judge(claim(within("z")), {"a": {"x": est(1, 2)}})
    lines = ledger([one, two, none]).splitlines()[2:]
    assert lines[0].endswith("| observation | supported | x = 1.5 [1, 2]; 3.5 [3, 4]; 5.5 [5, 6] |")
    assert lines[1].endswith("| observation | not shown | x = 1.5 [1, 2], y = 0 |")
    assert "| not shown | not run yet: moe-stability " in lines[2]


def test_claims_are_complete():
    assert {c.step for c in CLAIMS} == set(range(1, len(STEPS) + 1)) and len(BY_KEY) == len(CLAIMS)
    ledger = (Path(__file__).parents[2] / "docs/moe_stability.md").read_text()
    for c in CLAIMS:
        assert f"| {c.step} | {c.text} |" in ledger, f"not in the ledger of docs/moe_stability.md: {c.text}"


def test_studies_are_files(tmp_path):
    study = Study("compare", "cmd", {"a": 1}, {"x": est(0, 1), "y": Estimate(1, math.nan, math.nan)}, {"s": [(1, 2.0)]})
    study.save(tmp_path / "one")
    (back,) = pooled([tmp_path / "one"])
    assert back.estimates["x"] == est(0, 1) and math.isnan(back.estimates["y"].low)
    assert back.studies["compare"].series == {"s": [(1, 2.0)]} and back.name == "one"
    assert (tmp_path / "one/compare.csv").read_text().splitlines()[1] == "x,0.5,0.0,1.0"
    with pytest.raises(ValueError, match="holds no study"):
        pooled([tmp_path])
    (tmp_path / "one/compare.json").write_text("{}")
    with pytest.raises(ValueError, match="is no study of moe-stability"):
        pooled([tmp_path / "one"])


# ---------------------------------------------------------------- training runs


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: t.metric)
def test_every_threshold_by_hand(threshold):
    sign = -1 if threshold.below else 1
    bounds = [(threshold.watch, Level.WATCH), (threshold.unstable, Level.UNSTABLE)]
    for bound, level in bounds:
        if bound is not None:
            assert threshold.level(bound) is level
            assert threshold.level(bound * (1 - 1e-6 * sign)) < level
    assert threshold.level(math.nan) is Level.UNSTABLE
    assert threshold.source and threshold.knob


def test_alarms_name_the_reason_and_the_knob():
    assert alarms_of({"moe/chi": 0.5, "other": 9}, 3) == []
    worst, mild = alarms_of({"moe/chi": 1.5, "mismatch/k3": 0.3}, 3)
    assert worst.level is Level.UNSTABLE and mild.level is Level.WATCH
    assert str(mild).startswith("watch: step 3: moe/chi = 1.5") and "Try algorithm.name=gspo" in str(mild)
    assert alarms_of({"mismatch/k3": None}, 1)[0].level is Level.UNSTABLE


def rows(metric: str, values: list) -> list[dict]:
    return [{"step": i, metric: value} for i, value in enumerate(values)]


def test_a_run_is_judged_by_most_of_its_recent_values():
    calm, wild = 0.001, 0.5
    for values, level in (
        ([calm] * 9, Level.OK),
        ([calm] * 8 + [wild], Level.OK),  # one step can be chance
        ([calm] * 6 + [wild] * 3, Level.UNSTABLE),
        ([wild] * 5 + [calm] * 5, Level.OK),  # it is over
    ):
        assert judge_run(rows("mismatch/k3", values))[0] is level
    _, alarms = judge_run(rows("mismatch/k3", [wild, 0.05, wild]))
    assert [(a.step, a.level) for a in first_of_each(alarms)] == [(0, Level.UNSTABLE), (1, Level.WATCH)]


def test_a_collapsed_run_is_unstable_whatever_its_routers_say():
    assert collapse(rows("eval/accuracy", [0.2, 0.6, 0.5])) is None and collapse(rows("eval/accuracy", [0.1])) is None
    level, alarms = judge_run(rows("eval/accuracy", [0.2, 0.6, 0.1]))
    assert level is Level.UNSTABLE and re.search("0.1 has fallen below 0.5 of its best, 0.6", str(alarms[-1]))
