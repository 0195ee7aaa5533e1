"""From sequences, wherever they lie, to this rank's share of them and its micro-batches.

Every rank knows the columns of all sequences, plans the same and asks for its own: no rank ever holds the batch, but
for those whose it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcore_rl.config import RunConfig
from mcore_rl.data.packing import (
    Numbers,
    Packed,
    balance,
    loss_weights,
    of_units,
    pack,
    packed_length,
    split_mini_batches,
)
from mcore_rl.data.preferences import PairIds
from mcore_rl.data.sequences import Columns, Sample, Sequences, counts_of, ragged
from mcore_rl.model.checkpoint import Progress
from mcore_rl.parallel.collectives import max_over_ranks, on_every_rank, send_flat
from mcore_rl.parallel.groups import Groups
from mcore_rl.planning.plan import Plan
from mcore_rl.types import PackedBatch

Metrics = dict[str, float]
Forms = dict[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of an entry of each flat array


@dataclass(frozen=True, eq=False)
class Share:
    """A step's sequences as this rank has them; ranks that share micro-batches have the same.

    Attributes:
        columns: of all N sequences.
        of_ranks: [data-parallel rank] numbers of the sequences that it has.
        mine: those of this rank, in the order of their numbers.
        weights: [n] of `mine`, of each loss token in its global mini-batch.
        mini_batches: [mini_batch][micro_batch] places in `mine`.
    """

    columns: Columns
    of_ranks: list[Numbers]
    mine: Sequences
    weights: NDArray[np.float64]
    mini_batches: list[list[Numbers]]

    @property
    def run_frac(self) -> float:
        """Of all sequences, those that go through the model."""
        return sum(map(len, self.of_ranks)) / max(1, len(self.columns))


def read_examples(plan: Plan, groups: Groups, done: Progress) -> tuple[Sequences, Progress, Metrics]:
    """This rank's part of the step's given responses, which is encoded here: one an example (SFT), or chosen and
    rejected after each other (preference pairs)."""
    task, count = plan.task, plan.config.batch.prompts_per_step
    first, last = (done.prompts_seen + count * r // groups.world_size for r in (groups.rank, groups.rank + 1))

    def read() -> list[Sample]:
        if "pairs" in plan.algorithm.needs:
            return [s for i in range(first, last) for s in pair_samples(task.pair_example(i))]
        return [given_sample(*task.sft_example(i)) for i in range(first, last)]

    samples: list[Sample] = []
    lengths = on_every_rank(groups, lambda: samples.extend(read()) or [s.num_response for s in samples])
    everything = [n for of_rank in lengths for n in of_rank]
    metrics = {"response/length_mean": sum(everything) / len(everything)}
    return Sequences.of(samples), replace(done, prompts_seen=done.prompts_seen + count), metrics


def given_sample(prompt: tuple[int, ...], response: tuple[int, ...]) -> Sample:
    """A response that no engine sampled."""
    return Sample((*prompt, *response), len(response))


def pair_samples(pair: PairIds) -> list[Sample]:
    """[chosen, rejected] of one preference pair."""
    prompt, chosen, rejected = pair
    return [given_sample(prompt, chosen), given_sample(prompt, rejected)]


def on_rank_0_alone(groups: Groups, samples: list[Sample]) -> Sequences:
    """Samples that every rank knows, as owned by the first."""
    return Sequences.of(samples if groups.rank == 0 else [])


def step_seed(config: RunConfig, step: int) -> int:
    """A seed for everything random in one step, far from every other step's and run's."""
    return (config.seed * 1_000_003 + step) * 1_000


def share_of_step(plan: Plan, groups: Groups, owned: Sequences, step: int) -> Share:
    """This rank's share of what a step trains on, shuffled into its mini-batches; see `deal`."""
    batch, unit = plan.config.batch, plan.algorithm.unit
    columns, forms = gathered(groups, owned)
    parts = split_mini_batches(sum(map(len, columns)), batch.mini_batches, step_seed(plan.config, step), unit)
    return _dealt(plan, groups, owned, columns, forms, parts, unit, idle_at_zero=zero_advantage_is_idle(plan))


