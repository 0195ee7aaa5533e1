"""Packing: positions, masks and weights by hand; nothing lost, budgets kept, every rank the same count."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.algorithms import load
from mcore_rl.data.packing import balance, pack, split_mini_batches
from mcore_rl.data.scores import batch_of
from mcore_rl.data.sequences import Sample, Sequences, sequences_of
from mcore_rl.types import Prompt, RolloutGroup, Trajectory
from tools.bench.batches import pack_mini_batch


def test_pack_by_hand():
    samples = [Sample((5, 6, 7, 1), 2, 0.5, (-0.1, -0.2), label=3), Sample((8, 9, 1), 1, -1.0, (-0.3,))]
    assert batch_of(samples, [0.25, 0.5], multiple=5).cu_seqlens.tolist() == [0, 3, 5]
    batch = batch_of(samples, [0.25, 0.5], multiple=4)
    assert batch.labels.tolist() == [3, 0, 0]
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
    routes = np.arange(3, dtype=np.uint8)[:, None, None] + np.zeros((1, 2, 1), np.uint8)  # [n-1, L, K]
    samples = [
        Sample((5, 6, 7, 1), 2, 0.5, (-0.1, -0.2), expert_ids=routes),
        Sample((8, 9, 1), 1, -1.0, (-0.3,), expert_ids=routes[:2]),
    ]
    batch = batch_of(samples, [0.25, 0.5], segment_multiple=4)
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
            assert len(b) == 1 or sum(lengths[i] for i in b) <= budget, "only what is too long alone is over it"


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
    again, other = (split_mini_batches(10, 4, seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other))
    with pytest.raises(ValueError, match="mini_batches=4"):
        split_mini_batches(3, 4, seed=0)


def test_samples_carry_group_advantages():
    def trajectory(reward):
        return Trajectory((1, 2), (3, 4), (-0.1, -0.2), "stop", 0, reward=reward)

    group = RolloutGroup(Prompt("0", (1, 2), "x"), (trajectory(1.0), trajectory(0.0)))
    samples = sequences_of([group], load("grpo", advantage_eps=0.0))
    assert samples.columns.advantages.tolist() == [1.0, -1.0]
    assert samples.token_ids.tolist() == [1, 2, 3, 4] * 2 and samples.columns.num_response.tolist() == [2, 2]


def test_one_long_sequence_does_not_raise_the_limit_of_the_others():
    """A bin for each rank and the long one: 100, 10 + 10 and 10 + 10, not 100 and 40."""
    (bins,) = balance([100, 10, 10, 10, 10], num_ranks=1, budget=20)
    assert sorted(sorted(b) for b in bins) == [[0], [1, 3], [2, 4]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12), st.data())
def test_every_position_knows_where_it_came_from(shapes, data):
    """Whatever fills up, in whatever order: flat arrays that are laid into batches come back as they were."""
    samples = [Sample(np.arange(p + r) + 100 * i, r, 0.1 * i, -np.arange(r)) for i, (p, r) in enumerate(shapes)]
    for sample in samples:
        sample.loss_mask[::2] = data.draw(st.booleans())
    sequences = Sequences.of(samples)
    numbers = np.array(data.draw(st.permutations(range(len(samples)))))
    cut = data.draw(st.integers(0, len(samples)))
    multiples = data.draw(st.sampled_from([(1, 1), (1, 5), (4, 4), (4, 12)]))
    parts = [pack(sequences, part, *multiples) for part in (numbers[:cut], numbers[cut:])]
    tokens = torch.zeros(int(sequences.columns.positions.sum()), dtype=torch.int64)
    found = torch.zeros(len(sequences.rollout_logprobs))
    for packed in parts:
        real, mask = packed.is_real, packed.batch.loss_mask
        tokens[packed.position_at[real]] = packed.batch.targets[real]
        found[packed.response_at[mask]] = packed.of_responses(torch.from_numpy(sequences.rollout_logprobs))[mask]
        assert torch.equal(packed.sequence_at[real], packed.batch.targets[real] // 100)
        assert torch.equal(packed.of_positions(torch.arange(len(tokens))[:, None, None])[real][:, 0, 0],
                           packed.position_at[real])  # fmt: skip
        assert packed.batch.token_ids.numel() % multiples[1] == 0
    assert tokens.tolist() == [t for s in samples for t in s.token_ids[1:].tolist()]
    want = np.where(sequences.loss_mask, sequences.rollout_logprobs, 0)
    assert torch.equal(found, torch.from_numpy(want.astype(np.float32)))


def test_taking_and_joining_sequences_loses_nothing():
    samples = [Sample(np.arange(n + 2), n, lags=np.full(n, n), expert_ids=np.full((n + 1, 2, 1), n)) for n in (3, 1, 2)]
    sequences, order = Sequences.of(samples), np.array([2, 0])
    assert [x.tolist() for x in sequences.take(order).split("lags")] == [[2, 2], [3, 3, 3]]
    assert sequences.take(order).expert_ids[:, 0, 0].tolist() == [2] * 3 + [3] * 4
    back = Sequences.of([samples[2], samples[0]])
    for name, array in back.arrays().items():
        assert np.array_equal(array, getattr(sequences.take(order), name))
    assert sequences.num_bytes == 4 * 12 + 9 * 6 + 8 * 9 * 2 + 36 * 3  # int64 routes here
