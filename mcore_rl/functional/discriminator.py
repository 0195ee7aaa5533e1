"""A discriminator's losses, what its scores are worth as rewards, and how far it may be trusted.

A score l is one number a sequence, the log-odds of "real": D = sigma(l).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("real", "rejected", "fake")  # of training sequences; the label of real is 1, of the others 0
REWARD_TRANSFORMS = ("logit", "sigmoid", "softplus", "logsigmoid")


def bce_loss(scores: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """[N] binary cross-entropy, gradient sigma(l) - y.

    Args:
        scores: [N]. labels: [N] 1 real, 0 rejected or generated.
        label_smoothing: the target of real ones is 1 - label_smoothing; that of the others stays 0 (one-sided,
            Salimans et al. 2016).
    """
    return F.softplus(scores) - labels * (1 - label_smoothing) * scores


def bradley_terry_loss(real: Tensor, other: Tensor) -> Tensor:
    """[N] -log sigma(l_real - l_other): only differences of scores matter."""
    return -F.logsigmoid(real - other)


def discriminator_metrics(scores: Tensor, kinds: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Sums "kind/accuracy", "kind/score" and the count "num_kind" of each of `KINDS`.

    Args:
        scores: [N]. kinds: [N] int64, index into `KINDS`. valid: [N] bool, False for padding.
    """
    scores = scores.detach()
    metrics: dict[str, Tensor] = {}
    for index, kind in enumerate(KINDS):
        mine = valid & (kinds == index)
        right = scores > 0 if kind == "real" else scores < 0
        metrics = metrics | {
            f"{kind}/accuracy": (mine & right).sum().to(scores.dtype),
            f"{kind}/score": torch.where(mine, scores, 0.0).sum(),
            f"num_{kind}": mine.sum().to(scores.dtype),
        }
    return metrics


def discriminator_reward(scores: Tensor, transform: str) -> Tensor:
    """[N] reward of generated sequences: l, sigma(l), -log(1 - sigma(l)) = softplus(l), or log sigma(l).

    With the discriminator that is optimal against the policy, the policy gradient of l is that of -KL(pi || p) and the
    one of softplus(l) that of -2 JS(pi, p).

    Raises:
        ValueError: unknown transform.
    """
    if transform == "logit":
        return scores
    if transform == "sigmoid":
        return torch.sigmoid(scores)
    if transform == "softplus":
        return F.softplus(scores)
    if transform == "logsigmoid":
        return F.logsigmoid(scores)
    raise ValueError(f"reward_transform={transform!r}: allowed are {', '.join(REWARD_TRANSFORMS)}")


@dataclass(frozen=True)
class Normaliser:
    """Mean and spread of the scores seen since the discriminator last changed.

    Example:
        >>> Normaliser.of(torch.tensor([1.0, 3.0])).merge(Normaliser.of(torch.tensor([5.0]))).mean
        3.0
    """

    count: int = 0
    mean: float = 0.0
    square_sum: float = 0.0  # of distances from the mean

    @classmethod
    def of(cls, values: Tensor) -> Normaliser:
        """Of values [N]."""
        if values.numel() == 0:
            return cls()
        x = values.detach().double()
        return cls(x.numel(), float(x.mean()), float((x - x.mean()).square().sum()))

    def merge(self, other: Normaliser) -> Normaliser:
        """Of both sets of values (Chan et al. 1979), e.g. of another batch or rank."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * other.count / count
        square_sum = self.square_sum + other.square_sum + delta * delta * self.count * other.count / count
        return Normaliser(count, mean, square_sum)

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before two values were seen, or where all were equal."""
        spread = (self.square_sum / self.count) ** 0.5 if self.count > 1 else 0.0
        return spread if spread > 0 else 1.0

    def normalise(self, values: Tensor, clip: float) -> Tensor:
        """(values - mean) / std, clipped to [-clip, clip]."""
        return ((values - self.mean) / self.std).clamp(-clip, clip)


def steps_in_band(accuracy: float, steps: int, *, low: float, high: float) -> int:
    """Discriminator updates of one round: none once it is right `high` of the time, twice as many below `low`."""
    if accuracy >= high:
        return 0
    return 2 * steps if accuracy < low else steps


def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """[] share of (positive, negative) pairs that the scores order rightly, ties counting half.

    Args:
        scores: [N]. labels: [N] 1 or 0, at least one of each.
    """
    scores = scores.double()
    above = torch.searchsorted(scores[labels == 0].sort().values, scores[labels == 1].contiguous(), side="left")
    upto = torch.searchsorted(scores[labels == 0].sort().values, scores[labels == 1].contiguous(), side="right")
    return 0.5 * (above + upto).double().mean() / (labels == 0).sum()


def length_only_auc(lengths: Tensor, labels: Tensor) -> Tensor:
    """[] in [0.5, 1]: how well length alone tells real from generated, whichever of them is longer.

    Near 1, a discriminator need not read the text, and the policy will learn the length.
    """
    area = auc(lengths, labels)
    return torch.maximum(area, 1 - area)


def calibration_error(scores: Tensor, labels: Tensor, num_bins: int = 10) -> Tensor:
    """[] expected calibration error: mean |accuracy - confidence| over equal bins of D = sigma(l), weighted by size."""
    probabilities = torch.sigmoid(scores.double())
    bins = (probabilities * num_bins).long().clamp(max=num_bins - 1)
    zeros = probabilities.new_zeros(num_bins)
    gap = zeros.index_add(0, bins, labels.double() - probabilities)
    return gap.abs().sum() / len(scores)


def separation(scores: Mapping[str, Tensor], objective: str, fake_share: float) -> dict[str, Tensor]:
    """How a discriminator tells the kinds of `KINDS` apart, all []; a tie is half right.

    "accuracy" is the mean of that on real sequences and that on the others, of which `fake_share` are fake as in
    training. With bradley_terry, where a score alone means nothing, it is the share of pairs of real and other that are
    ordered rightly. Beside it are "kind_accuracy" (side of 0), "kind_score" (mean), "logit_gap" (mean of real minus
    that of fake) and "calibration_error" over real and others half and half.

    Args:
        scores: of each kind, [N] of its own length; "rejected" may be empty, then `fake_share` is taken for 1.
    """
    right = {kind: (0.5 + 0.5 * (x if kind == "real" else -x).sign()).double().mean() for kind, x in scores.items()}
    real, others = scores["real"], {"fake": fake_share, "rejected": 1 - fake_share}
    if len(scores["rejected"]) == 0:
        others = {"fake": 1.0}
    if objective == "bce":
        accuracy = (right["real"] + sum(share * right[kind] for kind, share in others.items() if share)) / 2
    else:
        accuracy = sum(share * auc(*labelled(real, scores[kind])) for kind, share in others.items() if share)
    mixed = torch.cat([_thinned(scores[kind], round(share * len(real))) for kind, share in others.items()])
    return {
        "accuracy": accuracy,
        **{f"{kind}_accuracy": x for kind, x in right.items() if len(scores[kind])},
        **{f"{kind}_score": x.double().mean() for kind, x in scores.items() if len(x)},
        "logit_gap": real.double().mean() - scores["fake"].double().mean(),
        "calibration_error": calibration_error(*labelled(real, mixed)),
    }


def labelled(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """(values, labels) of both."""
    return torch.cat([positive, negative]), torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])


def _thinned(values: Tensor, count: int) -> Tensor:
    """`count` of them, evenly spread; all where there are fewer."""
    return values if count >= len(values) else values[torch.arange(count) * len(values) // max(1, count)]
