"""What is said of samples: quantiles, shares, and how far two of them are apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Share:
    """How many of all, with the binomial standard error of their fraction."""

    count: int
    total: int
    fraction: float
    error: float


@dataclass(frozen=True)
class Summary:
    """A distribution in seven numbers: its 5, 25, 50, 75 and 95 % quantiles, mean and standard deviation."""

    quantiles: Sequence[float]
    mean: float
    deviation: float


@dataclass(frozen=True)
class Distance:
    """How far two samples' distribution functions are apart, and what chance alone makes of it in 95 %."""

    value: float
    noise: float


def kolmogorov_smirnov(one: Sequence[float], other: Sequence[float]) -> Distance:
    """Return the largest gap of two empirical distribution functions, and its 95 % level for equal laws.

        D = sup_x |F_a(x) − F_b(x)|,   noise 1.36 √(1/a + 1/b)

    Holds: exactly; the level as the numbers of independent values a, b → ∞.
    Source: Smirnov 1948, "Table for Estimating the Goodness of Fit of Empirical Distributions".
    """
    a, b = (torch.tensor(values, dtype=torch.float64).sort().values for values in (one, other))
    both = torch.cat((a, b))
    below = [torch.searchsorted(each, both, right=True).double() / len(each) for each in (a, b)]
    return Distance((below[0] - below[1]).abs().max().item(), 1.36 * (1 / len(a) + 1 / len(b)) ** 0.5)


def share(which: Tensor) -> Share:
    """Return how many of a mask are set."""
    fraction = which.double().mean().item()
    return Share(int(which.sum()), len(which), fraction, (fraction * (1 - fraction) / len(which)) ** 0.5)


def summary(values: Tensor) -> Summary:
    """Return a sample's summary; NaN of fewer than two values."""
    if len(values) < 2:
        return Summary([float("nan")] * len(QUANTILES), float("nan"), float("nan"))
    points = torch.tensor(QUANTILES, dtype=values.dtype)
    return Summary(values.quantile(points).tolist(), values.mean().item(), values.std().item())