def zero_advantage_is_idle(plan: Plan) -> bool:
    """Whether a sequence of advantage 0 leaves the gradient exactly as it is: nothing but the advantage moves it."""
    algorithm, model = plan.algorithm, plan.config.model
    return (
        algorithm.scales_with_advantage
        and "critic" not in algorithm.needs
        and algorithm.kl_coef == algorithm.entropy_coef == model.moe_aux_loss_coef == 0
    )


def deal(plan: Plan, groups: Groups, owned: Sequences, counts: Sequence[int] | None = None, unit: int = 1) -> Share:
    """This rank's share of the sequences that the ranks own, rank 0's first. Collective.

    Args:
        owned: none (`Sequences.of([])`) where a rank has nothing to give.
        counts: sequences of each mini-batch, in their order; None: one of all.
        unit: this many consecutive sequences stay in one micro-batch.
    """
    columns, forms = gathered(groups, owned)
    total = sum(map(len, columns))
    bounds = np.cumsum([0, *(counts or [total])])
    assert bounds[-1] == total, f"{total} sequences for mini-batches of {counts}"
    return _dealt(plan, groups, owned, columns, forms, [np.arange(a, b) for a, b in zip(bounds, bounds[1:])], unit)


def gathered(groups: Groups, owned: Sequences) -> tuple[list[Columns], Forms]:
    """[rank] columns of what each owns, and dtype and shape of an entry of every flat array that there is."""
    forms = {name: (x.dtype, x.shape[1:]) for name, x in owned.arrays().items()} if len(owned) else {}
    found = on_every_rank(groups, lambda: (owned.columns, forms))
    known = next((f for _, f in found if f), {name: (x.dtype, x.shape[1:]) for name, x in owned.arrays().items()})
    return [columns for columns, _ in found], known


def _dealt(
    plan: Plan,
    groups: Groups,
    owned: Sequences,
    of_owners: list[Columns],
    forms: Forms,
    parts: list[Numbers],
    unit: int,
    idle_at_zero: bool = False,
) -> Share:
    columns, layout, config = Columns.joined(of_owners), groups.layout, plan.config
    sizes = filled_up(columns.positions, layout.segment_multiple)
    weights = np.zeros(len(columns))
    for part in parts:
        weights[part] = loss_weights(columns.take(part), plan.algorithm, config.rollout.max_response_tokens)
    runs = (columns.num_loss > 0) & ((columns.advantages != 0) | (not idle_at_zero))
    runs = np.repeat(runs.reshape(-1, unit).any(1), unit) if unit > 1 else runs
    parts = [part[runs[part]] for part in parts]
    planned = [_spread(sizes, part, layout.dp, config.batch.micro_batch_tokens, rounds_of(groups), unit)
               for part in parts]  # fmt: skip
    of_ranks = [np.sort(np.concatenate([np.empty(0, np.int64), *(n for p in planned for n in p[r])]))
                for r in range(layout.dp)]  # fmt: skip
    wanted = of_ranks[groups.coords.dp]
    mine = _brought(groups, owned, of_owners, forms, of_ranks)
    places = [[np.searchsorted(wanted, numbers) for numbers in p[groups.coords.dp]] for p in planned]
    return Share(columns, of_ranks, mine, weights[wanted], places)


def _spread(sizes: Numbers, part: Numbers, ranks: int, budget: int, rounds: int, unit: int) -> list[list[Numbers]]:
    """[rank][micro_batch] numbers of the sequences of one mini-batch."""
    of_unit = sizes[part].reshape(-1, unit).sum(1)
    spread = balance(of_unit, ranks, budget, rounds)
    return [[part[of_units(np.array(units, np.int64), unit)] for units in of_rank] for of_rank in spread]


def brought(groups: Groups, owned: Sequences, wanted: list[Numbers]) -> Sequences:
    """Sequences of this rank, in the order asked for, from the ranks that own them. Collective.

    Args:
        wanted: [data-parallel rank] numbers of sequences, rank 0's first.
    """
    of_owners, forms = gathered(groups, owned)
    order = [np.argsort(numbers) for numbers in wanted]
    ascending = [numbers[o] for numbers, o in zip(wanted, order)]
    found = _brought(groups, owned, of_owners, forms, ascending)
    return found.take(np.argsort(order[groups.coords.dp]))


