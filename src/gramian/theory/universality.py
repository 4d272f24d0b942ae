"""Which functions a kernel can express: its spectrum on the sphere, and on a finite set of inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.readings import cosine, effective_rank, spectrum
from gramian.errors import InputError
from gramian.theory.maps import Map, Signal

ZonalKernel = Callable[[Tensor], Tensor]
"""A kernel on the sphere as a function of the cosine of its two arguments, elementwise on a vector."""
COLLAPSED = 0.05
"""A kernel with no more than this share of its weight in degrees 1 to K is called collapsed."""
VANISHING = 1e-9
"""A coefficient below this share of the computed weight counts as 0; quadrature leaves about 1e-14."""


def zonal(network: Map, variance: float = 1.0, *, tangent: bool = False) -> ZonalKernel:
    """Return the normalised kernel of a network on inputs of one norm, as a function of their cosine.

        κ(c) = K(x, x') / K(x, x),   |x|² = |x'|² = variance per feature,   ⟨x, x'⟩ = c |x|²

    `tangent` takes the NTK for K. κ(1) = 1.

    Holds: as width → ∞, error O(width^-1/2).
    """

    def kernel(cosines: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        cosines = torch.cat([cosines, cosines.new_ones(1)])
        cross = variance * cosines[None]
        right = torch.full_like(cosines, variance)
        out = network(Signal(Gram(cross, right[:1], right), torch.zeros_like(cross) if tangent else None))
        values = out.activation.cross if out.tangent is None else out.tangent
        return values[0, :-1] / values[0, -1]

    return kernel


def coefficients(
    kernel: ZonalKernel, degree: int, dimension: int = 3, order: int = 512
) -> Float[Tensor, " length"]:
    """Expand a zonal kernel on the sphere S^{d−1} in Gegenbauer polynomials, which are Legendre's for d = 3.

        κ(c) = Σ_k a_k P_k(c),  P_k(1) = 1,   a_k = ∫ κ P_k w dc / ∫ P_k² w dc,  w = (1 − c²)^{(d−3)/2}

    The integrals are taken in the angle, c = cos θ, by a Gauss–Legendre rule of the given order: kernels of
    networks are smooth in θ where they have roots in 1 − c. Σ_k a_k = κ(1) for a continuous kernel. A
    positive definite kernel has a_k ≥ 0, and it is universal exactly when all a_k > 0.

    Shapes: (degree + 1,), float64.
    Raises: InputError unless degree ≥ 0, dimension ≥ 2 and order > degree.
    Holds: exactly up to quadrature; features of κ in θ narrower than about π/order are lost.
    Source: Schoenberg 1942, Duke Math. J. 9; Hayou et al. 2021, arXiv 2010.12859 (universality by spectra).
    """
    if degree < 0 or dimension < 2 or order <= degree:
        raise InputError(
            "coefficients need a degree of at least 0, a dimension of at least 2 and an order above the "
            f"degree, got {degree}, {dimension} and {order}"
        )
    angles, weights = _legendre_rule(order)
    cosines, weights = angles.cos(), weights * angles.sin() ** (dimension - 2)
    values = kernel(cosines)
    polynomials = torch.stack(_gegenbauer(cosines, degree, dimension))
    return polynomials @ (values * weights) / (polynomials.square() @ weights)


@dataclass(frozen=True)
class Verdict:
    """What the coefficients a_0, …, a_K of a zonal kernel say about the functions that it can express.

        1 = κ(1) = constant + varied + nugget,   constant = a_0,   varied = Σ_{1≤k≤K} a_k

    `nugget` sits in the degrees above K; a kernel that only tells equal inputs from different ones has
    nearly all of its weight in constant and nugget. `kind` is "collapsed" when `varied` is next to nothing,
    "not universal" when the coefficients of the degrees `vanishing` are 0, and "universal" as far as K.
    """

    kind: Literal["collapsed", "not universal", "universal"]
    constant: float
    varied: float
    nugget: float
    vanishing: tuple[int, ...]


def verdict(coefficients: Float[Tensor, " length"]) -> Verdict:
    """Judge a normalised zonal kernel, κ(1) = 1, by its coefficients of low degree, from 0 to 6 or so.

    The smallest eigenvalue on a sample would not do: it rises while a kernel turns into a constant plus a
    nugget, as the tangent kernel of an unscaled residual network does.

    Raises: InputError for coefficients that are not finite or have no positive sum.
    Holds: exactly for what is given, with the thresholds `COLLAPSED` and `VANISHING`.
    """
    total = coefficients.sum().item()
    if not (coefficients.isfinite().all() and total > 0):
        raise InputError("the coefficients of a kernel must be finite with a positive sum")
    constant, varied = coefficients[0].item(), coefficients[1:].sum().item()
    vanishing = tuple((coefficients <= VANISHING * total).nonzero().flatten().tolist())
    kind = "not universal" if vanishing else "universal"
    return Verdict("collapsed" if varied <= COLLAPSED else kind, constant, varied, 1 - total, vanishing)


def normalised(kernel: Float[Tensor, "*batch n n"]) -> Gram:
    """Return a kernel matrix with its diagonal scaled to 1, as a Gram.

        κ_ij = K_ij / √(K_ii K_jj)

    Holds: exactly.
    """
    norms = kernel.diagonal(dim1=-2, dim2=-1)
    ones = torch.ones_like(norms)
    return Gram(cosine(Gram(kernel, norms, norms)), ones, ones)


def second_eigenvalue(kernel: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Return the second eigenvalue of the normalised kernel matrix, as a share of their sum n.

        λ_2(κ) / n

    Range [0, 1/2]: 0 when all inputs look the same. It falls to 0 with collapse like 1 − c, whereas the
    smallest eigenvalue of a constant plus a nugget does not.

    Raises: InputError for fewer than two inputs.
    Holds: exactly.
    """
    n = kernel.shape[-1]
    if n < 2:
        raise InputError(f"a second eigenvalue needs at least two inputs, got {n}")
    return spectrum(normalised(kernel))[..., 1] / n


def kernel_rank(kernel: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Return the effective rank of the normalised kernel matrix: 1 for a constant, n for an identity.

    Holds: exactly.
    Source: Roy, Vetterli 2007, EUSIPCO, "The effective rank", Definition 1.
    """
    return effective_rank(normalised(kernel))


def _gegenbauer(c: Tensor, degree: int, dimension: int) -> list[Tensor]:
    """P_0, …, P_degree at c by the three-term recurrence, normalised to 1 at c = 1."""
    values = [torch.ones_like(c), c]
    for k in range(1, degree):
        values.append(((2 * k + dimension - 2) * c * values[-1] - k * values[-2]) / (k + dimension - 2))
    return values[: degree + 1]


@lru_cache(maxsize=8)
def _legendre_rule(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of ∫_0^π f(θ) dθ, from the eigenvectors of the Jacobi matrix."""
    k = torch.arange(1, order, dtype=torch.float64)
    beside = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return (nodes + 1) * (torch.pi / 2), vectors[0].square() * torch.pi
