"""The predictive distribution of a real number at every input: what every Bayesian method ends in."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gramian.errors import InputError

BISECTIONS = 128
"""More halvings than any interval of two finite numbers of one size stands; they end at rounding."""


@dataclass(frozen=True, eq=False)
class Predictive:
    """A prediction with two kinds of doubt: about the function, and about targets given the function.

        without samples: y ~ N(mean, variance + noise)
        with samples:    y ~ 1/M Σ_m N(sample_m, noise_m), the uniform mixture of M members

    `variance` is epistemic and shrinks with data, `noise` is aleatoric; without noise the distribution is
    that of the latent function. With samples every method below is exact for the mixture; that of the
    Gaussian of the same mean and variance is had from `moment_matched()`. Every entry of the batch is a
    distribution of its own.

    Shapes: mean and variance (*batch), noise (*batch) or (members, *batch), samples (members, *batch).
    Raises: InputError for shapes that do not fit, numbers that are not finite, and negative variances.
    """

    mean: Float[Tensor, "*batch"]
    variance: Float[Tensor, "..."]
    noise: Float[Tensor, "..."] | None = None
    samples: Float[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        shape = self.mean.shape
        if self.samples is not None and (self.samples.shape[1:] != shape or len(self.samples) == 0):
            raise InputError(
                f"samples have to be (members, …) over a mean {tuple(shape)}, not {tuple(self.samples.shape)}"
            )
        if self.variance.shape != shape:
            raise InputError(
                f"the variance has to be {tuple(shape)} like the mean, not {tuple(self.variance.shape)}"
            )
        wide = None if self.samples is None else self.samples.shape
        if self.noise is not None and self.noise.shape not in (shape, wide):
            raise InputError(
                f"the noise has to be {tuple(shape)} like the mean or (members, …) like the samples, "
                f"not {tuple(self.noise.shape)}"
            )
        for name, values in (("mean", self.mean), ("samples", self.samples)):
            if values is not None and not values.isfinite().all():
                raise InputError(f"the {name} of a prediction has to be finite, but holds NaN or infinity")
        for name, values in (("variance", self.variance), ("noise variance", self.noise)):
            if values is not None and not (values.isfinite() & (values >= 0)).all():
                raise InputError(f"the {name} of a prediction has to be finite and at least 0")

    @classmethod
    def gaussian(
        cls, mean: Shaped[Tensor, "..."], variance: float | Tensor, noise: float | Tensor | None = None
    ) -> "Predictive":
        """Make the Gaussian N(mean, variance + noise); variances are broadcast to the mean.

        Shapes: mean (*batch), variance and noise () or whatever broadcasts to (*batch).
        Raises: InputError for a mean that is not floating point, and as the class.
        Holds: exactly.
        """
        mean = _floating("mean", mean)
        known = None if noise is None else _spread("noise variance", noise, mean)
        return cls(mean, _spread("variance", variance, mean), known)

    @classmethod
    def from_samples(
        cls,
        samples: Shaped[Tensor, "..."],
        noise: float | Tensor | None = None,
        correction: int = 1,
    ) -> "Predictive":
        """Make the mixture of members' predictions, each with the common noise or with its own.

            mean = 1/M Σ_m f_m,   variance = 1/(M − correction) Σ_m (f_m − mean)²

        With correction 1 the variance estimates without bias that of the law the members are drawn from; with
        0 it is the variance of the mixture itself.

        Shapes: samples (members, *batch), noise () or (*batch) or (members, *batch).
        Raises: InputError for no more members than the correction, and as the class.
        Holds: exactly.
        Source: Lakshminarayanan, Pritzel, Blundell 2017, arXiv 1612.01474.
        """
        samples = _floating("samples", samples)
        if samples.ndim == 0 or len(samples) <= correction:
            count = 0 if samples.ndim == 0 else len(samples)
            raise InputError(
                f"a variance over members needs at least {correction + 1} of them, not {count}; "
                "with correction=0 one member will do"
            )
        mean = samples.mean(0)
        variance = samples.var(0, correction=correction)
        if noise is not None:
            own = isinstance(noise, Tensor) and noise.shape == samples.shape
            noise = _spread("noise variance", noise, samples if own else mean)
        return cls(mean, variance, noise, samples)

    @property
    def aleatoric(self) -> Float[Tensor, "*batch"]:
        """Noise variance, the mean over members where each has its own; 0 where there is none."""
        if self.noise is None:
            return torch.zeros_like(self.mean)
        return self.noise if self.noise.shape == self.mean.shape else self.noise.mean(0)

    @property
    def total(self) -> Float[Tensor, "*batch"]:
        """Variance of a new target: variance + noise."""
        return self.variance + self.aleatoric

    @property
    def std(self) -> Float[Tensor, "*batch"]:
        """Standard deviation of a new target, √(variance + noise)."""
        return self.total.sqrt()

    @property
    def components(self) -> tuple[Float[Tensor, " members *batch"], Float[Tensor, " members *batch"]]:
        """Means and standard deviations of the mixture; without samples it has the one member."""
        if self.samples is None:
            return self.mean[None], self.std[None]
        noise = self.aleatoric if self.noise is None else self.noise
        return self.samples, noise.sqrt().expand_as(self.samples)

    def moment_matched(self) -> "Predictive":
        """Return the Gaussian of the same mean and variances.

        Holds: exactly in the first two moments.
        """
        return Predictive(self.mean, self.variance, None if self.noise is None else self.aleatoric)

    def log_likelihood(self, y: Float[Tensor, "..."]) -> Float[Tensor, "*batch"]:
        """Return the log density at targets.

            ln p(y) = ln 1/M Σ_m exp(−½ (y − μ_m)²/s_m² − ½ ln 2π s_m²)

        Shapes: y (*batch) -> (*batch).
        Raises: InputError for targets of another shape, and where a member has neither noise nor variance.
        Holds: exactly.
        """
        means, stds = self.components
        if not (stds > 0).all():
            raise InputError(
                "a density needs a variance above 0 everywhere; give noise, or take moment_matched()"
            )
        z = (self._targets(y) - means) / stds
        return (-0.5 * (z.square() + math.log(2 * math.pi)) - stds.log()).logsumexp(0) - math.log(len(means))

    def cdf(self, y: Float[Tensor, "..."]) -> Float[Tensor, "*batch"]:
        """Return the probability of a new target of at most y.

            F(y) = 1/M Σ_m Φ((y − μ_m)/s_m)

        Shapes: y (*batch) -> (*batch).
        Raises: InputError for targets of another shape.
        Holds: exactly; a member without variance is a step.
        """
        means, stds = self.components
        return _below(self._targets(y) - means, stds).mean(0)

    def survival(self, y: Float[Tensor, "..."]) -> Float[Tensor, "*batch"]:
        """Return the probability of a new target of at least y, without cancellation in the upper tail.

            P(Y ≥ y) = 1/M Σ_m Φ((μ_m − y)/s_m)

        Shapes: y (*batch) -> (*batch).
        Raises: InputError for targets of another shape.
        Holds: exactly.
        """
        means, stds = self.components
        return _below(means - self._targets(y), stds).mean(0)

    def quantile(self, level: float | Tensor) -> Float[Tensor, "..."]:
        """Return the number that a new target stays below with probability `level`.

            F(Q(p)) = p;   Gaussian: Q(p) = mean + Φ⁻¹(p) √(variance + noise)

        Of a mixture by bisection between its members' quantiles, of samples without noise by their order.
        Where F is flat at p, Q is the end of the flat piece that is farther from the median.

        Shapes: level (*levels) -> (*levels, *batch).
        Raises: InputError for levels outside [0, 1].
        Holds: exactly; to rounding for mixtures.
        """
        levels = torch.as_tensor(level, dtype=torch.float64)
        means, stds = self.components
        found = [
            _tail(means, stds, p) if p <= 0.5 else -_tail(-means, stds, 1 - p)
            for p in _shares(levels).flatten().tolist()
        ]
        empty = self.mean.new_empty((0, *self.mean.shape))
        return torch.stack(found or [empty]).view((*levels.shape, *self.mean.shape))

    def interval(self, level: float) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Return the central interval that holds a new target with probability `level`.

            [Q((1 − level)/2), Q((1 + level)/2)]

        Shapes: -> (*batch), (*batch).
        Raises: InputError for a level outside [0, 1].
        Holds: exactly; of samples without noise with at least that probability.
        """
        _shares(torch.as_tensor(level, dtype=torch.float64))
        means, stds = self.components
        outside = (1 - level) / 2
        return _tail(means, stds, outside), -_tail(-means, stds, outside)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, " count *batch"]:
        """Draw new targets; one draw keeps to one member over the whole batch.

            y = μ_m + s_m ε,  m uniform,  ε ~ N(0, I)

        The entries of a Gaussian, which has no members, are drawn independently.

        Shapes: -> (count, *batch).
        Raises: InputError for a negative count.
        Holds: exactly.
        """
        if count < 0:
            raise InputError(f"the number of draws has to be at least 0, not {count}")
        means, stds = self.components
        place = generator.device
        members = torch.randint(len(means), (count,), generator=generator, device=place).to(means.device)
        shape = (count, *self.mean.shape)
        epsilon = torch.randn(shape, generator=generator, device=place, dtype=means.dtype).to(means.device)
        return means[members] + stds[members] * epsilon

    def _targets(self, y: Tensor) -> Tensor:
        if y.shape != self.mean.shape:
            raise InputError(
                f"targets have to be {tuple(self.mean.shape)} like the mean, not {tuple(y.shape)}"
            )
        return y


