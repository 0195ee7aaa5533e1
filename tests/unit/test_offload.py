"""What waits in the host's memory: where it is when, and that training with it is the same to the bit."""

import pytest
import torch
from loss_batches import make_batch

from mcore_rl.config import ModelConfig, OptimizerConfig, ParallelConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.forward import Policy, forward_only
from mcore_rl.model.offload import HostMemory, frozen_weights
from mcore_rl.model.optimizer import build_training, torch_optimizers
from mcore_rl.parallel import groups as process_groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.shards import megatron_shards
from mcore_rl.weights.stored import load_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def groups():
    yield process_groups.init(ParallelLayout(), timeout_s=30, seed=0)
    process_groups.destroy()


@pytest.mark.parametrize(("change", "then"), [(True, 2.0), (False, 1.0)])
def test_memory_that_changes_and_memory_that_does_not(change, then):
    """Within the block a tensor has other memory than outside it; what is done there is kept, or forgotten."""
    tensor = torch.ones(3)
    memory = HostMemory(lambda: [tensor], CPU)
    outside = tensor.data_ptr()
    for _ in range(2):  # the host's memory is taken once
        with memory.on_device(change=change):
            assert tensor.data_ptr() != outside
            tensor.fill_(2.0)
        assert tensor.data_ptr() == outside and tensor.tolist() == [then] * 3
    assert memory.nbytes == 12


def test_a_failure_leaves_nothing_on_the_device():
    tensor = torch.ones(3)
    memory = HostMemory(lambda: [tensor], CPU)
    outside = tensor.data_ptr()
    with pytest.raises(RuntimeError, match="in the step"), memory.on_device(change=True):
        raise RuntimeError("in the step")
    assert tensor.data_ptr() == outside


def test_what_is_made_in_the_block_leaves_with_it():
    tensors = []
    memory = HostMemory(lambda: tensors, CPU)
    with memory.on_device(change=True):
        tensors.append(torch.ones(2))
        there = tensors[0].data_ptr()
    assert tensors[0].data_ptr() != there and memory.nbytes == 8


def loaded(folder, groups, dtype: str = "float32"):
    config = read_hf_config(folder)
    chunks = build_model(config, ModelConfig(path=str(folder), dtype=dtype), groups)
    load_weights(folder, megatron_shards(chunks, config, groups))
    return chunks


def steps_of(folder, groups, dtype: str, name: str, distributed: bool, offload: bool):
    chunks = loaded(folder, groups, dtype)
    torch.manual_seed(0)
    optimizer = OptimizerConfig(lr=1e-2, name=name, offload=offload)
    training = build_training(chunks, optimizer, ParallelConfig(distributed_optimizer=distributed), total_steps=10)
    norms = []
    for _ in range(3):
        training.zero_grad()
        for p in training.chunks[0].parameters():
            p.main_grad.normal_()
        norms.append(training.step()[0])
    return training, norms


@pytest.mark.parametrize(
    ("dtype", "name", "distributed"),
    [
        ("float32", "adam", False),
        ("float32", "adam", True),
        ("float32", "sgd", False),
        ("bfloat16", "adam", False),
        ("bfloat16", "adam", True),
    ],
)
def test_an_optimizer_that_waits_makes_the_same_steps(groups, tiny_dense_dir, dtype, name, distributed):
    there, norms = steps_of(tiny_dense_dir, groups, dtype, name, distributed, offload=False)
    training, same_norms = steps_of(tiny_dense_dir, groups, dtype, name, distributed, offload=True)
    assert norms == same_norms
    pairs = list(zip(there.chunks[0].parameters(), training.chunks[0].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    numel = sum(p.numel() for p in training.chunks[0].parameters())
    states = (2 if name == "adam" else 0) + (dtype == "bfloat16")  # moments and main weights, fp32 each
    assert training.host.nbytes == pytest.approx(4 * states * numel, rel=0.01)  # shares of the optimizer are padded
    if dtype == "bfloat16":
        assert not any(
            p.grad is not None
            for inner in torch_optimizers(training.optimizer)
            for group in inner.param_groups
            for p in group["params"]
        )


def test_a_reference_that_waits_scores_the_same(groups, tiny_dense_dir):
    vocab_size, batch = read_hf_config(tiny_dense_dir).vocab_size, make_batch()
    chunks = loaded(tiny_dense_dir, groups)
    (want,) = forward_only(Policy(chunks, groups, vocab_size), [batch])
    waits = Policy(chunks, groups, vocab_size, host=frozen_weights(chunks, CPU))
    outside = [p.data_ptr() for p in chunks[0].parameters()]
    for _ in range(2):
        (got,) = forward_only(waits, [batch])
        assert torch.equal(got.logprobs, want.logprobs) and want.logprobs.any()
        assert [p.data_ptr() for p in chunks[0].parameters()] == outside
