"""How near a reconstruction is to the truth, and whether its samples know how far.

Scores of images first, then forms of calibration. The published one widens every interval by a margin
that is fitted on the truth, so it is named `truth_tuned`: it judges a method, it is nothing that a user
without the truth could have. The honest ones have no margin: coverage by closed intervals is compared with
what so many samples of a perfect sampler reach, the randomised coverage with the levels themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import conv2d

from gramian.core.calibration import coverage, randomised_coverage, sharpness
from gramian.core.predictive import Predictive
from gramian.errors import InputError

LEVELS = tuple(k / 20 for k in range(20))
"""Levels of the published calibration error: 0, .05, …, .95."""
MARGINS = (*(10 ** (-20 + 0.95 * k) for k in range(21)), 0.0)
"""Margins among which the published calibration error takes the best; of equal ones the first."""
VARIANCE_EPS = 1e-6
"""Added to squared errors and variances in the published negative log likelihood."""
WINDOW, WINDOW_STD = 11, 1.5
"""Pixels and standard deviation of the Gaussian window of the structural similarity."""


def mean_squared_error(
    image: Float[Tensor, "*batch n m"], truth: Float[Tensor, "*batch n m"]
) -> Float[Tensor, "*batch"]:
    """Return the mean squared difference of two images.

    Shapes: (*batch, n, m), (*batch, n, m) -> (*batch).
    Raises: InputError for different or empty shapes.
    Holds: exactly.
    """
    _same(image, truth)
    return (image - truth).square().mean((-2, -1))


def psnr(
    image: Float[Tensor, "*batch n m"], truth: Float[Tensor, "*batch n m"], peak: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Return the peak signal-to-noise ratio in decibels; ∞ for equal images.

        PSNR = 10 log₁₀(peak²/MSE)

    Shapes: (*batch, n, m), (*batch, n, m) -> (*batch).
    Raises: InputError for a peak that is not above 0, and as `mean_squared_error`.
    Holds: exactly.
    """
    if not peak > 0:
        raise InputError(f"the peak of an image has to be above 0, not {peak}")
    return 20 * math.log10(peak) - 10 * mean_squared_error(image, truth).log10()