def _below(gap: Tensor, std: Tensor) -> Tensor:
    """Give P(s ε ≤ gap) for a standard normal ε; a step where s = 0."""
    safe = torch.where(std > 0, std, 1)  # and erfc, since torch.special.ndtr is 0 below −9
    return torch.where(std > 0, 0.5 * torch.erfc(-gap / (safe * math.sqrt(2))), (gap >= 0).to(gap.dtype))


def _tail(means: Tensor, stds: Tensor, level: float) -> Tensor:
    """Give the quantile of a mixture at a level of at most ½."""
    if not stds.any():
        rank = math.ceil(level * len(means) * (1 - 1e-12))  # a level of k/M is rank k in spite of rounding
        return means.kthvalue(max(rank, 1), dim=0).values
    z = torch.special.ndtri(torch.tensor(level, dtype=torch.float64)).to(means)
    ends = means + torch.where(stds > 0, stds * z, 0)
    lower, upper = ends.amin(0), ends.amax(0)
    if len(means) == 1 or level == 0:
        return lower
    for _ in range(BISECTIONS):
        middle = lower + (upper - lower) / 2
        if not ((lower < middle) & (middle < upper)).any():
            break
        reached = _below(middle - means, stds).mean(0) >= level
        lower, upper = torch.where(reached, lower, middle), torch.where(reached, middle, upper)
    return torch.where(_below(lower - means, stds).mean(0) >= level, lower, upper)


def _shares(levels: Tensor) -> Tensor:
    if not ((levels >= 0) & (levels <= 1)).all():
        raise InputError("levels have to be probabilities from 0 to 1")
    return levels


def _floating(name: str, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        raise InputError(f"the {name} of a prediction has to be floating point, not {values.dtype}")
    return values.double() if values.dtype in (torch.float16, torch.bfloat16) else values


def _spread(name: str, variance: float | Tensor, like: Tensor) -> Tensor:
    values = torch.as_tensor(variance, dtype=like.dtype, device=like.device)
    try:
        return values.expand_as(like)
    except RuntimeError:
        raise InputError(
            f"the {name} has to be one number or {tuple(like.shape)} like the prediction, "
            f"not {tuple(values.shape)}"
        ) from None
