"""Algebraic and statistical reconstruction by repeated projection and back-projection.

Every method takes a projector, anything with A(image) -> sinogram and its adjoint A_adjoint, and sinograms
(*batch, views, detectors), and returns images (*batch, n, n) of the same type. All of them first come nearer
to the truth and then to the noise, so the number of iterations is a setting to be chosen, not a tolerance.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.radon import LinearMap

Callback = Callable[[int, Tensor], object]
"""Called after every iteration with its number, from 1, and the image; a true answer ends the method."""
Box = tuple[float | None, float | None]
"""Least and greatest value of a pixel; None where there is none."""
FREE: Box = (None, None)
NON_NEGATIVE: Box = (0.0, None)
GOLDEN = 0.6180339887498949
NOTHING = 1e-6
"""Sums of a row or column of A below this share of the largest count as empty."""


def sirt(
    projector: LinearMap,
    sinogram: Float[Tensor, "*batch views detectors"],
    iterations: int = 100,
    *,
    relaxation: float = 1.0,
    box: Box = FREE,
    start: Float[Tensor, "*batch n n"] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Reconstruct by the simultaneous iterative technique, a gradient method in the weights of A.

        x ← P(x + λ C Aᵀ R (y − A x)),  R = 1/row sums of A,  C = 1/column sums, P the projection on the box

    Shapes: (*batch, views, detectors) -> (*batch, n, n).
    Raises: InputError for a sinogram that is not finite, a relaxation outside (0, 2), a negative number of
        iterations and an empty box.
    Holds: exactly, Σ R (y − Ax)² never grows, for A ≥ 0.
    Source: Gilbert 1972, doi 10.1016/0022-5193(72)90180-4; weights: Gregor, Benson 2008,
        doi 10.1109/TMI.2008.923696.
    """
    checked(sinogram, iterations, box)
    _relaxed(relaxation)
    x = _started(projector, sinogram, start)
    rays, pixels = _sums(projector, sinogram, x)
    for step in range(1, iterations + 1):
        x = clamped(x + relaxation * pixels * projector.A_adjoint(rays * (sinogram - projector.A(x))), box)
        if callback is not None and callback(step, x):
            break
    return x


