"""Work that is left out of a step changes nothing: the same gradients, losses and weights as with it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from frozen_rollout import make_samples

from mcore_rl.algorithms import available, load
from mcore_rl.config import OptimizerConfig, parse_config
from mcore_rl.data.sequences import Sequences
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Policy
from mcore_rl.model.optimizer import build_training
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.roles.models import Models
from mcore_rl.step import batches, scoring, updating
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards


@pytest.fixture(scope="module")
def groups():
    yield process_groups.init(ParallelLayout(), timeout_s=30, seed=0)
    process_groups.destroy()


def samples(zeros: bool) -> Sequences:
    """The frozen rollout; with `zeros` every third sequence has advantage 0, and one no loss token."""
    sequences = Sequences.of(make_samples())
    if zeros:
        sequences.columns.advantages[::3] = 0
        last = len(sequences) - 1
        sequences.columns.num_loss[last] = 0
        sequences.loss_mask[-sequences.columns.num_response[last] :] = False
    return sequences


def one_step(groups, folder, algorithm, sequences, mini_batches: int = 1) -> tuple[torch.Tensor, dict[str, float]]:
    """The weights that a step of the loop's own phases leads to, and its metrics."""
    config = parse_config(
        {
            "name": "x",
            "model": {"path": str(folder)},
            "batch": {"micro_batch_tokens": 40, "mini_batches": mini_batches},
            "optimizer": {"lr": 0.1, "name": "sgd"},
        }
    )
    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, config.model, groups)
    load_hf(folder, megatron_shards(chunks, hf_config, groups))
    training = build_training(chunks, OptimizerConfig(lr=0.1, name="sgd"), config.parallel, total_steps=10)
    models = Models({"policy": training}, Policy(training.chunks, groups, hf_config.vocab_size))
    plan = SimpleNamespace(config=config, algorithm=algorithm)
    share = batches.share_of_step(plan, groups, sequences, step=0)
    scored, metrics = scoring.score(plan, groups, models, share)
    metrics |= updating.update(plan, groups, models, None, scored, step=0)
    return torch.cat([p.detach().flatten().double() for chunk in chunks for p in chunk.parameters()]), metrics


@pytest.mark.parametrize("name", [n for n in available() if load(n).scales_with_advantage])
@pytest.mark.parametrize("mini_batches", [1, 3])
def test_sequences_without_advantage_or_loss_tokens_are_not_run(groups, tiny_moe_dir, monkeypatch, name, mini_batches):
    algorithm = load(name)
    left_out, metrics = one_step(groups, tiny_moe_dir, algorithm, samples(zeros=True), mini_batches)
    monkeypatch.setattr(batches, "zero_advantage_is_idle", lambda plan: False)
    whole, with_them = one_step(groups, tiny_moe_dir, algorithm, samples(zeros=True), mini_batches)
    assert metrics["train/sequences_run_frac"] == 0.6 and with_them["train/sequences_run_frac"] == 0.9
    torch.testing.assert_close(left_out, whole, rtol=0, atol=2e-7)
    assert metrics["policy/loss"] == pytest.approx(with_them["policy/loss"], abs=1e-6)


@pytest.mark.parametrize(
    "fields, model, idle",
    [
        ({}, {}, True),
        ({"kl_coef": 0.1}, {}, False),
        ({"entropy_coef": 0.1}, {}, False),
        ({}, {"moe_aux_loss_coef": 0.1}, False),
    ],
)
def test_what_else_moves_a_sequence_keeps_it(fields, model, idle):
    config = parse_config({"name": "x", "model": {"path": "m"} | model})
    for name in available():
        algorithm = load(name, **({} if "pairs" in load(name).needs else fields))
        plan = SimpleNamespace(config=config, algorithm=algorithm)
        assert batches.zero_advantage_is_idle(plan) == (idle and name in ("cispo", "dapo", "grpo", "gspo", "sapo"))


@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "cispo"])
def test_one_update_knows_the_old_log_probs_itself(groups, tiny_moe_dir, monkeypatch, name):
    """No pass before it, every ratio exactly 1, and the mismatch with the engine all the same."""
    algorithm, asked = load(name, correction="tis_token", token_variant=True) if name == "gspo" else load(
        name, correction="tis_token"), []
    real = scoring.forward_only
    monkeypatch.setattr(scoring, "forward_only", lambda *a: asked.append(1) or real(*a))
    own, metrics = one_step(groups, tiny_moe_dir, algorithm, samples(zeros=False))
    assert not asked and metrics["policy/ratio_mean"] == 1.0
    for module in (scoring, updating):
        monkeypatch.setattr(module, "update_knows_old", lambda plan: False)
    scored, before = one_step(groups, tiny_moe_dir, algorithm, samples(zeros=False))
    assert asked
    torch.testing.assert_close(own, scored, rtol=0, atol=2e-6)
    for key in ("mismatch/k3", "mismatch/abs_mean", "mismatch/abs_max", "policy/correction_mean", "policy/loss"):
        assert metrics[key] == pytest.approx(before[key], abs=2e-6), key


def test_scoring_takes_full_micro_batches(groups, tiny_moe_dir, monkeypatch):
    """Three mini-batches of the update, as few passes before it as hold all."""
    passes, real = [], scoring.forward_only
    monkeypatch.setattr(scoring, "forward_only", lambda model, b: passes.append(len(b)) or real(model, b))
    one_step(groups, tiny_moe_dir, load("grpo"), samples(zeros=False), mini_batches=3)
    positions = int(samples(zeros=False).columns.positions.sum())
    assert passes == [pytest.approx(-(-positions // 40), abs=1)]


def test_a_step_in_which_nothing_teaches(groups, tiny_moe_dir):
    """All rewards equal: no sequence is run, nothing is divided by 0, and the weights stay."""
    sequences = samples(zeros=False)
    sequences.columns.advantages[:] = 0
    before, _ = one_step(groups, tiny_moe_dir, load("grpo"), sequences)
    sequences.columns.num_loss[:] = 0
    after, metrics = one_step(groups, tiny_moe_dir, load("grpo"), sequences, mini_batches=3)
    assert torch.equal(before, after) and metrics["train/sequences_run_frac"] == 0
    assert metrics["policy/loss"] == 0 and metrics["optimizer/grad_norm_max"] == 0
    assert not any(np.isnan(value) for value in metrics.values())
