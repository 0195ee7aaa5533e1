"""The page on adding an algorithm: its file, put into the registry, passes what the tests ask of every file there."""

import math
import re
import sys
from pathlib import Path

import pytest
import test_correction
import test_losses
import torch
from loss_batches import gradient, make_batch, make_group, make_output

from mcore_rl import algorithms

PAGE = (Path(__file__).parents[2] / "docs" / "adding_an_algorithm.md").read_text()
FILE, NOTEBOOK = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture
def rloo(tmp_path, monkeypatch):
    (tmp_path / "rloo.py").write_text(FILE)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    yield "rloo"
    sys.modules.pop("mcore_rl.algorithms.rloo", None)


def test_the_folder_is_the_registry(rloo):
    assert rloo in algorithms.available()
    with pytest.raises(ValueError, match="did you mean 'max_ratio'"):
        algorithms.load(rloo, ratio_max=2.0)
    with pytest.raises(ValueError, match="max_ratio=-1"):
        algorithms.load(rloo, max_ratio=-1.0)


def test_what_is_asked_of_every_algorithm(rloo):
    for poison in (math.nan, 1e6):
        test_losses.test_masked_positions_change_nothing(rloo, {"kl_coef": 0.1}, poison)
    for aggregation in ("token_mean", "sequence_sum"):
        test_losses.test_cutting_the_batch_changes_nothing(rloo, {"kl_coef": 0.1}, aggregation)
        test_losses.test_on_policy_gradient_is_the_policy_gradient(rloo, {}, aggregation)
    test_losses.test_no_advantage_no_gradient(rloo)
    test_correction.test_weighs_the_policy_gradient_term_only_and_is_not_differentiated(rloo, "tis_token")


def test_its_own_formula(rloo):
    algorithm = algorithms.load(rloo, max_ratio=1.2)
    assert algorithm.advantages(make_group(3.0, 0.0, 1.0)).tolist() == pytest.approx([2.5, -2.0, -0.5])
    batch, out = (b := make_batch(aggregation="sequence_sum")), make_output(b, scale=0.3)
    ratio = (out.logprobs - batch.old_logprobs).exp().detach()
    assert (ratio[batch.loss_mask] > 1.2).any()
    want = -batch.weights * batch.advantages * ratio * (ratio <= 1.2)
    torch.testing.assert_close(gradient(algorithm, batch, out), want, rtol=1e-12, atol=0)


def test_the_notebooks_numbers():
    names: dict = {}
    exec(NOTEBOOK, names)
    written = {name: [float(x) for x in row.split(", ")] for name, row in re.findall(r"# (\w+) +\[(.*?)\]", NOTEBOOK)}
    assert written.keys() == names["coefficients"].keys()
    for name, row in written.items():
        assert names["coefficients"][name] == pytest.approx(row, abs=0.006), name
