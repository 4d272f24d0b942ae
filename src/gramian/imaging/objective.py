"""What a field or a grid of pixels is fitted to: the likelihood of a sinogram and penalties of roughness.

The penalties of this file are those of fitted fields, sums over an image divided by its side S; the
isotropic total variation of classical reconstruction stands in `gramian.imaging.variation`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad as with_border

from gramian.errors import InputError

EPS = 5e-9
"""Added to squared residuals and to the variance of the noise."""

Penalty = Callable[[Tensor], Tensor]
"""A roughness of images (*batch, rows, columns) -> (*batch)."""


def data_loss(
    residual: Float[Tensor, "*batch views detectors"], std: float, eps: float = EPS
) -> Float[Tensor, "*batch"]:
    """Return the mean negative log likelihood of a sinogram's residuals under Gaussian noise, in nats.

        ½ ln 2π(σ² + ε) + mean ½ (d² + ε)/(σ² + ε),  d = y − A x

    Shapes: (*batch, views, detectors) -> (*batch).
    Raises: InputError for a negative standard deviation or ε, and for both 0.
    Holds: exactly.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (their code adds the ε).
    """
    if not (std >= 0 and eps >= 0 and 0 < std**2 + eps < math.inf):
        raise InputError(f"σ and ε have to be at least 0 and not both 0, not {std} and {eps}")
    variance = std**2 + eps
    squares = (residual.square() + eps).mean((-2, -1))
    return 0.5 * math.log(2 * math.pi * variance) + 0.5 * squares / variance


def absolute_variation(image: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """Return the anisotropic total variation in units of the side.

        R(x) = 1/S Σ (|x_{i+1,j} − x_ij| + |x_{i,j+1} − x_ij|)

    Shapes: (*batch, rows, columns) -> (*batch); S is the number of columns.
    Holds: exactly; the derivative of |0| is taken as 0.
    """
    return _of_differences(image, torch.abs)


def squared_variation(image: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """Return the sum of squared differences in units of the side.

        R(x) = 1/S Σ ((x_{i+1,j} − x_ij)² + (x_{i,j+1} − x_ij)²)

    Shapes: (*batch, rows, columns) -> (*batch); S is the number of columns.
    Holds: exactly.
    """
    return _of_differences(image, torch.square)


def huber_variation(
    image: Float[Tensor, "*batch rows columns"], threshold: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Return a total variation that is quadratic for small differences, in units of the side.

        R(x) = 1/S Σ h(x_{i+1,j} − x_ij) + h(x_{i,j+1} − x_ij),
        h(t) = ½ t² for |t| ≤ δ, else δ (|t| − ½ δ)

    Shapes: (*batch, rows, columns) -> (*batch); S is the number of columns.
    Raises: InputError for a threshold that is not above 0.
    Holds: exactly; once differentiable.
    """
    if not threshold > 0:
        raise InputError(f"the threshold between square and line has to be above 0, not {threshold}")

    def huber(t: Tensor) -> Tensor:
        size = t.abs()
        return torch.where(size <= threshold, 0.5 * t.square(), threshold * (size - 0.5 * threshold))

    return _of_differences(image, huber)


PENALTIES: dict[str, Penalty] = {
    "absolute": absolute_variation,
    "squared": squared_variation,
    "huber": huber_variation,
}
"""Roughness penalties by name."""


@dataclass(frozen=True, eq=False)
class ProjectionLoss:
    """The loss of an image given its noisy sinogram: likelihood and roughness.

        L(x) = ½ ln 2π(σ² + ε) + mean ½ (d² + ε)/(σ² + ε) + λ R(x padded),  d = y − A x

    The image is surrounded by `pad` zeros on every side before R is taken, so that a step at its border
    counts, and S is the padded side.

    Shapes: image (*batch, n, n) -> (*batch).
    Raises: InputError for a negative λ or padding, and as `data_loss`.
    Holds: exactly.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847.
    """

    projector: Any
    """Anything with A(image) -> sinogram."""
    sinogram: Float[Tensor, "... views detectors"]
    std: float
    """Standard deviation of the noise, in the unit of the sinogram."""
    weight: float = 0.0
    """λ, the weight of the roughness."""
    penalty: Penalty = absolute_variation
    pad: int = 0
    eps: float = EPS

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf) or self.pad < 0:
            raise InputError(
                "the weight of a penalty and the padding have to be at least 0, "
                f"not {self.weight} and {self.pad}"
            )
        data_loss(self.sinogram, self.std, self.eps)

    def data(self, image: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the part of the likelihood."""
        return data_loss(self.sinogram - self.projector.A(image), self.std, self.eps)

    def roughness(self, image: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return R of the padded image; one zero on each side is enough for its value."""
        edge, n = min(self.pad, 1), image.shape[-1]
        value = self.penalty(with_border(image, (edge,) * 4) if edge else image)
        return value * ((n + 2 * edge) / (n + 2 * self.pad))

    def __call__(self, image: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the loss of every image."""
        loss = self.data(image)
        return loss + self.weight * self.roughness(image) if self.weight else loss

    def variation_weight(self, n: int) -> float:
        """Return λ' of the same problem for images of side n in the form ½‖Ax − y‖² + λ' Σ|∇x|.

            λ' = λ (σ² + ε) M/(n + 2 pad),  R the absolute variation

        Holds: exactly.
        """
        measurements = math.prod(self.sinogram.shape[-2:])
        return self.weight * (self.std**2 + self.eps) * measurements / (n + 2 * self.pad)


def _of_differences(image: Tensor, size: Penalty) -> Tensor:
    down, right = image.diff(dim=-2), image.diff(dim=-1)
    return (size(down).sum((-2, -1)) + size(right).sum((-2, -1))) / image.shape[-1]
