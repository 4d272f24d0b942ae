"""How good predictions of a number are, how noisy targets are, and which rows are unlike those known."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from gramian.core.calibration import (
    calibration_error,
    coverage,
    crps,
    negative_log_likelihood,
    sharpness,
)
from gramian.core.predictive import Predictive

FAR = 0.01
"""Share of rows like those learnt from that may be called out of distribution."""


@dataclass(frozen=True)
class Scores:
    """How well a prediction does on the test rows, in the target's unit."""

    rmse: float
    nll: float
    crps: float
    coverage: float
    """Share of targets inside the intervals of the level asked for."""
    width: float
    """Mean width of these intervals."""
    calibration_error: float
    """Mean distance of coverage from its level, over levels."""


def judged(prediction: Predictive, y: Tensor, level: float) -> Scores:
    """Score a prediction against targets."""
    return Scores(
        rmse=(prediction.mean - y).square().mean().sqrt().item(),
        nll=negative_log_likelihood(prediction, y).item(),
        crps=crps(prediction, y).mean().item(),
        coverage=coverage(prediction, y, y.new_tensor([level])).item(),
        width=sharpness(prediction, level).item(),
        calibration_error=calibration_error(prediction, y).item(),
    )


def constant(y: Tensor, count: int) -> Predictive:
    """Predict mean and variance of the training targets for every row."""
    ones = torch.ones(count, dtype=y.dtype)
    return Predictive(y.mean() * ones, 0 * ones, y.var() * ones)


def likeliest_noise(mean: Tensor, variance: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the noise variance under which targets are likeliest, and their negative log-likelihood.

        argmin_s mean ½ ln 2π(v + s) + (y − m)²/2(v + s)

    Holds: on a grid of 400 noise variances from 10⁻⁶ to 10 times the mean squared residual.
    """
    squares = (y - mean).square()
    grid = torch.logspace(-6, 1, 400, dtype=y.dtype) * squares.mean().clamp(min=1e-12)
    total = variance + grid[:, None]
    costs = 0.5 * ((2 * math.pi * total).log() + squares / total).mean(1)
    best = costs.argmin()
    return grid[best].item(), costs[best].item()


def coverage_error(level: float, test: int, validation: int) -> float:
    """Return the standard error of the share of test targets inside honest central intervals of a level q.

        √(q(1 − q)/test + (2 z φ(z))²/(2 validation)),  z = Φ⁻¹((1 + q)/2)

    The first term is the chance of few test rows, the second that of few validation rows: they fix the
    width only to a factor 1 ± 1/√(2 validation), and the share moves by 2 z φ(z) times that.

    Holds: for Gaussian residuals, as both numbers of rows → ∞.
    """
    normal = NormalDist()
    z = normal.inv_cdf((1 + level) / 2)
    return math.sqrt(level * (1 - level) / test + (2 * z * normal.pdf(z)) ** 2 / (2 * validation))


def far_threshold(variance: Tensor) -> tuple[float, float]:
    """Return the epistemic variance beyond which a row is out of distribution, and how often that is chance.

    The threshold is the k-th largest among n rows that were not learnt from, k = max(1, ⌊(n + 1)/100⌋): of
    further rows like them a share k/(n + 1) lies beyond.

    Holds: exactly, without ties.
    """
    n = len(variance)
    k = max(1, math.floor(FAR * (n + 1)))
    return variance.sort(descending=True).values[k - 1].item(), k / (n + 1)
