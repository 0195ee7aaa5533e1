"""Packing: positions, masks and weights by hand; nothing lost, budgets kept, every rank the same count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.algorithms import load
from mcore_rl.data.packing import Sample, balance, pack, pack_mini_batch, pad, samples_of, split_mini_batches
from mcore_rl.types import Prompt, RolloutGroup, Trajectory


def test_pack_by_hand():
    packed = pack(
        [Sample((5, 6, 7, 1), 2, 0.5, (-0.1, -0.2)), Sample((8, 9, 1), 1, -1.0, (-0.3,))], weights=[0.25, 0.5]
    )
    assert packed.cu_seqlens.tolist() == [0, 3, 5] and pad(packed, 5) is packed
    batch = pad(packed, 4)
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch.targets.tolist() == [6, 7, 1, 9, 1, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert batch.loss_mask.tolist() == [False, True, True, False, True, False, False, False]
    assert batch.weights.tolist() == [0, 0.25, 0.25, 0, 0.5, 0, 0, 0]
    assert batch.advantages.tolist() == [0, 0.5, 0.5, 0, -1, 0, 0, 0]
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor([0, -0.1, -0.2, 0, -0.3, 0, 0, 0]))


def test_sequences_are_filled_up_behind_their_end():
    routes = torch.arange(3)[:, None, None] + torch.zeros(1, 2, 1, dtype=torch.long)  # [n-1, L, K]
    samples = [
        Sample((5, 6, 7, 1), 2, 0.5, (-0.1, -0.2), expert_ids=routes),
        Sample((8, 9, 1), 1, -1.0, (-0.3,), expert_ids=routes[:2]),
    ]
    batch = pack(samples, [0.25, 0.5], segment_multiple=4)
    assert batch.token_ids.tolist() == [5, 6, 7, 0, 8, 9, 0, 0]
    assert batch.targets.tolist() == [6, 7, 1, 0, 9, 1, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3] * 2
    assert batch.segment_ids.tolist() == [0] * 4 + [1] * 4
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.loss_mask.tolist() == [False, True, True, False, False, True, False, False]
    assert batch.weights.tolist() == [0, 0.25, 0.25, 0, 0, 0.5, 0, 0]
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor([0, -0.1, -0.2, 0, 0, -0.3, 0, 0]))
    assert batch.rollout_expert_ids[:, 0, 0].tolist() == [0, 1, 2, 0, 0, 1, 0, 1]


def test_the_budget_counts_what_fills_sequences_up():
    samples = [Sample((1,) * 6, 2, 0.0, (0.0, 0.0)) for _ in range(4)]  # 5 positions, 8 when filled up

    def sizes(**multiples):
        batches = pack_mini_batch(samples, load("grpo"), rank=0, num_ranks=1, budget=16, max_response=8, **multiples)
        return [batch.token_ids.numel() for batch in batches]

    assert sizes() == [10, 10] and sizes(segment_multiple=8, multiple=8) == [16, 16]
    assert sizes(segment_multiple=12, multiple=12) == [12] * 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 80))
def test_balance_loses_nothing_and_keeps_the_budget(lengths, ranks, budget):
    plan = balance(lengths, ranks, budget)
    assert sorted(i for rank in plan for b in rank for i in b) == list(range(len(lengths)))
    assert len({len(rank) for rank in plan}) == 1
    for rank in plan:
        for b in rank:
            assert sum(lengths[i] for i in b) <= max(budget, max(lengths))


def test_balance_is_even():
    plan = balance([10] * 16, num_ranks=2, budget=40)
    assert [[len(b) for b in rank] for rank in plan] == [[4, 4], [4, 4]]


def test_a_rank_without_sequences_takes_part_with_weight_zero():
    samples = [Sample((5, 6, 1), 1, 1.0, (-0.5,))]
    parts = [pack_mini_batch(samples, load("grpo"), rank=r, num_ranks=2, budget=100, max_response=8) for r in (0, 1)]
    assert [len(p) for p in parts] == [1, 1]
    assert parts[0][0].weights.sum().item() == 1.0
    assert not parts[1][0].loss_mask.any() and parts[1][0].weights.sum().item() == 0.0


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [5, 11, 1000])
def test_weights_do_not_depend_on_the_cut(ranks, budget):
    samples = [Sample(tuple(range(n + 3)), n, 1.0, (-0.5,) * n) for n in (1, 4, 2, 7, 3)]
    batches = [
        b
        for r in range(ranks)
        for b in pack_mini_batch(samples, load("grpo"), rank=r, num_ranks=ranks, budget=budget, max_response=8)
    ]
    weights = torch.cat([b.weights for b in batches])
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-6)
    assert sorted(set(round(1 / (5 * w), 3) for w in weights.tolist() if w)) == [1, 2, 3, 4, 7]


def test_mini_batches():
    parts = split_mini_batches(10, 4, seed=3)
    assert sorted(i for p in parts for i in p) == list(range(10))
    assert sorted(len(p) for p in parts) == [2, 2, 3, 3]
    assert parts == split_mini_batches(10, 4, seed=3) != split_mini_batches(10, 4, seed=4)
    with pytest.raises(ValueError, match="mini_batches=4"):
        split_mini_batches(3, 4, seed=0)


def test_samples_carry_group_advantages():
    def trajectory(reward):
        return Trajectory((1, 2), (3, 4), (-0.1, -0.2), "stop", 0, reward=reward)

    group = RolloutGroup(Prompt("0", (1, 2), "x"), (trajectory(1.0), trajectory(0.0)))
    samples = samples_of([group], load("grpo", advantage_eps=0.0))
    assert [s.advantage for s in samples] == [1.0, -1.0]
    assert samples[0].token_ids == (1, 2, 3, 4) and samples[0].num_response == 2