def _brought(
    groups: Groups, owned: Sequences, of_owners: list[Columns], forms: Forms, of_ranks: list[Numbers]
) -> Sequences:
    """As `brought`, of ascending numbers."""
    wanted, layout = of_ranks[groups.coords.dp], groups.layout
    bounds = np.cumsum([0, *map(len, of_owners)])  # numbers of each owner's sequences
    mine = Columns.joined(of_owners).take(wanted)
    arrays, sizes = {}, [{} for _ in of_owners]
    for name, (dtype, shape) in forms.items():
        counts = counts_of(mine, name)
        arrays[name] = np.empty((int(counts.sum()), *shape), dtype)
        for owner in range(len(of_owners)):
            a, b = np.searchsorted(wanted, bounds[owner : owner + 2])
            sizes[owner][name] = int(counts[a:b].sum())
    first, last = bounds[groups.rank : groups.rank + 2]

    def given(rank: int) -> dict[str, NDArray]:
        numbers = _within(of_ranks[layout.coords(rank).dp], first, last) - first
        return {name: x[ragged(owned.counts(name), numbers)] for name, x in owned.arrays().items()}

    asking = [r for r in range(groups.world_size) if len(_within(of_ranks[layout.coords(r).dp], first, last))]
    send_flat(groups, given, sizes, arrays, asking)
    return Sequences(mine, **arrays)


def _within(numbers: Numbers, first: int, last: int) -> Numbers:
    """Those of ascending numbers that are in [first, last)."""
    a, b = np.searchsorted(numbers, (first, last))
    return numbers[a:b]


def rounds_of(groups: Groups) -> int:
    """The number of micro-batches is a multiple of this: the interleaved pipeline schedule works in rounds of pp."""
    return groups.layout.pp if groups.layout.vpp > 1 else 1


def filled_up(lengths: Numbers, multiple: int) -> Numbers:
    return -(-lengths // multiple) * multiple


def full_batches(plan: Plan, groups: Groups, share: Share, unit: int = 1) -> list[Packed]:
    """All of this rank's share in as few micro-batches as hold it, as many as on every other rank. Collective."""
    sizes = filled_up(share.mine.columns.positions, groups.layout.segment_multiple)
    budget, rounds = plan.config.batch.micro_batch_tokens, rounds_of(groups)
    everything = np.arange(len(share.mine))
    (own,) = _spread(sizes, everything, 1, budget, rounds, unit)
    most = int(max_over_ranks(groups, len(own)))
    if most > len(own):
        spread = balance(sizes.reshape(-1, unit).sum(1), 1, budget, rounds, least=most)[0]
        own = [of_units(np.array(units, np.int64), unit) for units in spread]
    return packed(groups, share.mine, own)


def packed(groups: Groups, sequences: Sequences, parts: Sequence[Numbers]) -> list[Packed]:
    """A micro-batch of each part, on this rank's device; pipeline stages exchange tensors of one length."""
    layout = groups.layout
    segment, multiple = layout.segment_multiple, layout.batch_multiple
    if layout.pp > 1:
        multiple = max(packed_length(sequences.columns, part, segment, multiple) for part in parts)
    return [pack(sequences, part, segment, multiple).to(groups.device) for part in parts]


def bare(batches: Sequence[Packed]) -> list[PackedBatch]:
    """What a model reads of them."""
    return [b.batch for b in batches]


def flat_responses(share: Share, batches: Sequence[Packed], values: Sequence[Tensor]) -> Tensor:
    """[response tokens of the share] of numbers that a model gave [T] of its micro-batches; 0 where it gave none."""
    device = batches[0].response_at.device
    dtype = values[0].dtype if values else torch.float32
    flat = torch.zeros(int(share.mine.columns.num_response.sum()), dtype=dtype, device=device)
    for packed_, value in zip(batches, values, strict=bool(values)):
        mask = packed_.batch.loss_mask
        flat[packed_.response_at[mask]] = value[mask].detach()
    return flat


def flat_positions(share: Share, batches: Sequence[Packed], values: Sequence[Tensor]) -> Tensor:
    """[positions of the share, ...] of an entry a position [T, ...] of the micro-batches."""
    flat = values[0].new_zeros((int(share.mine.columns.positions.sum()), *values[0].shape[1:]))
    for packed_, value in zip(batches, values, strict=True):
        if len(flat):  # else there are batches of no sequence only
            flat[packed_.position_at[packed_.is_real]] = value[packed_.is_real]
    return flat
