"""What a sampler learns while it warms up: a step size by dual averaging, and a diagonal mass in windows."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

FIRST, BASE, LAST = 75, 25, 50
"""Iterations for the step alone at the start, of the first window, and for the step alone at the end."""

SHRINKAGE, PRIOR_VARIANCE = 5.0, 1e-3
"""How many draws of which variance an estimate is mixed with."""


def windows(warmup: int) -> tuple[int, tuple[int, ...]]:
    """Return the iteration at which the mass begins to be learned, and the ends of the windows.

    Windows double; the last one takes what is left. A warm-up too short for 75 + 25 + 50 is shared as 15, 75
    and 10 %, and one below 20 learns no mass.

    Holds: exactly.
    Source: Stan reference manual, "Automatic parameter tuning".
    """
    if warmup < 20:
        return warmup, ()
    first, length, last = FIRST, BASE, LAST
    if first + length + last > warmup:
        first, last = int(0.15 * warmup), int(0.1 * warmup)
        length = warmup - first - last
    ends, end, stop = [], first, warmup - last
    while end < stop:
        end = end + length if end + 3 * length <= stop else stop
        ends.append(end)
        length *= 2
    return first, tuple(ends)


@dataclass(frozen=True)
class DualAveraging:
    """The step size at which the mean acceptance is `target`.

        H̄_t = (1 − 1/(t + t₀)) H̄_{t−1} + (target − a_t)/(t + t₀),   ln ε_t = ln 10ε₀ − √t/γ H̄_t
        ln ε̄_t = t^{−κ} ln ε_t + (1 − t^{−κ}) ln ε̄_{t−1},   γ = .05, t₀ = 10, κ = .75

    Holds: empirically.
    Source: Nesterov 2009; Hoffman, Gelman 2014, arXiv 1111.4246, Eq. 6.
    """

    centre: float
    """ln 10ε₀."""
    log_step: float
    log_mean: float = 0.0
    error: float = 0.0
    count: float = 0.0

    @classmethod
    def around(cls, step: float) -> "DualAveraging":
        """Start anew at a step size."""
        return cls(math.log(10 * step), math.log(step))

    def updated(self, acceptance: float, target: float) -> "DualAveraging":
        """Learn from the acceptance of one transition."""
        t = self.count + 1
        error = (1 - 1 / (t + 10)) * self.error + (target - acceptance) / (t + 10)
        log_step = self.centre - math.sqrt(t) / 0.05 * error
        weight = t**-0.75
        return DualAveraging(
            self.centre, log_step, weight * log_step + (1 - weight) * self.log_mean, error, t
        )

    @property
    def step(self) -> float:
        """The step size to try next."""
        return _within(self.log_step)

    @property
    def final(self) -> float:
        """The step size to keep."""
        return _within(self.log_mean) if self.count else self.step


def _within(log_step: float) -> float:
    return math.exp(min(max(log_step, -50.0), 50.0))


@dataclass(frozen=True, eq=False)
class Variances:
    """The variance of every unknown over positions, from a stream of them.

    Holds: exactly the unbiased variance, to rounding.
    Source: Welford 1962.
    """

    mean: Float[Tensor, " dim"]
    squares: Float[Tensor, " dim"]
    count: int = 0

    @classmethod
    def none(cls, like: Tensor) -> "Variances":
        """Start with no position."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def updated(self, position: Tensor) -> "Variances":
        """Take one more position in."""
        count, gap = self.count + 1, position - self.mean
        mean = self.mean + gap / count
        return replace(self, mean=mean, squares=self.squares + gap * (position - mean), count=count)

    def regularised(self) -> Float[Tensor, " dim"]:
        """Return n/(n + 5) s² + 5/(n + 5) 1e-3, the inverse mass; 1 without two positions."""
        if self.count < 2:
            return torch.ones_like(self.mean)
        shared = SHRINKAGE / (self.count + SHRINKAGE)
        return (1 - shared) * self.squares / (self.count - 1) + shared * PRIOR_VARIANCE
