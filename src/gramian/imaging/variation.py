"""Reconstruction with little total variation: its value, its proximal map, and two solvers of one problem.

    min ½ Σ p (A x − y)² + λ TV(x)   over images in a box

λ has the unit of y² over that of x: who scales A and y by c has to scale λ by c². Precisions p are 1 unless
they are given; rays of precision 0 are left out.
"""

import math
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.iterative import (
    FREE,
    Box,
    Callback,
    checked,
    clamped,
    image_like,
    largest_eigenvalue,
)
from gramian.imaging.radon import LinearMap

MARGIN = 1.02
"""The largest eigenvalue as found by a few powers is enlarged by this."""
UNIT: Box = (0.0, 1.0)
GRADIENT = 8.0
"""Bound of the squared norm of the discrete gradient in two dimensions."""


def gradient(image: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch 2 n m"]:
    """Return forward differences down and to the right; 0 behind the last row and column.

    Shapes: (*batch, n, m) -> (*batch, 2, n, m).
    Holds: exactly; squared norm below 8.
    """
    found = image.new_zeros(*image.shape[:-2], 2, *image.shape[-2:])
    found[..., 0, :-1, :] = image.diff(dim=-2)
    found[..., 1, :, :-1] = image.diff(dim=-1)
    return found


def gradient_adjoint(field: Float[Tensor, "*batch 2 n m"]) -> Float[Tensor, "*batch n m"]:
    """Return the adjoint of `gradient`, minus the divergence.

    Shapes: (*batch, 2, n, m) -> (*batch, n, m).
    Holds: exactly, ⟨∇x, q⟩ = ⟨x, ∇ᵀq⟩.
    """
    down, right = field[..., 0, :-1, :], field[..., 1, :, :-1]
    found = field.new_zeros(*field.shape[:-3], *field.shape[-2:])
    found[..., :-1, :] -= down
    found[..., 1:, :] += down
    found[..., :, :-1] -= right
    found[..., :, 1:] += right
    return found


def total_variation(image: Float[Tensor, "*batch n m"], isotropic: bool = True) -> Float[Tensor, "*batch"]:
    """Return the total variation of images.

        isotropic Σ √(d₁² + d₂²), anisotropic Σ |d₁| + |d₂|,  d₁, d₂ the forward differences

    Shapes: (*batch, n, m) -> (*batch).
    Holds: exactly; anisotropic between once and √2 times isotropic.
    Source: Rudin, Osher, Fatemi 1992, doi 10.1016/0167-2789(92)90242-F.
    """
    differences = gradient(image)
    sizes = differences.norm(dim=-3, keepdim=True) if isotropic else differences.abs()
    return sizes.sum((-3, -2, -1))


def denoised(
    image: Float[Tensor, "*batch n m"],
    weight: float,
    iterations: int = 100,
    *,
    isotropic: bool = True,
    box: Box = FREE,
) -> Float[Tensor, "*batch n m"]:
    """Return the proximal map of total variation: the nearest image that varies little.

        argmin_x ½ ‖x − b‖² + w TV(x) over the box = P(b − w ∇ᵀq),  |q| ≤ 1 by fast projected gradients

    Shapes: (*batch, n, m) -> (*batch, n, m).
    Raises: InputError for a negative weight and as `fista_tv`.
    Holds: as iterations → ∞, error of the dual objective O(1/iterations²).
    Source: Beck, Teboulle 2009, doi 10.1109/TIP.2009.2028250.
    """
    checked(image, iterations, box)
    _weighed(weight)
    return _near(
        image, weight, image.new_zeros(*image.shape[:-2], 2, *image.shape[-2:]), iterations, isotropic, box
    )[0]


def fista_tv(
    projector: LinearMap,
    sinogram: Float[Tensor, "*batch views detectors"],
    weight: float,
    iterations: int = 150,
    *,
    inner: int = 10,
    precision: Float[Tensor, "..."] | None = None,
    isotropic: bool = True,
    box: Box = UNIT,
    start: Float[Tensor, "*batch n n"] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Reconstruct with little total variation by accelerated proximal gradients.

        min ½ Σ p (A x − y)² + λ TV(x) over the box
        x ← prox(z − Aᵀ p(A z − y)/L),  z ← x + (t − 1)/t⁺ (x − x⁻),  L = 1.02 λ_max(AᵀA) max p

    The proximal map is solved by `inner` steps from the last one's dual image.

    Shapes: (*batch, views, detectors) -> (*batch, n, n); precision p broadcasts to the sinogram.
    Raises: InputError for a sinogram that is not finite, a precision that is negative or 0 throughout, a
        negative weight or number of iterations, and an empty box.
    Holds: as iterations → ∞, error of the objective O(1/iterations²) with exact proximal maps.
    Source: Beck, Teboulle 2009, doi 10.1137/080716542 and 10.1109/TIP.2009.2028250.
    """
    checked(sinogram, iterations, box)
    _weighed(weight)
    x = _start(projector, sinogram, start)
    trust = _trust(sinogram, precision)
    curvature = MARGIN * largest_eigenvalue(projector, _one(x)) * float(trust.max())
    z, t = x, 1.0
    dual = x.new_zeros(*x.shape[:-2], 2, *x.shape[-2:])
    for step in range(1, iterations + 1):
        descended = z - projector.A_adjoint(trust * (projector.A(z) - sinogram)) / curvature
        before = x
        x, dual = _near(descended, weight / curvature, dual, inner, isotropic, box)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        z = x + (last - 1) / t * (x - before)
        if callback is not None and callback(step, x):
            break
    return x


def pdhg_tv(
    projector: LinearMap,
    sinogram: Float[Tensor, "*batch views detectors"],
    weight: float,
    iterations: int = 400,
    *,
    ratio: float = 10.0,
    precision: Float[Tensor, "..."] | None = None,
    isotropic: bool = True,
    box: Box = UNIT,
    start: Float[Tensor, "*batch n n"] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Reconstruct with little total variation by the primal–dual hybrid gradient method.

        min ½ Σ p (A x − y)² + λ TV(x) over the box,  K = (A/‖A‖, ∇/√8),  τ = c/‖K‖,  σ = 1/(c ‖K‖)
        (r, q) ← prox_σ((r, q) + σ K x̄),  x⁺ = P(x − τ Kᵀ(r, q)),  x̄ = 2 x⁺ − x

    No inner problem is solved. Both halves of K are scaled to norm 1, so `ratio` c alone shares out the steps
    between image and residuals; about 10 is good for images of order 1 and noise of a hundredth.

    Shapes: (*batch, views, detectors) -> (*batch, n, n); precision p broadcasts to the sinogram.
    Raises: InputError for a ratio that is not above 0 and as `fista_tv`.
    Holds: as iterations → ∞, ergodic primal–dual gap O(1/iterations).
    Source: Chambolle, Pock 2011, doi 10.1007/s10851-010-0251-1; Sidky, Jørgensen, Pan 2012,
        doi 10.1088/0031-9155/57/10/3065.
    """
    checked(sinogram, iterations, box)
    _weighed(weight)
    if not 0 < ratio < math.inf:
        raise InputError(f"the ratio of the steps has to be above 0, not {ratio}")
    x = _start(projector, sinogram, start)
    norm, slope = math.sqrt(MARGIN * largest_eigenvalue(projector, _one(x))), 1 / math.sqrt(GRADIENT)
    tau, sigma = ratio / math.sqrt(2), 1 / (ratio * math.sqrt(2))
    bound = weight / norm**2 / slope
    trust = _trust(sinogram, precision)
    shrunk = trust / (trust + sigma)
    r, q = torch.zeros_like(sinogram), x.new_zeros(*x.shape[:-2], 2, *x.shape[-2:])
    data, ahead = sinogram / norm, x
    for step in range(1, iterations + 1):
        r = (r + sigma * (projector.A(ahead) / norm - data)) * shrunk
        q = _bounded(q + (sigma * slope) * gradient(ahead), bound, isotropic)
        descended = projector.A_adjoint(r) / norm + slope * gradient_adjoint(q)
        x, before = clamped(x - tau * descended, box), x
        ahead = 2 * x - before
        if callback is not None and callback(step, x):
            break
    return x


def _near(
    image: Tensor, weight: float, dual: Tensor, iterations: int, isotropic: bool, box: Box
) -> tuple[Tensor, Tensor]:
    """Return the proximal map and its dual field, from a dual field to start with."""
    if weight == 0:
        return clamped(image, box), dual
    ahead, t = dual, 1.0
    for _ in range(iterations):
        x = clamped(image - weight * gradient_adjoint(ahead), box)
        before, dual = dual, _bounded(ahead + gradient(x) / (GRADIENT * weight), 1.0, isotropic)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        ahead = torch.lerp(before, dual, 1 + (last - 1) / t)
    return clamped(image - weight * gradient_adjoint(dual), box), dual


def _bounded(field: Tensor, bound: float, isotropic: bool) -> Tensor:
    """Project on fields of size at most `bound` in every pixel."""
    if not isotropic:
        return field.clamp(-bound, bound)
    size = torch.hypot(field[..., 0, :, :], field[..., 1, :, :])
    if bound == 0:
        return torch.zeros_like(field)
    return field / (size / bound).clamp(min=1)[..., None, :, :]


def _start(projector: LinearMap, sinogram: Tensor, start: Tensor | None) -> Tensor:
    blank = image_like(projector, sinogram)
    if start is not None and start.shape != blank.shape:
        raise InputError(f"a start has to be {tuple(blank.shape)}, not {tuple(start.shape)}")
    return blank if start is None else start.to(blank)


def _one(images: Tensor) -> Tensor:
    return images[(0,) * (images.ndim - 2)]


def _trust(sinogram: Tensor, precision: Tensor | None) -> Tensor:
    """Return the precision of rays, 1 where none is given."""
    if precision is None:
        return sinogram.new_ones(())
    found = precision.to(sinogram)
    with suppress(RuntimeError):
        if found.expand_as(sinogram).min() >= 0 and 0 < found.max() < math.inf:
            return found
    raise InputError(
        f"the precision of rays has to be at least 0, finite, somewhere above 0, and of "
        f"{tuple(sinogram.shape)} or what broadcasts to it; its shape is {tuple(found.shape)}"
    )


def _weighed(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise InputError(f"the weight of total variation has to be finite and at least 0, not {weight}")
