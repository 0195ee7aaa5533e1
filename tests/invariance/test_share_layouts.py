"""Every rank is given its share of the sequences and nothing else, whoever owned them and in whatever layout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from worlds import each_world, run_worlds

OWNERS = ("first", "all", "last_two")
LAYOUTS = {
    1: [dict()],
    2: [dict(dp=2), dict(tp=2), dict(pp=2)],
    4: [dict(dp=4), dict(dp=2, tp=2), dict(dp=2, cp=2), dict(pp=2, dp=2)],
}


def samples_of_all() -> list:
    """Uneven lengths; every token says whose it is."""
    from mcore_rl.data.sequences import Sample

    rng, found = np.random.default_rng(0), []
    for i in range(23):
        prompt, response = int(rng.integers(1, 9)), int(rng.integers(1, 40))
        length = prompt + response
        found.append(
            Sample(
                np.arange(length) + 100 * i,
                response,
                advantage=float(i % 3),
                rollout_logprobs=-np.arange(response) - i,
                lags=np.full(response, i),
                expert_ids=np.full((length - 1, 2, 3), i, np.uint8),
                loss_mask=np.zeros(response, bool) if i == 5 else np.arange(response) % 4 != 1,
                label=i,
            )
        )
    return found


def owned_by(groups, owners: str) -> list:
    """Consecutive parts of all, in the order of the ranks that own any."""
    who = {"first": [0], "all": list(range(groups.world_size)), "last_two": list(range(groups.world_size))[-2:]}[owners]
    if groups.rank not in who:
        return []
    everything, place = samples_of_all(), who.index(groups.rank)
    return everything[len(everything) * place // len(who) : len(everything) * (place + 1) // len(who)]


def run_case(case: dict, groups) -> None:
    from mcore_rl.algorithms import load
    from mcore_rl.config import parse_config
    from mcore_rl.data.sequences import Sequences
    from mcore_rl.parallel.collectives import gather_objects
    from mcore_rl.step.batches import brought, deal, full_batches, packed, share_of_step

    everything = Sequences.of(samples_of_all())
    config = parse_config({"name": "x", "model": {"path": "m"}, "batch": {"micro_batch_tokens": 90, "mini_batches": 3}})
    plan = SimpleNamespace(config=config, algorithm=load("grpo"))
    for owners in OWNERS:
        owned = Sequences.of(owned_by(groups, owners))
        for share in (deal(plan, groups, owned), share_of_step(plan, groups, owned, step=1)):
            numbers = share.of_ranks[groups.coords.dp]
            assert len(share.columns) == 23 and np.array_equal(share.columns.labels, np.arange(23))
            for name, array in everything.take(numbers).arrays().items():
                assert np.array_equal(array, getattr(share.mine, name)), (owners, name)
                assert array.dtype == getattr(share.mine, name).dtype
            assert np.array_equal(share.mine.columns.labels, numbers)
            everyone = np.concatenate(share.of_ranks)
            assert sorted(everyone) == sorted(set(everyone)), "no sequence is at two data-parallel ranks"
            assert 5 not in everyone, "without a loss token nothing is run"
        # `share_of_step` came last: advantages of 0 stay at home too
        assert set(everyone) == {i for i in range(23) if i % 3 and i != 5} and share.run_frac == len(everyone) / 23
        batches = full_batches(plan, groups, share) + [
            p for parts in share.mini_batches for p in packed(groups, share.mine, parts)
        ]
        counts = gather_objects(groups, [len(share.mini_batches), *map(len, share.mini_batches), len(batches)])
        assert all(count == counts[0] for count in counts), "every rank runs as many micro-batches"
        assert sum(p.batch.loss_mask.sum().item() for p in batches) == 2 * share.mine.loss_mask.sum()
        back = [np.array([], np.int64) if dp % 2 else np.arange(22, -1, -1) for dp in range(groups.layout.dp)]
        found = brought(groups, owned, back)
        assert np.array_equal(found.token_ids, everything.take(back[groups.coords.dp]).token_ids)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_rank_gets_its_own_and_nothing_else(ranks):
    run_worlds(__file__, [{"layout": layout} for layout in LAYOUTS[ranks]], ranks)


if __name__ == "__main__":
    each_world(sys.argv[1], run_case)
