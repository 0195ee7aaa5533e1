"""Generalised advantage estimation and whitening against a recursion written token by token."""

import pytest
import torch
from loss_batches import F64

from mcore_rl.functional.advantage import gae, terminal_rewards, whiten


def recursion(rewards, values, mask, segments, gamma, lam):
    """A_t = delta_t + gamma lam A_{t+1} from the last token back; a masked token hands on what it was given."""
    advantages = [0.0] * len(rewards)
    value_ahead = advantage_ahead = 0.0
    for t in reversed(range(len(rewards))):
        if t + 1 < len(rewards) and segments[t + 1] != segments[t]:
            value_ahead = advantage_ahead = 0.0
        if mask[t]:
            advantage_ahead = rewards[t] + gamma * value_ahead - values[t] + gamma * lam * advantage_ahead
            value_ahead = values[t]
            advantages[t] = advantage_ahead
    return torch.tensor(advantages, dtype=F64)


def one_sequence(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    r, v = (torch.randn(n, generator=g, dtype=F64) for _ in range(2))
    return r, v, torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_recursion_on_packed_sequences(gamma, lam, seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (5,), generator=g)
    segments = torch.repeat_interleave(torch.arange(5), lengths)
    n = len(segments)
    mask = torch.rand(n, generator=g) < 0.6
    rewards, values = (torch.randn(n, generator=g, dtype=F64) for _ in range(2))
    expected = recursion(rewards.tolist(), values.tolist(), mask.tolist(), segments.tolist(), gamma, lam)
    poison = torch.where(mask, 0.0, torch.nan)
    advantages, returns = gae(rewards + poison, values + poison, mask, segments, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), rtol=1e-12, atol=1e-13)


def test_gamma_and_lambda_one_is_return_minus_value():
    r, v, mask, segments = one_sequence(9)
    advantages, returns = gae(r, v, mask, segments, gamma=1, lam=1)
    to_go = r.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(returns, to_go, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(advantages, to_go - v, rtol=1e-12, atol=1e-14)


def test_lambda_zero_is_the_temporal_difference():
    r, v, mask, segments = one_sequence(9)
    advantages, _ = gae(r, v, mask, segments, gamma=0.9, lam=0)
    following = torch.cat([v[1:], torch.zeros(1, dtype=F64)])
    torch.testing.assert_close(advantages, r + 0.9 * following - v, rtol=1e-13, atol=0)


def test_constant_values_and_a_terminal_reward():
    n, lam, score, c = 7, 0.95, 1.7, 0.3
    _, _, mask, segments = one_sequence(n)
    rewards = terminal_rewards(torch.full((n,), score, dtype=F64), mask, segments)
    assert rewards.tolist() == [0.0] * 6 + [1.7]
    advantages, _ = gae(rewards, torch.full((n,), c, dtype=F64), mask, segments, gamma=1, lam=lam)
    expected = [lam ** (n - 1 - t) * (score - c) for t in range(n)]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12)


def test_inserted_masked_tokens_change_nothing():
    r, v, mask, segments = one_sequence(8)
    plain, _ = gae(r, v, mask, segments, gamma=0.97, lam=0.9)
    at = [3, 3, 6]
    order = sorted([*range(8), *(p - 0.5 for p in at)])
    wide = torch.tensor([float(int(x)) == x for x in order])
    r2, v2 = torch.full((11,), 5.0, dtype=F64), torch.full((11,), 9.0, dtype=F64)
    r2[wide], v2[wide] = r, v
    got, returns = gae(r2, v2, wide, torch.zeros(11, dtype=torch.long), gamma=0.97, lam=0.9)
    assert torch.equal(got[wide], plain)
    assert (got[~wide] == 0).all() and (returns[~wide] == 0).all()
    zeroed, _ = gae(r2 * wide, v2 * wide, torch.ones(11, dtype=torch.bool), segments.new_zeros(11), gamma=0.97, lam=0.9)
    assert (zeroed[wide] - plain).abs().max() > 0.05  # treating masked tokens as steps of value 0 is something else


def test_terminal_reward_is_at_the_last_sampled_token_of_each_sequence():
    scores = torch.tensor([2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0], dtype=F64)
    mask = torch.tensor([False, True, True, False, False, False, True])
    segments = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    assert terminal_rewards(scores, mask, segments).tolist() == [0, 0, 2, 0, 0, 0, 4]


def test_nothing_sampled():
    zeros, none = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=torch.bool)
    segments = torch.zeros(3, dtype=torch.long)
    assert gae(zeros, zeros, none, segments, gamma=1, lam=1)[0].tolist() == [0, 0, 0]
    assert terminal_rewards(zeros + 1, none, segments).tolist() == [0, 0, 0]


def test_whitening_by_sums_is_one_map_for_all_parts():
    g = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(50, generator=g, dtype=F64)
    mask = torch.rand(50, generator=g) < 0.7
    sums = [torch.tensor(0.0, dtype=F64)] * 3
    for part in (slice(0, 11), slice(11, 50)):  # as ranks would
        y = x[part][mask[part]]
        sums = [s + p for s, p in zip(sums, (torch.tensor(len(y)), y.sum(), y.square().sum()))]
    named = dict(zip(("count", "total", "square_total"), sums))
    got = whiten(torch.where(mask, x, torch.nan), mask, **named)
    kept = x[mask]
    expected = (kept - kept.mean()) / (kept.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(got[mask], expected, rtol=1e-10, atol=1e-12)
    assert (got[~mask] == 0).all()
