"""What a detector adds to exact projections: Gaussian noise at a stated level and counts of photons."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError

DARK = 0.1
"""Photons that stand for none when a logarithm is taken (Leuschner, Schmidt, Baguer, Maass 2021)."""


@dataclass(frozen=True)
class GaussianNoise:
    """Independent noise of one standard deviation on every measurement.

        y = p + σ ε,  ε ~ N(0, I)

    Raises: InputError for a standard deviation that is negative or not finite.
    """

    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std >= 0):
            raise InputError(f"a standard deviation has to be finite and at least 0, not {self.std}")

    @classmethod
    def at_snr(cls, sinogram: Float[Tensor, "..."], decibel: float) -> "GaussianNoise":
        """Return the noise whose power is that many decibels below the power of all measurements.

            σ = ‖p‖₂ / √M · 10^(−dB/20)

        Shapes: sinogram (...), M entries.
        Raises: InputError for an empty sinogram or one that is not finite, and decibels that are not finite.
        Holds: exactly.
        """
        if sinogram.numel() == 0 or not sinogram.isfinite().all():
            raise InputError("a noise level is measured on a sinogram of finite numbers, at least one")
        if not math.isfinite(decibel):
            raise InputError(f"a signal-to-noise ratio has to be a finite number of decibels, not {decibel}")
        power = float(sinogram.double().square().mean())
        return cls(math.sqrt(power) * 10 ** (-decibel / 20))

    def sample(
        self, sinogram: Float[Tensor, "*batch"], generator: torch.Generator
    ) -> Float[Tensor, "*batch"]:
        """Draw noisy measurements of exact projections.

        Shapes: sinogram (*batch) -> (*batch).
        Holds: exactly.
        """
        return sinogram + self.std * _normal(sinogram, generator)

    def log_likelihood(
        self, measured: Float[Tensor, "*batch"], projections: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """Return the log density of every measurement, in nats.

            ln p(y | p) = −½ (y − p)²/σ² − ½ ln 2πσ²

        Shapes: (*batch), (*batch) -> (*batch).
        Raises: InputError for σ = 0.
        Holds: exactly.
        """
        if self.std == 0:
            raise InputError("measurements without noise have no density; give a standard deviation above 0")
        z = (measured - projections) / self.std
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi) - math.log(self.std)


@dataclass(frozen=True)
class PoissonNoise:
    """Counts of photons behind an object that attenuates them.

        n ~ Poisson(I₀ e^(−p)),  p the line integral of the attenuation (no unit)

    Raises: InputError for a number of photons or a stand-in for none that is not finite and above 0.
    """

    photons: float
    """I₀, photons that a detector counts without an object."""
    dark: float = DARK
    """Photons that stand for a count of zero when its logarithm is taken."""

    def __post_init__(self) -> None:
        for name, value in (("number of photons", self.photons), ("stand-in for no photon", self.dark)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"the {name} has to be finite and above 0, not {value}")

    def expected(self, projections: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Return the expected counts, I₀ e^(−p)."""
        return self.photons * (-projections).exp()

    def counts(
        self, projections: Float[Tensor, "*batch"], generator: torch.Generator
    ) -> Float[Tensor, "*batch"]:
        """Draw counts of photons.

        Shapes: projections (*batch) -> (*batch), whole numbers.
        Raises: InputError for projections that are not finite.
        Holds: exactly.
        """
        if not projections.isfinite().all():
            raise InputError("photons are counted behind finite line integrals, but some are NaN or infinite")
        expected = self.expected(projections).double().to(generator.device)
        return torch.poisson(expected, generator=generator).to(projections)

    def transmission(self, counts: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Return the share of photons that came through, n/I₀."""
        return counts / self.photons

    def line_integrals(self, counts: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Return the line integrals that counts tell of; finite for a count of zero.

            y = −ln(max(n, dark)/I₀)

        Shapes: (*batch) -> (*batch).
        Raises: InputError for negative counts and NaN.
        Holds: exactly; biased upwards by about e^p/(2 I₀).
        """
        if not (counts >= 0).all():
            raise InputError("counts of photons have to be at least 0, but some are negative or NaN")
        return -(counts.clamp(min=self.dark) / self.photons).log()

    def sample(
        self, sinogram: Float[Tensor, "*batch"], generator: torch.Generator
    ) -> Float[Tensor, "*batch"]:
        """Draw line integrals as measured: counts, then their logarithm.

        Shapes: sinogram (*batch) -> (*batch).
        Raises: InputError as `counts`.
        Holds: exactly.
        """
        return self.line_integrals(self.counts(sinogram, generator))

    def log_variance(self, sinogram: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Return the variance of measured line integrals, the inverse of the weights of least squares.

            var y ≈ e^p / I₀

        Shapes: (*batch) -> (*batch).
        Holds: as I₀ e^(−p) → ∞, relative error O(1/(I₀ e^(−p))).
        Source: Sauer, Bouman 1993, doi 10.1109/78.193196.
        """
        return sinogram.exp() / self.photons

    def log_likelihood(
        self, counts: Float[Tensor, "*batch"], projections: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """Return the log probability of every count, in nats; finite for a count of zero.

            ln P(n | p) = n (ln I₀ − p) − I₀ e^(−p) − ln n!

        Shapes: (*batch), (*batch) -> (*batch).
        Holds: exactly.
        """
        logarithm = math.log(self.photons) - projections
        return counts * logarithm - logarithm.exp() - torch.lgamma(counts + 1)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a standard normal of a tensor's shape where the generator lives."""
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return drawn.to(like.device)
