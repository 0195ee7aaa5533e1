"""An optimizer step goes through all parameters at once, and is the step that one by one would be."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.optimizer import build_training, torch_optimizers
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards


@pytest.fixture(scope="module")
def groups():
    yield process_groups.init(ParallelLayout(), timeout_s=30, seed=0)
    process_groups.destroy()


class Counted(TorchDispatchMode):
    """How many operations are dispatched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def training_of(folder, groups, **optimizer):
    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, ModelConfig(path=str(folder)), groups)
    load_hf(folder, megatron_shards(chunks, hf_config, groups))
    return build_training(chunks, OptimizerConfig(lr=1e-2, **optimizer), ParallelConfig(), total_steps=10)


def step(training, seed: int) -> tuple[float, int]:
    """The gradient norm of one step on random gradients, and how many operations it took."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in training.chunks:
        for p in chunk.parameters():
            p.main_grad.normal_(generator=generator)
    with Counted() as counted:
        norm, _ = training.step()
    return norm, counted.count


def weights(training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for chunk in training.chunks for p in chunk.parameters()])


@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.1}, {"clip_grad": 0.0}])
def test_all_at_once_is_one_by_one(groups, tiny_moe_dir, fields):
    fused, single = (training_of(tiny_moe_dir, groups, **fields) for _ in range(2))
    single_weights = weights(single)
    assert torch.equal(weights(fused), single_weights)
    for inner in torch_optimizers(single.optimizer):
        for group in inner.param_groups:
            assert group["fused"] and not group.get("foreach")
            group["fused"] = False
    for seed in range(3):
        norms = [step(training, seed)[0] for training in (fused, single)]
        grads = torch.cat([p.main_grad.flatten() for chunk in fused.chunks for p in chunk.parameters()])
        if fields.get("clip_grad") == 0:
            assert norms[0] == pytest.approx(grads.norm().item(), rel=1e-5)
        else:
            assert grads.norm().item() == pytest.approx(1.0, rel=1e-4), "clipped to 1, whatever it was"
        assert norms[0] == norms[1]
    torch.testing.assert_close(weights(fused), weights(single), rtol=1e-6, atol=1e-7)
    assert (weights(fused) - single_weights).abs().max() > 1e-3


def test_the_number_of_operations_does_not_grow_with_the_parameters(groups, tiny_moe_dir):
    training = training_of(tiny_moe_dir, groups)
    step(training, 0)  # makes the moments
    parameters = sum(1 for chunk in training.chunks for _ in chunk.parameters())
    _, operations = step(training, 1)
    assert parameters > 40 and operations < 2 * parameters


def test_gradients_that_are_no_numbers_are_seen_in_the_norm(groups, tiny_moe_dir):
    training = training_of(tiny_moe_dir, groups)
    for chunk in training.chunks:
        for p in chunk.parameters():
            p.main_grad.fill_(1)
    next(training.chunks[0].parameters()).main_grad[0, 0] = torch.nan
    norm, _ = training.step()
    assert norm != norm
