"""What the numbers allow to be said, claim by claim: a pure function of statistics and their intervals.

guaranteed-holds  it is proved, and these numbers obey it within rounding
supported         the interval lies on the claim's side, in every replicate, and there are enough replicates
not shown         anything else: no data, an interval that holds both sides, too few seeds, below the noise floor
contradicted      proved and broken, which is a bug; or the interval lies on the other side in every replicate
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moe.measure.stats import Estimate

Estimates = Mapping[str, Estimate]
FLOOR = 10.0  # a variance counts from this many times that of the same weights measured twice
FEW_SEEDS = 3


class Standing(StrEnum):
    HOLDS = "guaranteed-holds"
    SUPPORTED = "supported"
    NOT_SHOWN = "not shown"
    CONTRADICTED = "contradicted"


@dataclass(frozen=True)
class Finding:
    """What one replicate says of a claim: for it (True), against it (False), or undecided, and the number."""

    side: bool | None
    text: str


Judge = Callable[[Estimates], Finding | None]  # None: the statistics it needs are not there


@dataclass(frozen=True)
class Claim:
    """One sentence that can be wrong.

    Attributes:
        key: short name. step: of the argument it belongs to, 1 to 7.
        text: the sentence. judge: what says so.
        proved: a theorem, so that being broken is a bug.
        seeds: replicates below which it is not called supported; 1 for a statement about this very pair.
        source: where it was claimed, or what proves it.
        needs: the command that measures it.
    """

    key: str
    step: int
    text: str
    judge: Judge
    needs: str
    source: str
    proved: bool = False
    seeds: int = FEW_SEEDS


@dataclass(frozen=True)
class Verdict:
    """A claim's standing, why, and what each replicate found."""

    claim: Claim
    standing: Standing
    reason: str
    findings: tuple[tuple[str, str], ...]  # replicate, number


def judge(claim: Claim, replicates: Mapping[str, Estimates]) -> Verdict:
    """The standing of one claim on all replicates."""
    found = {name: finding for name, e in replicates.items() if (finding := claim.judge(e)) is not None}
    texts = tuple((name, finding.text) for name, finding in found.items())

    def verdict(standing: Standing, reason: str) -> Verdict:
        return Verdict(claim, standing, reason, texts)

    if not found:
        return verdict(Standing.NOT_SHOWN, _missing(claim, replicates))
    sides = [finding.side for finding in found.values()]
    if claim.proved:
        if all(sides):
            return verdict(Standing.HOLDS, "as proved, within rounding")
        return verdict(Standing.CONTRADICTED, "a theorem is broken: the recording or the arithmetic is wrong")
    if None in sides:
        return verdict(Standing.NOT_SHOWN, "an interval holds both answers, or lies below the noise floor")
    if len(set(sides)) > 1:
        return verdict(Standing.NOT_SHOWN, "the replicates disagree")
    if len(sides) < claim.seeds:
        lean = "for" if sides[0] else "against"
        return verdict(Standing.NOT_SHOWN, f"{len(sides)} of {claim.seeds} seeds, {lean} it so far")
    if sides[0]:
        return verdict(Standing.SUPPORTED, f"in {len(sides)} of {len(sides)} replicates")
    return verdict(Standing.CONTRADICTED, f"the other way round in {len(sides)} of {len(sides)} replicates")


RAN = {
    "compare": "var_z",
    "sweep": "sweep/",
    "objectives": "objectives/",
    "mismatch": "mismatch/",
    "bench-exact": "exact/",
}