def sart(
    projector: LinearMap,
    sinogram: Float[Tensor, "*batch views detectors"],
    iterations: int = 2,
    *,
    relaxation: float = 0.5,
    subset: int = 1,
    box: Box = FREE,
    start: Float[Tensor, "*batch n n"] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Reconstruct by the simultaneous algebraic technique: SIRT's step for one subset of views at a time.

        x ← P(x + λ C_b A_bᵀ R_b (y_b − A_b x))  for every subset b of views;  an iteration is one sweep

    Neighbouring views tell the same, so a sweep strides through the angles by about the golden section.

    Shapes: (*batch, views, detectors) -> (*batch, n, n).
    Raises: InputError for a subset of no view and as `sirt`.
    Holds: exactly, for consistent data ‖x − x*‖ in the norm of 1/C never grows where the C_b agree.
    Source: Andersen, Kak 1984, doi 10.1016/0161-7346(84)90008-7.
    """
    checked(sinogram, iterations, box)
    _relaxed(relaxation)
    blocks = ordered_subsets(sinogram.shape[-2], subset)
    parts = [of_views(projector, views, sinogram.shape[-2]) for views in blocks]
    x = _started(projector, sinogram, start)
    data = [sinogram[..., views, :] for views in blocks]
    weights = [_sums(part, y, x) for part, y in zip(parts, data, strict=True)]
    for step in range(1, iterations + 1):
        for part, y, (rays, pixels) in zip(parts, data, weights, strict=True):
            x = clamped(x + relaxation * pixels * part.A_adjoint(rays * (y - part.A(x))), box)
        if callback is not None and callback(step, x):
            break
    return x


def cgls(
    projector: LinearMap,
    sinogram: Float[Tensor, "*batch views detectors"],
    iterations: int = 10,
    *,
    start: Float[Tensor, "*batch n n"] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Reconstruct by conjugate gradients on the normal equations.

        min ‖y − A x‖²  over the Krylov space of AᵀA and Aᵀ(y − A x₀)

    Shapes: (*batch, views, detectors) -> (*batch, n, n).
    Raises: InputError for a sinogram that is not finite and a negative number of iterations.
    Holds: exactly, ‖y − Ax‖ never grows; without rounding the least-squares solution after rank A iterations.
    Source: Hestenes, Stiefel 1952, doi 10.6028/jres.049.044; Björck 1996, doi 10.1137/1.9781611971484.
    """
    checked(sinogram, iterations, FREE)
    x = _started(projector, sinogram, start)
    residual = sinogram - projector.A(x)
    gradient = projector.A_adjoint(residual)
    direction, size = gradient, _squared(gradient)
    for step in range(1, iterations + 1):
        projected = projector.A(direction)
        length = _over(size, _squared(projected))
        x = x + length * direction
        residual = residual - length * projected
        gradient = projector.A_adjoint(residual)
        size, before = _squared(gradient), size
        direction = gradient + _over(size, before) * direction
        if callback is not None and callback(step, x):
            break
    return x


def em(
    projector: LinearMap,
    sinogram: Float[Tensor, "*batch views detectors"],
    iterations: int = 50,
    *,
    start: Float[Tensor, "*batch n n"] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Reconstruct by expectation maximisation under Poisson noise of the projections themselves.

        x ← x/(Aᵀ1) · Aᵀ(y/(A x)),  from x = 1

    Negative measurements count as 0. Pixels stay at least 0, and 0 where no ray passes.

    Shapes: (*batch, views, detectors) -> (*batch, n, n).
    Raises: InputError for a sinogram that is not finite, a negative number of iterations and a start that is
        negative somewhere.
    Holds: exactly, Σ (y ln Ax − Ax) never falls, for A ≥ 0.
    Source: Shepp, Vardi 1982, doi 10.1109/TMI.1982.4307558.
    """
    checked(sinogram, iterations, FREE)
    x = _started(projector, sinogram, start)
    if start is None:
        x = torch.ones_like(x)
    elif not (start >= 0).all():
        raise InputError("expectation maximisation starts at an image that is nowhere negative")
    seen = projector.A_adjoint(torch.ones_like(sinogram))
    scale, data = _inverse(seen), sinogram.clamp(min=0)
    x = x * (scale > 0)
    for step in range(1, iterations + 1):
        expected = projector.A(x)
        share = torch.where(expected > 0, data / torch.where(expected > 0, expected, 1), 0)
        x = x * scale * projector.A_adjoint(share)
        if callback is not None and callback(step, x):
            break
    return x


def largest_eigenvalue(projector: LinearMap, image: Float[Tensor, "n n"], iterations: int = 15) -> float:
    """Return the largest eigenvalue of AᵀA from below, by powers from a constant image.

    A has no negative entries, so neither has the eigenvector that is sought, and a constant image is near it.

    Shapes: image (n, n), for its size and type alone.
    Raises: InputError where A is 0.
    Holds: as iterations → ∞, geometrically; never above the eigenvalue.
    """
    x, value = torch.ones_like(image), 0.0
    for _ in range(iterations):
        x = x / x.norm()
        x = projector.A_adjoint(projector.A(x))
        value = float(x.norm())
        if value == 0:
            raise InputError("the projector maps an image of ones to 0; no ray meets the image")
    return value


def ordered_subsets(views: int, size: int = 1) -> list[list[int]]:
    """Return the subsets of views in the order of a sweep, each spread over all angles.

    Shapes: -> ⌈views/size⌉ lists that share out 0 … views − 1.
    Raises: InputError for a subset of no view.
    Holds: exactly.
    """
    if size < 1:
        raise InputError(f"a subset needs at least 1 view, not {size}")
    count = -(-views // size)
    order = sorted(range(count), key=lambda b: b * GOLDEN % 1)
    first = sorted(range(count), key=order.__getitem__)
    return [list(range(b, views, count)) for b in first]


class _SomeViews:
    """Some views of any operator, at the cost of all."""

    def __init__(self, whole: LinearMap, views: Sequence[int], count: int) -> None:
        self.whole, self.views, self.count = whole, list(views), count

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        return self.whole.A(x)[..., self.views, :]

    def A_adjoint(self, y: Tensor) -> Tensor:  # noqa: N802
        full = y.new_zeros(*y.shape[:-2], self.count, y.shape[-1])
        full[..., self.views, :] = y
        return self.whole.A_adjoint(full)


def of_views(projector: Any, views: Sequence[int], count: int) -> LinearMap:
    """Return the operator of some of all `count` views.

    Holds: exactly; by `projector.subset(views)` where there is such a method, else at the cost of all views.
    """
    if hasattr(projector, "subset"):
        return projector.subset(views)
    return _SomeViews(projector, views, count)


def clamped(x: Tensor, box: Box) -> Tensor:
    """Project on a box."""
    return x if box == FREE else x.clamp(*box)


def image_like(projector: LinearMap, sinogram: Tensor) -> Tensor:
    """Return an image of zeros that belongs to a sinogram."""
    return torch.zeros_like(projector.A_adjoint(torch.zeros_like(sinogram)))


def _started(projector: LinearMap, sinogram: Tensor, start: Tensor | None) -> Tensor:
    blank = image_like(projector, sinogram)
    if start is None:
        return blank
    if start.shape != blank.shape:
        raise InputError(f"a start has to be {tuple(blank.shape)}, not {tuple(start.shape)}")
    return start.to(blank).clone()


def _sums(projector: LinearMap, sinogram: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse sums of rows and of columns, 0 for empty ones."""
    rays = projector.A(torch.ones_like(image[(0,) * (image.ndim - 2)]))
    pixels = projector.A_adjoint(torch.ones_like(sinogram[(0,) * (sinogram.ndim - 2)]))
    return _inverse(rays), _inverse(pixels)


def _inverse(sums: Tensor) -> Tensor:
    """Invert what is not negligible."""
    there = sums > NOTHING * sums.max()
    return torch.where(there, 1 / torch.where(there, sums, 1), 0)


def _squared(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1), keepdim=True)


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def checked(sinogram: Tensor, iterations: int, box: Box) -> None:
    """Refuse what no method can use."""
    if sinogram.ndim < 2 or sinogram.numel() == 0 or not sinogram.is_floating_point():
        raise InputError(
            "a sinogram has to be (…, views, detectors) of floating-point numbers and not empty, "
            f"not {tuple(sinogram.shape)} of {sinogram.dtype}"
        )
    if not sinogram.isfinite().all():
        raise InputError("a sinogram has to be finite, but it holds NaN or infinity")
    if iterations < 0:
        raise InputError(f"the number of iterations has to be at least 0, not {iterations}")
    low, high = box
    if low is not None and high is not None and low > high:
        raise InputError(f"the least value of a pixel cannot be above the greatest, got {low} and {high}")


def _relaxed(relaxation: float) -> None:
    if not 0 < relaxation < 2:
        raise InputError(f"a relaxation has to lie between 0 and 2, not {relaxation}")
