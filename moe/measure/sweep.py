"""The same change of the weights at many sizes: at which powers of the step weights, routes and flips move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.measure.compare import Estimates, Forward, Pass, exactly, four_passes
from moe.measure.decompose import crossover, jump, own_flip_share, parts
from moe.measure.flips import flip_statistics
from moe.measure.probe import Probe
from moe.measure.stats import Statistic, estimates, joint

ALPHAS = tuple(10 ** (-i / 2) for i in range(9))  # 1 .. 1e-4
RARE, ENOUGH = 0.3, 30  # slopes are fitted where at most this share of tokens, and at least that many, changed routes
SLOPES = ("var_w", "var_r", "set", "jump")  # laws: 2, 1, 1, 0
KEPT = ("var_z", "var_w", "var_r", "share_routing", "kurtosis_z")


def interpolate(model: Any, old: Mapping[str, Tensor], new: Mapping[str, Tensor], alpha: float) -> None:
    """Set the weights of `model` to old + alpha (new - old), in place. Raises as `require_same_architecture`."""
    require_same_architecture(old, new)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(old[name] + alpha * (new[name] - old[name]))


def require_same_architecture(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Raises ValueError where two state dicts have not the same names and shapes."""
    names = [n for n in {**old, **new} if n not in old or n not in new or old[n].shape != new[n].shape]
    if names:
        raise ValueError(
            f"OLD and NEW are not the same architecture: {names[0]!r} differs in shape or is missing in one"
        )


def step_statistics(
    forward: Forward, old: Any, new: Any, probe: Probe, old_pass: Pass | None = None
) -> dict[str, Statistic]:
    """The statistics that are followed over the step, of one step; `old_pass` as for `four_passes`."""
    passes, answers = four_passes(forward, old, new, probe, old_pass), probe.answers
    z_w, z_r = passes.parts.z_w, passes.parts.z_r
    every = parts(z_w, z_r, answers) | crossover(z_w, z_r, answers)
    every |= flip_statistics(passes.old_ids, passes.new_ids, answers.token_prompts)
    followed = {name: every[name] for name in (*KEPT, "chi", "k_star", "set", "expert", "token_any") if name in every}
    if passes.flipped.any():
        followed["jump"] = jump(z_r, passes.flipped, answers)
        followed["own_flip_share"] = own_flip_share(z_r, passes.flipped, answers)
    return followed


def slope(statistics: Sequence[Statistic], alphas: Sequence[float]) -> Statistic:
    """Least-squares slope of log statistic over log alpha."""
    x = torch.tensor(alphas, dtype=torch.float64).log()
    x = x - x.mean()
    return joint(statistics, lambda values: (values.log() * x).sum(-1) / x.square().sum())


def crossing(statistics: Sequence[Statistic], alphas: Sequence[float]) -> Statistic:
    """The alpha at which a statistic that falls with alpha passes 1, between neighbours on a log-log line.

    The last passage on the way up; NaN if it is on one side everywhere.
    """
    order = sorted(range(len(alphas)), key=lambda i: alphas[i])
    x = torch.tensor([alphas[i] for i in order], dtype=torch.float64).log()

    def finish(values: Tensor) -> Tensor:
        y = values[..., order].log()
        above = (y[..., :-1] >= 0) & (y[..., 1:] < 0)
        places = torch.arange(len(x) - 1).expand_as(above)
        last = torch.where(above, places, -1).amax(-1)
        left = last.clamp_min(0)[..., None]
        y0, y1 = (y.gather(-1, left + i)[..., 0] for i in (0, 1))
        x0, x1 = (x[left[..., 0] + i] for i in (0, 1))
        return torch.where(last < 0, torch.nan, (x0 + (x1 - x0) * y0 / (y0 - y1)).exp())

    return joint([statistics[i] for i in range(len(alphas))], finish)


def sweep(
    forward: Forward,
    old: Any,
    scratch: Any,
    new_weights: Mapping[str, Tensor],
    probe: Probe,
    alphas: Sequence[float] = ALPHAS,
    draws: int = 1000,
    told: Callable[[float], None] = lambda alpha: None,
) -> Estimates:
    """sweep/ALPHA/NAME, slope/NAME with the range it was fitted on, crossing/chi.

    Args:
        scratch: a model of the same architecture whose weights are overwritten.
        told: called with each alpha when it is done.
    """
    old_weights = old.state_dict()
    with torch.no_grad():
        old_pass = forward(old, probe.sequences, None)
    found: Estimates = {}
    steps: list[dict[str, Statistic]] = []
    for alpha in alphas:
        interpolate(scratch, old_weights, new_weights, alpha)
        steps.append(step_statistics(forward, old, scratch, probe, old_pass))
        found |= {f"sweep/{alpha:g}/{name}": e for name, e in estimates(steps[-1], draws).items()}
        told(alpha)
    return found | laws(steps, alphas, draws)


def laws(steps: Sequence[Mapping[str, Statistic]], alphas: Sequence[float], draws: int) -> Estimates:
    """Slopes over the steps at which flips are rare but not too few to count, and where chi passes 1."""
    fitted = []
    for i, step in enumerate(steps):
        if "token_any" in step:
            any_flip = step["token_any"]
            share = any_flip.value()
            if share <= RARE and share * len(any_flip.prompts) >= ENOUGH:
                fitted.append(i)
    found: Estimates = {}
    if len(fitted) >= 3:
        range_ = [alphas[i] for i in fitted]
        laws = {f"slope/{name}": slope([steps[i][name] for i in fitted], range_) for name in SLOPES}
        found |= estimates(laws, draws)
        found |= {"slope/from": exactly(min(range_)), "slope/to": exactly(max(range_))}
    if all("set" in step for step in steps) and len(steps) > 1:
        found |= estimates({"crossing/chi": crossing([step["chi"] for step in steps], alphas)}, draws)
    return found