def _missing(claim: Claim, replicates: Mapping[str, Estimates]) -> str:
    """Whether the command was not run, or ran and had nothing to measure it by."""
    mark = RAN[claim.needs.split()[0]]
    if any(name.startswith(mark) for e in replicates.values() for name in e):
        return f"run, but not measurable: too few flips, or it needs all of moe-stability {claim.needs}"
    return f"not run yet: moe-stability {claim.needs}"


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 where a theorem is broken, else 0: an empirical claim that does not hold here is a finding, not a failure."""
    return int(any(v.claim.proved and v.standing is Standing.CONTRADICTED for v in verdicts))


# ---------------------------------------------------------------- how a claim is judged


def number(e: Estimate) -> str:
    """`0.12 [0.10, 0.15]`; the interval is left out where there is none."""
    if e.low == e.high:
        return f"{e.value:.3g}"
    return f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"


def side_of(e: Estimate, low: float, high: float) -> bool | None:
    """Whether an interval lies inside (low, high), outside of it, or neither."""
    if not all(map(math.isfinite, (e.value, e.low, e.high))):
        return None
    if low < e.low and e.high < high:
        return True
    return False if e.high <= low or e.low >= high else None


def within(name: str, low: float = -math.inf, high: float = math.inf, floored: bool = False) -> Judge:
    """The interval of `name` lies in (low, high).

    Args:
        floored: undecided unless both parts of the log-ratio are above the noise floor.
    """

    def judged(e: Estimates) -> Finding | None:
        if name not in e:
            return None
        if floored and (low_part := below_floor(e)):
            return Finding(None, f"{name} = {number(e[name])}, but {low_part}")
        return Finding(side_of(e[name], low, high), f"{name} = {number(e[name])}")

    return judged


def below_floor(e: Estimates) -> str:
    """Which part of the log-ratio cannot be told from the same weights measured twice; "" if none or unknown."""
    floor = e["floor/var_z"].value if "floor/var_z" in e else 0.0
    low = [name for name in ("var_w", "var_r") if name in e and e[name].value <= FLOOR * floor]
    return f"{' and '.join(low)} within {FLOOR:g} times the noise floor {floor:.2g}" if floor > 0 and low else ""


def at_most(name: str, bound: float) -> Judge:
    """A count or a rounding error does not exceed `bound`; NaN does."""

    def judged(e: Estimates) -> Finding | None:
        return Finding(e[name].value <= bound, f"{name} = {e[name].value:.3g}") if name in e else None

    return judged


def all_at_most(prefix: str, suffix: str, bound: float) -> Judge:
    """The same of every statistic that begins and ends so; the largest is told."""

    def judged(e: Estimates) -> Finding | None:
        found = {name: x.value for name, x in e.items() if name.startswith(prefix) and name.endswith(suffix)}
        if not found:
            return None
        worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
        text = f"largest of {len(found)}: {worst} = {found[worst]:.3g}"
        return Finding(all(x <= bound for x in found.values()), text)

    return judged


def apart(higher: str, lower: str) -> Judge:
    """The interval of one statistic lies above that of another; overlapping ones decide nothing."""

    def judged(e: Estimates) -> Finding | None:
        if higher not in e or lower not in e:
            return None
        a, b = e[higher], e[lower]
        side = True if a.low > b.high else False if a.high < b.low else None
        return Finding(side, f"{higher} = {number(a)}, {lower} = {number(b)}")

    return judged


def rising(prefix: str, suffix: str) -> Judge:
    """prefix1suffix < prefix2suffix < .. : the last interval lies above the first, and no step goes down."""

    def judged(e: Estimates) -> Finding | None:
        values = []
        while (name := f"{prefix}{len(values) + 1}{suffix}") in e:
            values.append(e[name])
        if len(values) < 2:
            return None
        text = f"{suffix.strip('/')}: " + " → ".join(f"{x.value:.3g}" for x in values)
        if values[-1].low > values[0].high and all(a.value <= b.value for a, b in zip(values, values[1:])):
            return Finding(True, text)
        return Finding(False if values[-1].high < values[0].low else None, text)

    return judged


def largest_n(prefix: str, low: float = -math.inf, high: float = math.inf) -> Judge:
    """`within` for the statistic prefix/N of the largest whole number N."""

    def judged(e: Estimates) -> Finding | None:
        lengths = [int(n) for name in e if name.startswith(prefix + "/") and (n := name[len(prefix) + 1 :]).isdigit()]
        return within(f"{prefix}/{max(lengths)}", low, high, floored=True)(e) if lengths else None

    return judged
