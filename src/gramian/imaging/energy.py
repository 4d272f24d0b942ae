"""The energy of an image given its sinogram: minus its log posterior density, up to a constant.

It is what fields and grids of pixels are fitted to, and what chains sample. The published loss of
`gramian.imaging.objective` is the same with the other total variation, divided by the number of rays.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad as with_border

from gramian.errors import InputError
from gramian.imaging.radon import LinearMap

SMOOTHING = 1e-4
"""Differences below this size, of images that reach 1, count by their square."""


@dataclass(frozen=True, eq=False)
class Energy:
    """Minus the log density of images given a sinogram, under Gaussian noise and a prior of total variation.

        E(x) = ½ Σ ((y − A x)/σ)² + β Σ (√(d₁² + d₂² + ε²) − ε),   p(x | y) ∝ exp(−E(x))

    d₁ and d₂ are the forward differences of the image surrounded by zeros. β belongs to the images and to
    neither noise nor views: neighbours differ by about 1/β. In the published loss it is λ M/S for M rays and
    images of padded side S.

    Shapes: image (*batch, n, n) -> (*batch).
    Raises: InputError for noise that is not above 0 and finite or does not fit the sinogram, and a negative
        or infinite weight.
    Holds: exactly.
    Source: the likelihood of Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847, with the isotropic total
        variation of Rudin, Osher, Fatemi 1992, doi 10.1016/0167-2789(92)90242-F.
    """

    projector: LinearMap
    sinogram: Float[Tensor, "views detectors"]
    std: float | Float[Tensor, "views detectors"]
    """Standard deviation of the noise, of all rays or of each."""
    variation: float = 0.0
    """β, in nats for each unit of variation."""

    def __post_init__(self) -> None:
        std = torch.as_tensor(self.std)
        if std.shape not in ((), self.sinogram.shape) or not ((std > 0) & std.isfinite()).all():
            raise InputError(
                f"the noise has to be finite and above 0, one number or {tuple(self.sinogram.shape)} like "
                f"the sinogram, not {tuple(std.shape)} from {float(std.min()):.3g}"
            )
        if not 0 <= self.variation < math.inf:
            raise InputError(f"the weight of total variation has to be at least 0, not {self.variation}")

    def misfit(self, image: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return Σ ((y − A x)/σ)², about the number of rays for an image that explains them and no more."""
        return ((self.sinogram - self.projector.A(image)) / self.std).square().sum((-2, -1))

    def probe(self, image: Float[Tensor, "n n"], generator: torch.Generator) -> Float[Tensor, ""]:
        """Return a random form of the image, the mean of whose squared gradient is the energy's curvature.

            Σ ε ⊙ A x/σ + Σ √w (ε₁ d₁ + ε₂ d₂),  ε, ε₁, ε₂ ~ N(0, 1),  w = β/√(d₁² + d₂² + 1/β²) held fixed

        The mean over ε of the squared derivative by any parameter of the image is its entry on the diagonal
        of the Gauss–Newton matrix. Roughness is that of differences of about 1/β, which its prior expects: at
        an image without any it is far stiffer than around it.

        Shapes: image (n, n) -> ().
        Holds: exactly, in expectation, for the misfit; for the roughness with its weights as they are held.
        Source: Martens, Sutskever, Swersky 2012, arXiv 1206.6464 (diagonals of curvature by random vectors).
        """

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

        predicted = self.projector.A(image)
        form = (noise(predicted) * predicted / self.std).sum()
        if not self.variation:
            return form
        down, right = _differences(image)
        with torch.no_grad():
            size = (down.square() + right.square() + self.variation**-2).sqrt()
            root = (self.variation / size).sqrt()
        return form + (root * (noise(down) * down + noise(right) * right)).sum()

    def roughness(self, image: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the smoothed isotropic total variation, borders included."""
        down, right = _differences(image)
        return ((down.square() + right.square() + SMOOTHING**2).sqrt() - SMOOTHING).sum((-2, -1))

    def __call__(self, image: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the energy of every image, in nats."""
        energy = 0.5 * self.misfit(image)
        return energy + self.variation * self.roughness(image) if self.variation else energy


def _differences(image: Float[Tensor, "*batch n n"]) -> tuple[Tensor, Tensor]:
    """Give forward differences of images surrounded by zeros."""
    wide = with_border(image, (1,) * 4)
    return wide.diff(dim=-2)[..., :-1], wide.diff(dim=-1)[..., :-1, :]
