"""Do predictions of numbers know how wrong they are: scores, coverage and sharpness of a `Predictive`.

All are exact for the mixture where the prediction holds samples; pass `prediction.moment_matched()` for the
Gaussian of the same mean and variance.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.errors import InputError

LEVELS = tuple(k / 20 for k in range(1, 20))
"""Levels of the calibration error: .05, .1, …, .95."""


def negative_log_likelihood(prediction: Predictive, y: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Return the mean negative log density of targets, in nats.

        NLL = −mean ln p(y)

    Shapes: y (*batch) -> ().
    Raises: InputError as `Predictive.log_likelihood`, and without targets.
    Holds: exactly.
    """
    return -_some(prediction.log_likelihood(y)).mean()


def crps(prediction: Predictive, y: Float[Tensor, "..."]) -> Float[Tensor, "*batch"]:
    """Return the continuous ranked probability score of every target, in its unit; smaller is better.

        CRPS = ∫ (F(t) − 1[t ≥ y])² dt = E|Y − y| − ½ E|Y − Y'|
             = 1/M Σ_m A(y − μ_m, s_m²) − 1/(2M²) Σ_mk A(μ_m − μ_k, s_m² + s_k²),
        A(μ, s²) = E|N(μ, s²)| = μ (2Φ(μ/s) − 1) + 2 s φ(μ/s)

    Of a point it is the absolute error. Of samples it is the score of their own distribution, which for
    few members is larger than that of the law they are drawn from.

    Shapes: y (*batch) -> (*batch).
    Raises: InputError for targets of another shape.
    Holds: exactly.
    Source: Gneiting, Raftery 2007, doi 10.1198/016214506000001437; mixtures: Grimit, Gneiting, Berrocal,
        Johnson 2006, doi 10.1256/qj.05.235.
    """
    _same(prediction, y)
    means, stds = prediction.components
    spread = torch.zeros_like(prediction.mean)
    for mean, std in zip(means, stds, strict=True):
        spread = spread + _mean_absolute(means - mean, torch.hypot(stds, std)).mean(0)
    return _mean_absolute(y - means, stds).mean(0) - spread / (2 * len(means))


def coverage(
    prediction: Predictive, y: Float[Tensor, "..."], levels: Float[Tensor, " levels"] | None = None
) -> Float[Tensor, " levels"]:
    """Return the share of targets in the closed central interval of every level q; q itself if calibrated.

        coverage(q) = mean 1[min(P(Y ≤ y), P(Y ≥ y)) ≥ (1 − q)/2]

    These are the intervals of `Predictive.interval`, but no interval is computed. A perfect sampler with M
    members and without noise does not cover q in the mean: its widest interval holds (M − 1)/(M + 1).

    Shapes: y (*batch), levels (levels), `LEVELS` without -> (levels).
    Raises: InputError for levels outside [0, 1], targets of another shape, and none.
    Holds: exactly.
    """
    levels = _levels(levels, prediction.mean)
    tail = torch.minimum(prediction.cdf(y), prediction.survival(y)).flatten()
    rounding = 8 * torch.finfo(tail.dtype).eps  # a probability of k/M is to count as reached
    inside = _some(tail)[:, None] >= (1 - levels) / 2 - rounding
    return inside.to(tail.dtype).mean(0)


def randomised_coverage(
    prediction: Predictive, y: Float[Tensor, "..."], levels: Float[Tensor, " levels"] | None = None
) -> Float[Tensor, " levels"]:
    """Return the coverage of every level q where targets and samples may have atoms; q itself if calibrated.

        coverage(q) = mean P(|U − ½| ≤ q/2)
        samples without noise: U uniform on [#{x_m < y}, #{x_m ≤ y} + 1]/(M + 1)
        otherwise:             U uniform on [P(Y < y), P(Y ≤ y)]

    U is never drawn: its probability is the share of its interval within the level's. The target counts among
    the samples, so that a perfect sampler covers q in the mean with any number of members, which by
    `coverage` it does not. A target that all samples equal tells nothing: it adds q, and so dilutes an error.

    Shapes: y (*batch), levels (levels), `LEVELS` without -> (levels).
    Raises: InputError as `coverage`.
    Holds: exactly; the expectation is q where target and samples are exchangeable, whatever their ties, and
        where the prediction is the law of the target. Without atoms and samples it equals `coverage`.
    Source: Czado, Gneiting, Held 2009, doi 10.1111/j.1541-0420.2009.01191.x.
    """
    _same(prediction, y)
    half = _levels(levels, prediction.mean) / 2
    means, stds = prediction.components
    atom = ((stds == 0) & (means == y)).to(means.dtype).mean(0)
    upper = prediction.cdf(y)
    lower = upper - atom
    if prediction.samples is not None and not stds.any():
        members = len(means)
        lower, upper = members * lower / (members + 1), (members * upper + 1) / (members + 1)
    lower, upper = (_some(end).flatten()[:, None] for end in (lower, upper))
    width = upper - lower
    common = torch.minimum(upper, 0.5 + half) - torch.maximum(lower, 0.5 - half)
    share = (common / torch.where(width > 0, width, 1)).clamp(0, 1)
    return torch.where(width > 0, share, (common >= 0).to(share.dtype)).mean(0)


