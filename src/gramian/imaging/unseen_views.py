"""What a scan alone can tell of the error bars of its image: views that were not fitted, foretold.

Measurements are judged. A structure that no held-out ray sees changes none of them, so its error bars stay
unjudged, and of the pixels along a ray only the sum is judged. Error bars belong to the views that were
fitted: that a factor found with some views held out also suits a fit of all is an assumption.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import torch
from jaxtyping import Float
from scipy.special import gammaincinv
from torch import Tensor

from gramian.core.calibration import coverage, negative_log_likelihood, randomised_coverage
from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.iterative import FREE, Box, clamped
from gramian.imaging.radon import LinearMap

FEWEST_VIEWS = 5
"""Fewest views of which two can be held out and most kept."""
LARGEST = 100.0
"""The largest factor: samples that need more differ by chance or rounding."""
TAILS = 4.0
"""Degrees of freedom of spread samples, chosen on four reconstructions of validation slices of CT."""


def hold_out(views: int, share: float = 0.1, seed: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose the views that a reconstruction is fitted to and those that it is judged by: (kept, held).

    The views in their order are cut into equal parts, as many as are to be held, and one is drawn from each;
    at least two are held and less than half.

    Raises: InputError for fewer views than 5 and a share outside (0, ½).
    Holds: exactly; views have to be in the order of their angles.
    """
    if views < FEWEST_VIEWS:
        raise InputError(
            f"holding two views out and keeping most needs at least {FEWEST_VIEWS} views, not {views}"
        )
    if not 0 < share < 0.5:
        raise InputError(f"the share of views to hold out has to lie between 0 and 0.5, not {share}")
    count = min(max(2, round(share * views)), (views - 1) // 2)
    generator = torch.Generator().manual_seed(seed)
    ends = [part * views // count for part in range(count + 1)]
    held = tuple(int(torch.randint(low, high, (), generator=generator)) for low, high in pairwise(ends))
    return tuple(view for view in range(views) if view not in held), held


def folds(views: int, held: Sequence[int]) -> list[tuple[int, ...]]:
    """Return parts that share out all views, the held ones first and the others alike.

        fold k has, of every part that `hold_out` drew a view of, the view k places on, and around its end

    Raises: InputError for held views of which not one lies in each part.
    Holds: exactly.
    """
    ends = [part * views // len(held) for part in range(len(held) + 1)]
    parts = list(zip(held, pairwise(ends), strict=True))
    if any(not low <= view < high for view, (low, high) in parts):
        raise InputError(
            f"of {len(held)} equal parts of {views} views one each has to be held, not {tuple(held)}"
        )
    longest = max(high - low for _, (low, high) in parts)
    return [
        tuple(low + (view - low + k) % (high - low) for view, (low, high) in parts if k < high - low)
        for k in range(longest)
    ]


@dataclass(frozen=True, eq=False)
class ViewCheck:
    """Held-out measurements beside what the samples of an image foretell of them.

        y ~ N(A m, v + σ²),  m and v the mean and variance over samples, v that of A x_k

    With few samples v is itself uncertain: for a perfect sampler of K samples of a Gaussian the chi-square is
    not 1 but up to (1 + 1/K)(K − 1)/(K − 3), reached where v is far above σ²: 1.06 for 50, 1.41 for 10.

    Shapes: prediction and sinogram (views, detectors).
    """

    prediction: Predictive
    """Of the measurements: A x_k as samples, σ² as noise; in float64."""
    sinogram: Float[Tensor, "views detectors"]

    @property
    def z(self) -> Float[Tensor, "views detectors"]:
        """Errors of the mean in their foretold standard deviations, (y − A m)/√(v + σ²)."""
        return (self.sinogram - self.prediction.mean) / self.prediction.std

    @property
    def chi_square(self) -> float:
        """Mean of z²: 1 where error bars and noise are right, above it where they are too small."""
        return float(self.z.square().mean())

    @property
    def misfit(self) -> float:
        """Mean of (y − A m)²/σ²: how much larger errors are than noise explains."""
        return float(((self.sinogram - self.prediction.mean).square() / self.prediction.aleatoric).mean())

    @property
    def nll(self) -> float:
        """Negative log likelihood of a ray under N(A m, v + σ²), in nats."""
        return float(negative_log_likelihood(self.prediction.moment_matched(), self.sinogram))

    def coverage(self, levels: Float[Tensor, " levels"] | None = None) -> Float[Tensor, " levels"]:
        """Return `gramian.core.calibration.coverage` by the mixture of samples with their noise.

        Holds: exactly; a perfect sampler of few samples stays below the levels where v is above σ².
        """
        return coverage(self.prediction, self.sinogram, levels)

    def drawn_coverage(
        self, generator: torch.Generator, levels: Float[Tensor, " levels"] | None = None
    ) -> Float[Tensor, " levels"]:
        """Return the coverage by ranks among one noisy measurement drawn from every sample.

        Holds: the expectation is the level for a perfect sampler of any number of samples.
        """
        means, stds = self.prediction.components
        drawn = torch.randn(means.shape, generator=generator, device=generator.device, dtype=means.dtype)
        noisy = Predictive.from_samples(means + stds * drawn.to(means.device))
        return randomised_coverage(noisy, self.sinogram, levels)


def pixel_energy(views: Float[Tensor, "*batch views detectors"]) -> Float[Tensor, "*batch views"]:
    """Return what each view says of the sum of squares of the image that it is a projection of.

        Σ |ω| |F v|²,  F the Fourier transform along the detectors, ω its frequency (a quarter of the first
        one for the mean)

    Views are slices of the image's Fourier transform, so that over all angles of half a turn this is in
    proportion to the sum of the image's squares.

    Shapes: (*batch, views, detectors) -> (*batch, views).
    Holds: in the mean over many angles, for parallel beams with detectors as narrow as pixels; about so for
        fans. Joseph's beams blur what alternates between neighbours, of which it tells less.
    Source: the Fourier slice theorem, Bracewell 1956, doi 10.1071/PH560198.
    """
    return (_frequencies(views) * torch.fft.fft(views).abs().square()).sum(-1)


def noise_energy(variance: Float[Tensor, "views detectors"]) -> Float[Tensor, " views"]:
    """Return the expectation of `pixel_energy` of noise that is independent between rays.

        Σ |ω| Σ_detectors σ²

    Shapes: (views, detectors) -> (views).
    Holds: exactly.
    """
    return _frequencies(variance).sum() * variance.sum(-1)


def check_views(
    samples: Float[Tensor, "members n n"],
    projector: LinearMap,
    sinogram: Float[Tensor, "views detectors"],
    std: float | Tensor,
) -> ViewCheck:
    """Compare held-out measurements with what samples of the image foretell of them.

    Args:
        samples: images that were fitted without these views.
        projector: that of the held-out views, as `projector.subset(held)`.
        sinogram: the held-out measurements.
        std: standard deviation of their noise, one or one for every measurement.

    Shapes: samples (members, n, n), sinogram (views, detectors), std () or (views, detectors).
    Raises: InputError for fewer samples than two, shapes that do not fit, numbers that are not finite, and
        noise that is not above 0.
    Holds: exactly.
    """
    _several(samples)
    projected = projector.A(samples).double()
    if sinogram.shape != projected.shape[1:] or not sinogram.numel():
        raise InputError(
            f"the sinogram of these views has to be {tuple(projected.shape[1:])} and not empty, "
            f"not {tuple(sinogram.shape)}"
        )
    if not sinogram.isfinite().all():
        raise InputError("held-out measurements have to be finite, but some are NaN or infinite")
    noise = torch.as_tensor(std, dtype=projected.dtype, device=projected.device)
    if noise.shape not in ((), sinogram.shape) or not ((noise > 0) & noise.isfinite()).all():
        raise InputError(
            "the standard deviation of noise has to be finite and above 0, one number or "
            f"{tuple(sinogram.shape)} like the sinogram"
        )
    return ViewCheck(Predictive.from_samples(projected, noise.square()), sinogram.to(projected))


@dataclass(frozen=True)
class SpreadFactor:
    """How many times larger the deviations of samples from their mean should be, by held-out views."""

    factor: float
    """s: 1 where samples spread as they should, above it where they are too sure of themselves."""
    error: float
    """Standard error of s, from the median distance of views from their median; NaN with one view."""
    gain: float
    """Mean log likelihood of a ray at s above that at 1, in nats; below 0 where rays ask for less."""
    capped: bool
    """Whether s is the largest that is allowed: the samples hardly differ where the rays meet them."""


def spread_factor(check: ViewCheck) -> SpreadFactor:
    """Return the factor on deviations from the mean with which samples err as much as their mean does.

        s² = median over views of Σ |ω| (|F(y − A m)|² − E|F n|²) / ((1 + 1/K) Σ |ω| Var_k F(A x_k))

    F is the Fourier transform of a view along its detectors, ω its frequency (a quarter of the first one for
    the mean), n the noise and Var_k the variance over K samples; a negative s² becomes 0. Since views are
    slices of the image's Fourier transform, Σ |ω| |F A e|² over all angles is the squared norm of an image e
    of errors, so that pixels are compared with pixels. A factor by the likelihood of rays can miss that on
    either side: where deviations alternate from pixel to pixel and errors do not, they cancel along rays, and
    it is too large. The median is over few views of which one may stand out, along the straight edges of a
    table, or by its noise.

    What the mean, the noise level and the projector get wrong counts as missing spread. The views that chose
    s cannot judge it; that takes others.

    Raises: InputError where the samples agree on every ray.
    Holds: in expectation of a view's sums, for a perfect sampler s = 1, whatever K, and the median of skewed
        ones a little below; what it says of pixels holds for parallel beams with detectors as narrow as
        pixels, about so for fans, and between few views by chance alone.
    """
    residuals, spread = _energies(check)
    if not spread.any():
        raise InputError("all samples foretell the same of the held-out views, so no factor spreads them")
    ratios = torch.where(spread > 0, residuals / spread, torch.where(residuals > 0, math.inf, 0.0))
    square = max(_median(ratios), 0.0)
    factor = min(math.sqrt(square), LARGEST)
    squares = (check.sinogram - check.prediction.mean).square()
    variance, noise = check.prediction.variance, check.prediction.aleatoric
    found, one = (_log_likelihood(s, squares, variance, noise) for s in (factor, 1.0))
    return SpreadFactor(factor, _error(ratios, square), (found - one) / squares.numel(), factor >= LARGEST)


def check_tails(tails: float | None) -> None:
    """Raise InputError for degrees of freedom at which a t distribution has no finite variance.

    Holds: exactly.
    """
    if tails is not None and not 2 < tails < math.inf:
        raise InputError(f"tails have a finite number of more than 2 degrees of freedom, not {tails:g}")


@overload
def rescaled(given: Tensor, factor: float, box: Box = FREE, tails: float | None = None) -> Tensor: ...
@overload
def rescaled(given: Predictive, factor: float, box: Box = FREE, tails: float | None = None) -> Predictive: ...
def rescaled(
    given: Tensor | Predictive, factor: float, box: Box = FREE, tails: float | None = None
) -> Tensor | Predictive:
    """Return samples, or a prediction, with all deviations from the mean multiplied.

        x_k' = m + s (w_k d_k − Σ_j w_j d_j / K),  d_k = x_k − m,  then within the box
        w_k² = quantiles of ν/χ²_ν at (k − ½)/K over their mean, in an order drawn once;  1 without tails ν

    s sets how much samples err in all, ν how that is shared: with Gaussian d_k, x' follows Student's t with ν
    degrees of freedom, as errors do whose scale varies from place to place by more than the samples know.
    The noise of a prediction stays as it is, and one without samples has no tails to change. The box moves
    the mean where it cuts samples off, and with it samples spread less than by s.

    Shapes: samples (members, *size) -> (members, *size).
    Raises: InputError for a factor that is negative or not finite, fewer samples than two, a box or tails for
        a prediction without samples, and as `check_tails`.
    Holds: the mean exactly, without a box; variance' = s² variance exactly without tails, else in expectation
        over the order.
    Source: Student's t as a mixture of Gaussians over their scale: Andrews, Mallows 1974, "Scale mixtures of
        normal distributions".
    """
    if not 0 <= factor < math.inf:
        raise InputError(f"deviations are multiplied by a finite number of at least 0, not {factor}")
    check_tails(tails)
    if isinstance(given, Tensor):
        _several(given)
        return clamped(_spread(given, given.mean(0), factor, tails), box)
    if given.samples is None:
        if box != FREE or tails is not None:
            raise InputError("a prediction without samples has no box or tails; give samples, or neither")
        return Predictive(given.mean, factor**2 * given.variance, given.noise)
    moved = clamped(_spread(given.samples, given.mean, factor, tails), box)
    if box == FREE and tails is None:
        return Predictive(given.mean, factor**2 * given.variance, given.noise, moved)
    return Predictive.from_samples(moved, given.noise)


def _energies(check: ViewCheck) -> tuple[Float[Tensor, " views"], Float[Tensor, " views"]]:
    """Give each view's energy of residuals without their noise, and that which perfect samples would have."""
    prediction, samples = check.prediction, check.prediction.samples
    if samples is None:
        raise InputError("a factor on the spread of samples needs the samples")
    noise = noise_energy(prediction.aleatoric.expand_as(check.sinogram))
    count = len(samples)
    spread = pixel_energy(samples - prediction.mean).sum(0) / (count - 1)
    return pixel_energy(check.sinogram - prediction.mean) - noise, (1 + 1 / count) * spread


def _frequencies(views: Tensor) -> Float[Tensor, " detectors"]:
    """Give |ω|, and for ω = 0 its mean over that share of the line."""
    detectors = views.shape[-1]
    frequency = torch.fft.fftfreq(detectors, dtype=views.dtype, device=views.device).abs()
    frequency[0] = 1 / (4 * detectors)
    return frequency


def _median(values: Float[Tensor, " views"]) -> float:
    """Give the median, of an even number the mean of the middle two."""
    ordered = values.sort().values
    return float(ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _error(ratios: Float[Tensor, " views"], square: float) -> float:
    """Give the standard error of s by that of a median of Gaussian s², √(π/2)/Φ⁻¹(¾) MAD/√views."""
    if len(ratios) < 2:
        return math.nan
    if not 0 < square < math.inf:
        return 0.0
    away = math.sqrt(math.pi / 2) / 0.6745 * _median((ratios - square).abs())
    return away / math.sqrt(len(ratios)) / (2 * math.sqrt(square))


def _spread(samples: Tensor, mean: Tensor, factor: float, tails: float | None) -> Tensor:
    """Give samples with deviations s times as large, mixed over scales to tails of a t distribution."""
    deviations = samples - mean
    if tails is not None:
        deviations = deviations * _scales(len(samples), tails).to(samples).view(-1, *[1] * mean.ndim)
        deviations = deviations - deviations.mean(0)
    return mean + factor * deviations


def _scales(count: int, tails: float) -> Float[Tensor, " count"]:
    """Give w, of mean square 1."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    squares = 1 / torch.from_numpy(gammaincinv(tails / 2, levels.numpy()))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (squares / squares.mean()).sqrt()[order]


def _log_likelihood(factor: float, squares: Tensor, spread: Tensor, noise: Tensor) -> float:
    """Give Σ ln N(y; A m, s² v + σ²), but for a constant."""
    total = factor**2 * spread + noise
    return -0.5 * float((total.log() + squares / total).sum())


def _several(samples: Tensor) -> None:
    if samples.ndim < 3 or len(samples) < 2 or not samples.is_floating_point():
        raise InputError(
            "error bars need at least 2 samples (members, n, n) of floating-point numbers, "
            f"not {tuple(samples.shape)} of {samples.dtype}"
        )
    if not samples.isfinite().all():
        raise InputError("samples of an image have to be finite, but some hold NaN or infinity")