def snr(image: Float[Tensor, "*batch n m"], truth: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch"]:
    """Return the signal-to-noise ratio in decibels.

        SNR = 20 log₁₀(‖x‖₂/‖x − m‖₂) = PSNR + 10 log₁₀ mean x²  at peak 1

    Shapes: (*batch, n, m), (*batch, n, m) -> (*batch).
    Raises: InputError as `mean_squared_error`.
    Holds: exactly.
    """
    return 10 * (truth.square().mean((-2, -1)) / mean_squared_error(image, truth)).log10()


def ssim(
    image: Float[Tensor, "*batch n m"], truth: Float[Tensor, "*batch n m"], peak: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Return the mean structural similarity over all windows that lie inside the image, at most 1.

        SSIM = mean (2 μ_x μ_y + c₁)(2 σ_xy + c₂) / ((μ_x² + μ_y² + c₁)(σ_x² + σ_y² + c₂)),
        c₁ = (.01 peak)², c₂ = (.03 peak)², moments weighted by a Gaussian of 11 pixels, σ = 1.5

    Shapes: (*batch, n, m), (*batch, n, m) -> (*batch).
    Raises: InputError for images below 11 pixels and as `psnr`.
    Holds: exactly.
    Source: Wang, Bovik, Sheikh, Simoncelli 2004, doi 10.1109/TIP.2003.819861.
    """
    _same(image, truth)
    if min(image.shape[-2:]) < WINDOW or not peak > 0:
        size = "x".join(map(str, image.shape[-2:]))
        raise InputError(
            f"structural similarity needs {WINDOW} pixels a side and a peak above 0, not {size} and {peak}"
        )
    x, y = (one.reshape(-1, 1, *one.shape[-2:]) for one in (image, truth))
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mx, my = _smooth(x), _smooth(y)
    vx, vy, vxy = _smooth(x * x) - mx * mx, _smooth(y * y) - my * my, _smooth(x * y) - mx * my
    local = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return local.mean((-3, -2, -1)).reshape(image.shape[:-2])


def gaussian_nll(
    mean: Float[Tensor, "*batch"],
    variance: Float[Tensor, "*batch"],
    truth: Float[Tensor, "*batch"],
    eps: float = VARIANCE_EPS,
) -> Float[Tensor, ""]:
    """Return the published negative log likelihood of the truth, in nats a pixel.

        ½ mean ln 2π(v + ε) + ½ mean ((m − x)² + ε)/(v + ε)

    With v = 0 the first term is −5.99 at ε = 10⁻⁶. The ε in the numerator makes it no likelihood: at v = 0
    it adds ½, and no value is below −5.49.

    Shapes: three times (*batch) -> ().
    Raises: InputError for different or empty shapes.
    Holds: exactly.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (their code).
    """
    _same(mean, truth)
    _same(variance, truth)
    wide = variance + eps
    return 0.5 * (2 * math.pi * wide).log().mean() + 0.5 * (((mean - truth).square() + eps) / wide).mean()


def sample_crps(
    samples: Float[Tensor, " members *batch"], truth: Float[Tensor, "*batch"], fair: bool = False
) -> Float[Tensor, "*batch"]:
    """Return the continuous ranked probability score of samples, by one sort of the members.

        mean_m |x_m − y| − 1/M² Σ_i (2i − M − 1) x_(i);   fair: M(M − 1) for M²

    It equals `gramian.core.calibration.crps` of samples without noise in M log M steps instead of M². The
    fair form is what infinitely many samples of the same law would score, in the mean; only by it are methods
    with different numbers of samples compared.

    Shapes: (members, *batch), (*batch) -> (*batch).
    Raises: InputError for shapes that do not fit, and for one member in the fair form.
    Holds: exactly.
    Source: Hersbach 2000, doi 10.1175/1520-0434(2000)015<0559:DOTCRP>2.0.CO;2; fair: Ferro 2014,
        doi 10.1002/qj.2270.
    """
    count = _members(samples, truth, 2 if fair else 1)
    place = 2 * torch.arange(1, count + 1, device=samples.device, dtype=samples.dtype) - count - 1
    spread = torch.tensordot(place, samples.sort(0).values, 1) / (count * (count - 1 if fair else count))
    return (samples - truth).abs().mean(0) - spread


def inside(
    samples: Float[Tensor, " members *batch"],
    truth: Float[Tensor, "*batch"],
    levels: Sequence[float] = LEVELS,
    *,
    below: float = 0.0,
    above: float = 0.0,
    closed: bool = False,
) -> Bool[Tensor, " levels *batch"]:
    """Tell of every level q and pixel whether the truth lies in the widened central interval of the samples.

        Q_{½−q/2} − below < x < Q_{½+q/2} + above,  with ≤ if closed;  Q interpolates linearly

    Shapes: (members, *batch), (*batch) -> (levels, *batch).
    Raises: InputError for shapes that do not fit and levels outside [0, 1].
    Holds: exactly.
    """
    _members(samples, truth, 1)
    _probabilities(levels)
    ordered, found = samples.sort(0).values, []
    for level in levels:
        lower, upper = (_quantile(ordered, 0.5 + side * level / 2) for side in (-1, 1))
        lower, upper = lower - below, upper + above
        both = (truth >= lower) & (truth <= upper) if closed else (truth > lower) & (truth < upper)
        found.append(both)
    return torch.stack(found)


@dataclass(frozen=True, eq=False)
class TruthTuned:
    """The published calibration error, its margin fitted on the very truth that it judges."""

    margin: float
    """δ, added to both ends of every interval."""
    error: float
    """Mean over levels of |coverage(q) − q|."""
    squared: float
    """Mean over levels of (coverage(q) − q)²."""
    coverage: Float[Tensor, " levels"]


def truth_tuned_calibration(
    samples: Float[Tensor, " members *batch"],
    truth: Float[Tensor, "*batch"],
    margins: Sequence[float] = MARGINS,
    levels: Sequence[float] = LEVELS,
) -> TruthTuned:
    """Return the published calibration error: the least over margins, chosen by the truth itself.

        ECE(δ) = mean_q |coverage(q, δ) − q|,  coverage(q, δ) = mean 1[Q_{½−q/2} − δ < x < Q_{½+q/2} + δ]

    With margins chosen on other images, pass the one.

    Shapes: samples (members, *batch), truth (*batch).
    Raises: InputError as `inside`, and without margins.
    Holds: exactly; never above the error at one of the margins.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (their code).
    """
    if not margins or not levels:
        raise InputError("a calibration error needs at least one margin and one level")
    _members(samples, truth, 1)
    ordered, wanted, best = samples.sort(0).values, torch.tensor(levels, dtype=torch.float64), None
    ends = [tuple(_quantile(ordered, 0.5 + side * q / 2) for side in (-1, 1)) for q in levels]
    for margin in margins:
        shares = [((truth > a - margin) & (truth < b + margin)).double().mean() for a, b in ends]
        covered = torch.stack(shares).cpu()
        error = float((covered - wanted).abs().mean())
        if best is None or error < best.error:
            best = TruthTuned(margin, error, float((covered - wanted).square().mean()), covered)
    assert best is not None
    return best


def attainable_coverage(members: int, levels: Sequence[float] = LEVELS) -> Float[Tensor, " levels"]:
    """Return the coverage of every level that a perfect sampler reaches with so many samples.

        (M + 1 − 2k)/(M + 1),  k = ⌈M (1 − q)/2⌉

    It belongs to the closed intervals of `Predictive.interval`, from the k-th smallest to the k-th largest
    sample.

    Shapes: -> (levels).
    Raises: InputError for no member and levels outside [0, 1].
    Holds: exactly, where truth and samples are exchangeable and without ties.
    Source: Wilks 1941, doi 10.1214/aoms/1177731788.
    """
    if members < 1:
        raise InputError(f"coverage needs at least one sample, not {members}")
    _probabilities(levels)
    shares = [(members + 1 - 2 * _rank(members, q)) / (members + 1) for q in levels]
    return torch.tensor(shares, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Coverage and width of intervals without a margin, level by level; closed ones unless said."""

    levels: Float[Tensor, " levels"]
    coverage: Float[Tensor, " levels"]
    attainable: Float[Tensor, " levels"]
    """What a perfect sampler with as many samples covers; the levels themselves without samples."""
    randomised: Float[Tensor, " levels"]
    """`gramian.core.calibration.randomised_coverage`: the levels, of a perfect sampler, also with atoms."""
    width: Float[Tensor, " levels"]
    """Mean width of the intervals, in the unit of the image."""

    @property
    def error(self) -> float:
        """Mean over levels of |coverage(q) − q|."""
        return float((self.coverage - self.levels).abs().mean())

    @property
    def corrected_error(self) -> float:
        """Mean over levels of |coverage(q) − attainable(q)|."""
        return float((self.coverage - self.attainable).abs().mean())

    @property
    def randomised_error(self) -> float:
        """Mean over levels of |randomised(q) − q|."""
        return float((self.randomised - self.levels).abs().mean())


def calibration(
    prediction: Predictive,
    truth: Float[Tensor, "*batch"],
    levels: Sequence[float] = LEVELS,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Calibration:
    """Return the honest calibration of a prediction, of all pixels or of chosen ones.

        coverage(q) = mean 1[min(P(Y ≤ x), P(Y ≥ x)) ≥ (1 − q)/2]

    With `where=truth > 0` it is that on the support of the image, without the pixels that are exactly 0. Such
    a choice by the truth alone makes even a perfect sampler miss q if it doubts which pixels are 0; a choice
    that treats truth and samples alike, as of the pixels where any of them is above 0, does not.

    Shapes: truth and where (*batch).
    Raises: InputError for shapes that do not fit, no pixel left, and levels outside [0, 1].
    Holds: exactly.
    """
    if where is not None:
        if where.shape != truth.shape or truth.shape != prediction.mean.shape:
            raise InputError(f"the chosen pixels have to be {tuple(truth.shape)}, not {tuple(where.shape)}")
        prediction, truth = _chosen(prediction, where), truth[where]
    wanted = torch.tensor(levels, dtype=torch.float64)
    sampled = prediction.samples is not None and prediction.noise is None
    members = len(prediction.components[0])
    return Calibration(
        levels=wanted,
        coverage=coverage(prediction, truth, wanted).double().cpu(),
        attainable=attainable_coverage(members, levels) if sampled else wanted,
        randomised=randomised_coverage(prediction, truth, wanted).double().cpu(),
        width=_widths(prediction.components[0], levels)
        if sampled
        else torch.tensor([float(sharpness(prediction, q)) for q in levels], dtype=torch.float64),
    )


def _rank(members: int, level: float) -> int:
    """Return k of the k-th smallest and k-th largest sample, which end the central interval of a level."""
    return math.ceil(members * (1 - level) / 2 * (1 - 1e-12))  # rounding does not make k of M more than k


def _widths(samples: Tensor, levels: Sequence[float]) -> Tensor:
    """Return `sharpness` of samples without noise at many levels by one sort."""
    ordered = samples.sort(0).values
    ranks = [max(_rank(len(samples), q), 1) for q in levels]
    return torch.stack([(ordered[-k] - ordered[k - 1]).mean() for k in ranks]).double().cpu()


def _chosen(prediction: Predictive, where: Tensor) -> Predictive:
    """Keep some pixels of a prediction."""
    noise, samples = prediction.noise, prediction.samples
    return Predictive(
        prediction.mean[where],
        prediction.variance[where],
        None if noise is None else noise[..., where],
        None if samples is None else samples[:, where],
    )


def _quantile(ordered: Tensor, level: float) -> Tensor:
    """Interpolate between the order statistics around (M − 1) p."""
    place = min(max(level, 0.0), 1.0) * (len(ordered) - 1)
    low = min(math.floor(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def _smooth(image: Tensor) -> Tensor:
    """Take weighted means over all windows inside (batch, 1, n, m)."""
    place = torch.arange(WINDOW, dtype=image.dtype, device=image.device) - WINDOW // 2
    weights = (-0.5 * (place / WINDOW_STD).square()).exp()
    weights = weights / weights.sum()
    return conv2d(conv2d(image, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _members(samples: Tensor, truth: Tensor, least: int) -> int:
    if samples.shape[1:] != truth.shape or samples.ndim == 0 or truth.numel() == 0:
        raise InputError(
            f"samples have to be (members, …) over a truth {tuple(truth.shape)} that is not empty, "
            f"not {tuple(samples.shape)}"
        )
    if len(samples) < least:
        raise InputError(f"this score needs at least {least} samples, not {len(samples)}")
    return len(samples)


def _probabilities(levels: Sequence[float]) -> None:
    if not all(0 <= level <= 1 for level in levels):
        raise InputError("levels have to be probabilities from 0 to 1")


def _same(image: Tensor, truth: Tensor) -> None:
    if image.shape != truth.shape or truth.numel() == 0:
        raise InputError(
            f"image and truth have to be of one shape and not empty, not {tuple(image.shape)} "
            f"and {tuple(truth.shape)}"
        )