def calibration_error(
    prediction: Predictive, y: Float[Tensor, "..."], levels: Float[Tensor, " levels"] | None = None
) -> Float[Tensor, ""]:
    """Return the mean distance of coverage from its level, in [0, 1].

        mean_q |coverage(q) − q|

    Shapes: y (*batch), levels (levels), `LEVELS` without -> ().
    Raises: InputError as `coverage`.
    Holds: exactly.
    Source: Kuleshov, Fenner, Ermon 2018, arXiv 1807.00263, with central intervals and absolute differences.
    """
    levels = _levels(levels, prediction.mean)
    return (coverage(prediction, y, levels) - levels).abs().mean()


def pit(prediction: Predictive, y: Float[Tensor, "..."]) -> Float[Tensor, "*batch"]:
    """Return the probability integral transform of every target: uniform on [0, 1] if calibrated.

        u = F(y), with half the probability of y itself where F has a step

    Shapes: y (*batch) -> (*batch).
    Raises: InputError for targets of another shape.
    Holds: exactly; uniform only where F has no steps.
    Source: Gneiting, Balabdaoui, Raftery 2007, doi 10.1111/j.1467-9868.2007.00587.x.
    """
    return (prediction.cdf(y) + 1 - prediction.survival(y)) / 2


def pit_histogram(
    prediction: Predictive, y: Float[Tensor, "..."], bins: int = 10
) -> Float[Tensor, " {bins}"]:
    """Return the share of targets in each of equal parts of [0, 1] of `pit`: 1/bins each if calibrated.

    A hump in the middle tells of a prediction that is too wide, a trough of one that is too narrow, a slope
    of bias.

    Shapes: y (*batch) -> (bins).
    Raises: InputError for fewer than one bin, targets of another shape, and none.
    Holds: exactly; sums to 1.
    """
    if bins < 1:
        raise InputError(f"a histogram needs at least 1 bin, not {bins}")
    values = _some(pit(prediction, y)).flatten()
    place = (values * bins).long().clamp(max=bins - 1)
    return torch.bincount(place, minlength=bins).to(values.dtype) / len(values)


def sharpness(prediction: Predictive, level: float = 0.95) -> Float[Tensor, ""]:
    """Return the mean width of the central intervals, in the unit of the targets; smaller is sharper.

        mean (Q((1 + level)/2) − Q((1 − level)/2))

    It tells nothing without the coverage of the same level beside it.

    Shapes: -> ().
    Raises: InputError for a level outside [0, 1], and an empty prediction.
    Holds: exactly.
    """
    lower, upper = prediction.interval(level)
    return _some(upper - lower).mean()


def _mean_absolute(mean: Tensor, std: Tensor) -> Tensor:
    """Give E|N(mean, std²)|."""
    z = mean / torch.where(std > 0, std, 1)
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return torch.where(std > 0, mean * torch.erf(z / math.sqrt(2)) + 2 * std * density, mean.abs())


def _levels(levels: Tensor | None, like: Tensor) -> Tensor:
    levels = torch.tensor(LEVELS, dtype=torch.float64) if levels is None else levels
    levels = levels.to(like)
    if not ((levels >= 0) & (levels <= 1)).all():
        raise InputError("levels have to be probabilities from 0 to 1")
    return levels


def _same(prediction: Predictive, y: Tensor) -> None:
    if y.shape != prediction.mean.shape:
        raise InputError(
            f"targets have to be {tuple(prediction.mean.shape)} like the mean, not {tuple(y.shape)}"
        )


def _some(values: Tensor) -> Tensor:
    if values.numel() == 0:
        raise InputError("there is no prediction to judge; give at least one")
    return values
