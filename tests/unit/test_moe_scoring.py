"""A batch under every objective: known gradients, known noise, and a small model from end to end."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from moe.measure.gradients import PolicyGraph, quadratic_estimate
from moe.measure.objectives import COEFFICIENTS
from moe.measure.probe import Probe
from moe.measure.scoring import (
    MATCHED,
    batch_of,
    gradient_estimates,
    objectives_of,
    rows_of,
    usage,
)
from moe.measure.stats import Answers
from moe.record import hf


def test_inner_products_of_means_and_of_distinct_groups():
    rows = torch.tensor([[1.0, 0.0], [3.0, 2.0]]).double()
    got = []
    quadratic_estimate([rows @ rows.T], lambda pairs: got.append(pairs[0]) or pairs[0][0], draws=4)
    whole, distinct = (x[0].item() for x in got[0])
    assert whole == 2**2 + 1**2 and distinct == 3.0  # |mean|^2, and the product of the two


def test_the_estimate_of_distinct_groups_is_unbiased_and_its_interval_covers():
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(20).double()
    mean[0] = 1
    values, covered = [], 0
    for _ in range(200):
        rows = mean + torch.randn(30, 20, generator=generator, dtype=torch.float64)
        e = quadratic_estimate([rows @ rows.T], lambda pairs: pairs[0][1], draws=200)
        values.append(e.value)
        covered += e.low <= 1 <= e.high
    assert torch.tensor(values).mean().item() == pytest.approx(1, abs=0.06)  # the plain square would say 1 + 20/30
    assert covered > 160


def test_what_is_lost_in_noise_has_no_interval():
    rows = torch.randn(12, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # no signal at all
    e = quadratic_estimate([rows @ rows.T], lambda p: torch.where(p[0][1] > 0, p[0][0] / p[0][1], torch.nan), draws=200)
    assert math.isnan(e.low) and math.isnan(e.high)


def test_rows_add_up_to_the_gradient_of_the_reduced_objective():
    answers = Answers(torch.tensor([0, 0, 1]), torch.tensor([0, 1]))
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    graph = PolicyGraph([w[:2] * 2, w[2:] * 3], [w])
    rows = rows_of(graph, torch.tensor([1.0, 2.0, 4.0]).double(), answers)
    # weights 1/(2 answers x length): 1/4, 1/4, 1/2
    assert rows.mean(0).tolist() == [2 * 1 / 4, 2 * 2 / 4, 3 * 4 / 2]
    cut = rows_of(graph, torch.tensor([1.0, 2.0, 4.0]).double(), answers, torch.tensor([True, False, True]))
    assert cut.mean(0).tolist() == [2 * 1 / 2, 0, 3 * 4 / 2]


@pytest.fixture(scope="module")
def scored(tiny_moe_dir):
    old = hf.load_model(tiny_moe_dir)
    new = copy.deepcopy(old)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in new.parameters():
            weight.add_(0.01 * weight.std(correction=0) * torch.randn_like(weight))
    generator = torch.Generator().manual_seed(0)

    def probe() -> Probe:
        tokens = torch.randint(1, 97, (24, 18), generator=generator).tolist()
        rewards = (torch.rand(24, generator=generator) > 0.5).double()
        return Probe(tuple(map(tuple, tokens)), (2,) * 24, torch.arange(24) // 4, rewards)

    return new, batch_of(hf.forward_with_logits, old, new, probe()), probe()


def test_every_objective_under_noise(scored):
    new, batch, fresh = scored
    named = objectives_of(batch)
    assert set(COEFFICIENTS) < set(named)
    parameters = [hf.routers_of(new)[2].weight, new.lm_head.weight]
    told = []
    found = gradient_estimates(
        hf.forward_with_logits, new, batch, named, parameters, sigmas=(0.3,), draws=50, told=told.append
    )
    noise = {name: found[f"objectives/{name}/noise/0.3"].value for name in named}
    assert len(told) == len(named)
    assert noise["no ratio"] == 0 and found["objectives/no ratio/noise_all/0.3"].value > 0
    assert 0 < noise["GSPO"] < noise["token"] < noise["product"]
    assert found["objectives/token/noise_vs_token/0.3"].value == pytest.approx(1)
    assert found["objectives/GSPO/noise_vs_token/0.3"].value == pytest.approx(noise["GSPO"] / noise["token"])
    assert found["length/1"].value == pytest.approx(1)  # of one token, the mean is the token
    assert found["length/16"].value < 0.6 and -0.9 < found["length/slope"].value < -0.2
    used = usage(batch, named, draws=50)
    assert used["objectives/no ratio/used"].value == used["objectives/no ratio/ess"].value == 1
    matched = [used[f"objectives/{name}, matched clip/dropped"].value for name in ("token", "GSPO")]
    assert matched == pytest.approx([MATCHED, MATCHED], abs=16 / 24 / 16)  # to one answer


def test_every_objective_against_fresh_answers(scored):
    new, batch, fresh = scored
    named = {name: objectives_of(batch)[name] for name in ("token", "no ratio")}
    asked = dict(sigmas=(), draws=50)

    def against(probe: Probe) -> dict:
        arguments = (hf.forward_with_logits, new, batch, named, [new.lm_head.weight])
        return gradient_estimates(*arguments, fresh=probe, **asked)

    found = against(fresh)
    assert -1 <= found["objectives/token/cosine"].value <= 1
    assert set(found) == {"reference/noise2", "reference/ceiling"} | {
        f"objectives/{name}/{what}" for name in named for what in ("bias2", "cosine", "snr")
    }
    same = against(batch.probe)
    assert same["objectives/no ratio/cosine"].value == pytest.approx(1)
    assert same["objectives/no ratio/bias2"].value == 0 or math.isnan(same["reference/noise2"].value)
    with pytest.raises(ValueError, match="5 prompts in the reference, 6 in the batch"):
        against(fresh.subset(range(20)))


def test_router_noise_flips_more_the_stronger_it_is(scored):
    _, batch, _ = scored
    own = batch.routes.expert_ids.sort(-1).values
    changed = [(batch.noisy(s, seed=0).expert_ids.sort(-1).values != own).any(-1).double().mean() for s in (0, 0.1, 1)]
    assert changed[0] == 0 < changed[1] < changed[2]
