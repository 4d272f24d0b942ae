"""What every system's check returns: findings, each a number set against a bound."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import mean, stdev


@dataclass(frozen=True)
class Finding:
    """One number that a claim stands or falls with."""

    what: str
    """The number, in words with its unit."""
    value: float
    error: float
    """Its standard error; 0 where the number is exact."""
    bound: float
    below: bool
    """Whether the value should lie below the bound, or above it."""

    @property
    def holds(self) -> bool:
        """Whether the value less two standard errors lies on the right side.

        A value that should lie below the bound is then not refuted; one that should lie above it is shown.
        """
        least = self.value - 2 * self.error
        return least <= self.bound if self.below else least >= self.bound


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference to a base over seeds and its standard error.

    Δ = mean_s (x_s − b_s),   error = sd_s(x_s − b_s) / √S

    Shapes: S ≥ 2 values of the same seeds each; NaN where one is not finite.
    Holds: exactly.
    """
    return averaged([value - other for value, other in zip(values, base, strict=True)])


def averaged(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error, sd / √S; NaN where a value is not finite.

    Shapes: S ≥ 2 values.
    Holds: exactly.
    """
    if not all(map(isfinite, values)):
        return nan, nan
    return mean(values), stdev(values) / len(values) ** 0.5
