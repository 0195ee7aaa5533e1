"""Known mistakes of RL on mixtures of experts that no configuration can ask for.

What can be asked for and is refused or warned of is in test_lint.py: clips of the other kind of ratio, token means
with GSPO, bf16 with GSPO's clip, one response a prompt, an auxiliary loss.
"""

from types import SimpleNamespace

import pytest
from loss_batches import make_group

from mcore_rl.algorithms import available, load
from mcore_rl.config import ModelConfig, parse_config
from mcore_rl.data.packing import split_mini_batches
from mcore_rl.data.sequences import sequences_of
from mcore_rl.model.build import read_hf_config, transformer_config
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.roles.policy import as_policy
from tools.bench.batches import pack_mini_batch


@pytest.mark.parametrize("name", ["cispo", "gspo", "sapo"])
def test_dual_clip_with_a_loss_that_has_none(name):
    with pytest.raises(ValueError, match="no field 'dual_clip'"):
        load(name, dual_clip=3.0)


@pytest.mark.parametrize("mini_batches", [1, 2, 4])
def test_mini_batches_that_split_a_group_keep_its_statistics(mini_batches):
    """Advantages are made before the rollout is shuffled and cut: a response keeps the one of its whole group."""
    algorithm = load("grpo", advantage_eps=0.0)
    groups = [make_group(1.0, 0.0, 0.0, 0.0, id=str(i)) for i in range(2)]
    samples = sequences_of(groups, algorithm)
    parts = split_mini_batches(len(samples), mini_batches, seed=0)
    found = []
    for part in parts:
        (batch,) = pack_mini_batch(samples.take(part), algorithm, rank=0, num_ranks=1, budget=99, max_response=9)
        found += batch.advantages[batch.loss_mask][::2].tolist()  # responses of two tokens
    assert sorted(found) == pytest.approx([-(3**-0.5)] * 6 + [3**0.5] * 2, rel=1e-6)
    if mini_batches == 4:
        assert any({i // 4 for i in part} == {0, 1} for part in parts), "groups are split here"


@pytest.mark.parametrize("name", available())
def test_the_sampling_temperature_is_that_of_the_training_pass(name):
    """There is one number: `rollout.temperature`. Given responses were not sampled, their likelihood is the model's."""
    algorithm = load(name)
    plan = SimpleNamespace(
        config=parse_config({"name": "x", "model": {"path": "m"}, "rollout": {"temperature": 0.6}}),
        algorithm=algorithm,
        hf_config=SimpleNamespace(vocab_size=8),
    )
    assert as_policy(plan, None, []).temperature == (0.6 if algorithm.needs_rollouts else 1.0)


def test_no_router_bias_is_updated(tiny_moe_dir):
    """Megatron would move it after every step to balance the experts, reward or not."""
    config = transformer_config(read_hf_config(tiny_moe_dir), ModelConfig(path="m"), ParallelLayout())
    assert config.moe_router_enable_expert_bias is False
