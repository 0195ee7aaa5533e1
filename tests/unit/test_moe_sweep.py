"""The probe's bookkeeping, slopes and crossings by hand, and a pair of small models from end to end."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from moe.measure.compare import Passes, by_update, compare, exactly, four_passes, identities, noise_floor, prompt_flips
from moe.measure.decompose import Decomposition
from moe.measure.probe import Probe, probe_of_rollouts, read_rows, sampled_probe
from moe.measure.stats import mean_of
from moe.measure.sweep import crossing, interpolate, slope, sweep
from moe.record import hf
from moe.record.trace import RoutingTrace

ALPHAS = (1.0, 0.4, 0.3, 0.2, 0.15, 0.03)


class Characters:
    """A tokenizer of digits; 10 is the end of a sequence."""

    eos_token_id = 10

    def encode(self, text, add_special_tokens):
        return [int(c) for c in text]

    def decode(self, tokens, skip_special_tokens):
        return "".join(str(t) for t in tokens if t != 10)


def test_scored_tokens_and_the_positions_they_come_from():
    probe = Probe(((1, 2, 3, 4), (5, 6, 7)), (2, 1), torch.tensor([0, 1]))
    assert probe.answers.answer_ids.tolist() == [0, 0, 1, 1]
    assert probe.rows.tolist() == [1, 2, 4, 5]  # the tokens 2, 3 of the first and 5, 6 of the second
    logprobs = [torch.tensor([0.12, 0.23, 0.34]), torch.tensor([0.56, 0.67])]
    assert probe.scored(logprobs).tolist() == pytest.approx([0.23, 0.34, 0.56, 0.67])


def test_advantages_by_hand():
    probe = Probe(((1, 2),) * 5, (1,) * 5, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 0, 1, 1, 1]))
    half = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert probe.advantages.tolist() == pytest.approx([half, -half, 0, 0, 0])
    kept = probe.subset([3, 2])
    assert kept.prompt_ids.tolist() == [0, 0]
    with pytest.raises(ValueError, match="equal rewards"):
        _ = kept.advantages
    with pytest.raises(ValueError, match="no rewards"):
        _ = Probe(((1, 2),), (1,), torch.tensor([0])).advantages


def test_a_probe_of_rollouts(tmp_path):
    rows = [
        {"prompt": "12", "response": "34", "reward": 1},
        {"prompt": [1, 2], "response": [3], "reward": 0},
        {"prompt": "5", "response": "6", "reward": 0, "finish_reason": "length"},
    ]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    probe = probe_of_rollouts(read_rows(path), Characters())
    assert probe.sequences == ((1, 2, 3, 4, 10), (1, 2, 3), (5, 6)) and probe.prompt_ids.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="1 rows of the rollout file have no `reward`"):
        probe_of_rollouts([*rows, {"prompt": "1", "response": "2"}], Characters())
    with pytest.raises(ValueError, match="row 1 of the rollout file has no `response`"):
        probe_of_rollouts([{"prompt": "1"}], Characters())


@pytest.mark.parametrize("text, message", [("", "is empty"), ("{", ":1 is not JSON"), ('{"x": 1}', 'with "prompt"')])
def test_files_that_are_no_probe(tmp_path, text, message):
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")


def test_a_sampled_probe_judges_by_the_whole_text():
    rows = [{"prompt": "1", "answer": "23"}, {"prompt": "4", "answer": "5"}]
    probe = sampled_probe(rows, Characters(), lambda prompts: [[(2, 3, 10), (9, 2, 3, 10)] for _ in prompts])
    assert probe.sequences[:2] == ((1, 2, 3, 10), (1, 9, 2, 3, 10))
    assert probe.rewards.tolist() == [1, 0, 0, 0] and probe.prompt_ids.tolist() == [0, 0, 1, 1]
    assert sampled_probe([{"prompt": "1"}], Characters(), lambda p: [[(2,)]]).rewards is None


def constant(value: float):
    return mean_of(torch.tensor([value]), torch.tensor([0]))


def test_slope_and_crossing_by_hand():
    alphas = (1.0, 0.1, 0.01)
    assert slope([constant(5 * a**2) for a in alphas], alphas).value() == pytest.approx(2, rel=1e-6)
    # 0.1 -> 10, 1 -> 0.1: log-linear between, 1 is half way, at 10^-0.5
    chi = [constant(x) for x in (0.1, 10, 100)]
    assert crossing(chi, alphas).value() == pytest.approx(10**-0.5, rel=1e-6)
    assert math.isnan(crossing([constant(x) for x in (0.1, 0.2, 0.3)], alphas).value())
    assert crossing([constant(x) for x in (0.1, 10, 0.5)], alphas).value() == pytest.approx(10**-0.5, rel=1e-6)


@pytest.fixture(scope="module")
def models(tiny_moe_dir):
    old = hf.load_model(tiny_moe_dir)
    new = copy.deepcopy(old)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in new.parameters():
            weight.add_(0.05 * weight.std(correction=0) * torch.randn_like(weight))
    return old, new


def a_probe() -> Probe:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 97, (48, 10), generator=generator).tolist()
    rewards = (torch.rand(48, generator=generator) > 0.5).double()
    return Probe(tuple(map(tuple, tokens)), (2,) * 48, torch.arange(48) // 4, rewards)


def test_a_pair_of_models_end_to_end(models):
    probe = a_probe()
    passes = four_passes(hf.forward_with_logits, *models, probe)
    whole = passes.parts.z_w + passes.parts.z_r - passes.parts.z
    assert whole.abs().max() < 1e-14
    assert passes.parts.z_r[~passes.flipped].abs().max() < passes.parts.z_r.abs().max()
    found = compare(passes, probe, draws=50)
    assert found["margins/violations"].value == 0 and 0 < found["flips/set"].value < 0.5
    assert found["margins/flip_rate"].value == pytest.approx(found["flips/set"].value)
    assert found["var_z"].value == pytest.approx(
        found["var_w"].value + found["var_r"].value + 2 * found["covariance"].value
    )
    assert {"inflation/z_r/8", "rho/z/4", "between/z_w", "ess/free/product", "clip/token_0.2/toggled"} <= set(found)
    assert all(e.low <= e.value <= e.high for name, e in found.items() if name.startswith(("flips", "ess")))
    floor = noise_floor(hf.forward_with_logits, models[0], probe, passes.old_routes, passes.parts.old)
    assert floor["floor/abs_max"].value < 1e-6 and floor["floor/flips_set"].value == 0
    assert floor["identity/own_replay_abs_max"].value == 0  # bit for bit
    assert found["identity/parts_abs_max"].value < 1e-14 and found["identity/crossover_abs_max"].value < 1e-9
    assert found["identity/gate_bound_violations"].value == 0
    assert found["shared/8"].value == pytest.approx(found["inflation/z_w/8"].value / found["inflation/z_r/8"].value)
    gap = [found[f"clip/matched_0.15/{name}/toggled"].value for name in ("token", "sequence")]
    assert found["clip/matched_0.15/toggled_gap"].value == pytest.approx(gap[0] - gap[1])
    assert found["router/ep8_max_over_mean/layer_0"].value == found["router/load_max_over_mean/layer_0"].value
    merged = by_update([{"x": exactly(1)}, {"x": exactly(2)}])
    assert {name: e.value for name, e in merged.items()} == {"x": 2, "update/1/x": 1, "update/2/x": 2}


def test_identities_notice_a_wrong_part(models):
    passes, answers = four_passes(hf.forward_with_logits, *models, a_probe()), a_probe().answers
    wrong = replace(passes.parts, new=passes.parts.new.float().double())
    assert identities(passes.parts, answers)["identity/crossover_abs_max"].value < 1e-9
    assert identities(wrong, answers)["identity/crossover_abs_max"].value < 1e-9  # any parts that sum to z obey it

    class Torn(Decomposition):
        z_r = property(lambda self: self.new - self.old_on_new)

    torn = identities(Torn(**vars(passes.parts)), answers)
    assert torn["identity/parts_abs_max"].value > 1e-3 and torn["identity/crossover_abs_max"].value > 1e-3


def test_flips_of_the_prompts_by_hand():
    """Sequences of 2 + 1 and 1 + 1 tokens: only the first token of the first one is scored by nothing."""
    probe = Probe(((1, 2, 3), (4, 5)), (2, 1), torch.tensor([0, 1]))
    ids = torch.tensor([[[0]], [[0]], [[0]], [[0]], [[0]]])
    other = ids.clone()
    other[0] = 1
    before, after = (RoutingTrace(x, None, None, 4, torch.tensor([0, 3, 5])) for x in (ids, other))
    empty = torch.zeros(3)
    parts = Decomposition(empty, empty, empty, empty)
    passes = Passes(parts, ids[probe.rows], other[probe.rows], None, empty, empty, before, after)
    assert not passes.flipped.any() and prompt_flips(passes, probe)["flips/set_prompt"].value == 1


def test_equal_models_have_no_log_ratio(models):
    passes = four_passes(hf.forward_with_logits, models[0], models[0], a_probe())
    assert passes.parts.z.abs().max() == passes.parts.z_r.abs().max() == 0 and not passes.flipped.any()


def test_a_dense_pair_is_all_weights(tiny_dense_dir):
    old = hf.load_model(tiny_dense_dir)
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.lm_head.weight.mul_(1.01)
    passes = four_passes(hf.forward_with_logits, old, new, a_probe())
    assert passes.parts.z.abs().max() > 1e-3 and passes.parts.z_r.abs().max() == 0
    found = compare(passes, a_probe(), draws=20)
    assert found["share_routing"].value == 0 and not any(name.startswith("flips") for name in found)


def test_a_sweep_interpolates_and_fits(models):
    old, new = models
    scratch, weights = copy.deepcopy(new), {k: v.clone() for k, v in new.state_dict().items()}
    done = []
    found = sweep(hf.forward_with_logits, old, scratch, weights, a_probe(), ALPHAS, 50, done.append)
    assert tuple(done) == ALPHAS
    assert found["slope/var_w"].value == pytest.approx(2, abs=0.25)
    whole = compare(four_passes(hf.forward_with_logits, old, new, a_probe()), a_probe(), 10)
    assert found["sweep/1/var_w"].value == pytest.approx(whole["var_w"].value, rel=1e-9)
    assert found["sweep/0.03/chi"].value > found["sweep/1/chi"].value
    with pytest.raises(ValueError, match="not the same architecture: 'lm_head.weight'"):
        interpolate(scratch, {k: v for k, v in weights.items() if k != "lm_head.weight"}, weights, 0.5)
