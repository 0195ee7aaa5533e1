"""What is added to a reward before it becomes an advantage."""

from __future__ import annotations


def overlong_penalty(length: int, *, max_length: int, cache: int) -> float:
    """Soft overlong punishment of a response of `length` tokens (DAPO, arXiv 2503.14476, eq. 13).

    0 up to max_length - cache, then falling linearly to -1 at `max_length`, and -1 beyond: the floor of the paper's
    equation, which its published implementations lack.
    """
    return max(min((max_length - cache - length) / cache, 0.0), -1.0)


def adaptive_kl_coef(coef: float, kl: float, *, target: float, num_samples: int, horizon: int) -> float:
    """The next KL coefficient, moved towards what keeps the KL at `target` (Ziegler et al. 2019, section 2.2).

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon). The share num_samples / horizon is at most 1
    here, so that the coefficient never changes by more than a fifth, nor its sign.
    """
    error = max(min(kl / target - 1, 0.2), -0.2)
    return coef * (1 + error * min(num_samples / horizon, 1.0))
