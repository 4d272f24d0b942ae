"""The exact posterior of a linear model with Gaussian prior and noise: an oracle for every other method.

    y = A x + ε,  ε ~ N(0, diag σ²),  x ~ N(m, S)

All is solved in whitened unknowns z, x = m + L z with L Lᵀ = S, where B = diag(1/σ) A L and the precision of
z is I + BᵀB. The forms without a matrix never make B.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.conditioning import condition, log_evidence
from gramian.core.predictive import Predictive
from gramian.errors import InputError

Number = float | Tensor
Map = Callable[[Tensor], Tensor]
"""A linear map of a batch: (k, …) -> (k, …)."""


@dataclass(frozen=True, eq=False)
class GaussianPosterior:
    """The Gaussian N(mean, covariance) of the unknowns given the data, in float64."""

    mean: Float[Tensor, " n"]
    covariance: Float[Tensor, "n n"]
    log_evidence: float
    """ln p(y), with all its constants."""

    @property
    def variance(self) -> Float[Tensor, " n"]:
        """Marginal variance of every unknown."""
        return self.covariance.diagonal().clamp(min=0)

    @property
    def mean_field_variance(self) -> Float[Tensor, " n"]:
        """Variance of the independent Gaussians that are closest to it in KL(q ‖ p): 1/diag(covariance⁻¹)."""
        return 1 / torch.linalg.inv(self.covariance).diagonal()

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "count n"]:
        """Draw unknowns.

        Raises: InputError for a negative count.
        Holds: exactly.
        """
        if count < 0:
            raise InputError(f"the number of draws has to be at least 0, not {count}")
        values, vectors = torch.linalg.eigh(self.covariance)  # unlike Cholesky's, it stands a variance of 0
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + noise.to(values) * values.clamp(min=0).sqrt() @ vectors.mT

    def predict(self, matrix: Float[Tensor, "m n"] | None = None, noise: Number | None = None) -> Predictive:
        """Return the law of every unknown, or of every row of matrix · unknowns, its noise apart.

        Shapes: -> (n), or (m).
        Holds: exactly.
        """
        if matrix is None:
            return Predictive.gaussian(self.mean, self.variance, noise)
        rows = matrix.double()
        variance = ((rows @ self.covariance) * rows).sum(-1).clamp(min=0)
        return Predictive.gaussian(rows @ self.mean, variance, noise)


def exact_posterior(
    matrix: Float[Tensor, "m n"],
    targets: Float[Tensor, " m"],
    noise_variance: Number,
    prior_covariance: Number,
    prior_mean: Number = 0.0,
) -> GaussianPosterior:
    """Return the posterior of the unknowns from a dense matrix, for up to some thousand unknowns.

        covariance = (S⁻¹ + Aᵀ diag(1/σ²) A)⁻¹,   mean = m + covariance Aᵀ diag(1/σ²) (y − A m)

    With fewer data than unknowns by conditioning on the data, otherwise through the precision.

    Shapes: matrix (m, n), targets (m), noise_variance () or (m), prior_covariance (), variances (n) or
        (n, n), prior_mean () or (n).
    Raises: InputError for shapes that do not fit, numbers that are not finite, noise not above 0, and a prior
        covariance that is not positive definite.
    Holds: exactly, to rounding times the condition of I + BᵀB.
    Source: Rasmussen, Williams 2006, Eq. 2.7–2.8 and 2.25–2.30.
    """
    if matrix.ndim != 2 or targets.shape != matrix.shape[:1] or not matrix.numel():
        raise InputError(
            f"a matrix (data, unknowns) and one target a row are needed, got {tuple(matrix.shape)} and "
            f"{tuple(targets.shape)}"
        )
    matrix, targets = _finite("the matrix", matrix), _finite("the targets", targets)
    data, unknowns = matrix.shape
    noise_std = _variances("the noise variance", noise_variance, targets).sqrt()
    centre = _spread("the prior mean", prior_mean, targets.new_empty(unknowns))
    root = _root(prior_covariance, centre)
    whitened = (matrix @ root) / noise_std[:, None]
    residual = (targets - matrix @ centre) / noise_std
    solve = _from_data if data < unknowns else _from_precision
    mean, covariance, evidence = solve(whitened, residual)
    covariance = root @ covariance @ root.mT
    return GaussianPosterior(
        centre + root @ mean, (covariance + covariance.mT) / 2, evidence - float(noise_std.log().sum())
    )


def _from_data(matrix: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, float]:
    kernel = matrix @ matrix.mT
    kernel = (kernel + kernel.mT) / 2
    unit = torch.eye(matrix.shape[1]).to(matrix)
    mean, covariance = condition(kernel, matrix.mT, unit, residual, 1.0)
    return mean, covariance, float(log_evidence(kernel, residual, 1.0))


def _from_precision(matrix: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, float]:
    factor = torch.linalg.cholesky(matrix.mT @ matrix + torch.eye(matrix.shape[1]).to(matrix))
    covariance = torch.cholesky_inverse(factor)
    mean = torch.cholesky_solve((matrix.mT @ residual)[:, None], factor)[:, 0]
    fit = residual.square().sum() - residual @ (matrix @ mean)
    volume = 2 * factor.diagonal().log().sum() + len(residual) * math.log(2 * math.pi)
    return mean, covariance, float(-0.5 * (fit + volume))


def sampled_posterior(
    forward: Map,
    adjoint: Map,
    targets: Float[Tensor, "*data"],
    noise_variance: Number,
    prior_variance: Number,
    prior_mean: Float[Tensor, "*size"],
    *,
    draws: int,
    generator: torch.Generator,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> Predictive:
    """Return the posterior of unknowns behind any linear map, by perturbing the data and solving again.

        x_k = argmin_x |y + σ ε_k − A x|²_{1/σ²} + |x − m − √S ζ_k|²_{1/S},  ε_k, ζ_k ~ N(0, I)

    Every x_k is an exact draw; the mean is the solution without ε and ζ, and the variance that of the draws
    around it. All are solved for together by conjugate gradients. The prior is diagonal.

    Shapes: targets (*data), noise_variance () or (*data), prior_mean (*size), prior_variance () or (*size)
        -> (*size); forward (k, *size) -> (k, *data), adjoint back.
    Raises: InputError for fewer than 2 draws, variances not above 0, shapes that do not fit, maps that are
        not each other's adjoints, and conjugate gradients that do not converge.
    Holds: the mean to the tolerance; the variance as draws → ∞, relative error √(2/draws).
    Source: Papandreou, Yuille 2010; Orieux, Féron, Giovannelli 2012, arXiv 1110.3194.
    """
    if draws < 2:
        raise InputError(f"a variance needs at least 2 draws, got {draws}")
    _finite("the targets", targets)
    _finite("the prior mean", prior_mean)
    noise_std = _variances("the noise variance", noise_variance, targets).to(targets).sqrt()
    prior_std = _variances("the prior variance", prior_variance, prior_mean).to(prior_mean).sqrt()
    found = forward(prior_mean[None])
    if found.shape[1:] != targets.shape or adjoint(targets[None]).shape[1:] != prior_mean.shape:
        raise InputError(
            f"the maps have to take {tuple(prior_mean.shape)} to {tuple(targets.shape)} and back, but the "
            f"forward one gives {tuple(found.shape[1:])}"
        )

    def half(z: Tensor) -> Tensor:
        return forward(z * prior_std) / noise_std

    def back(y: Tensor) -> Tensor:
        return adjoint(y / noise_std) * prior_std

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(draws, *like.shape, generator=generator, dtype=like.dtype).to(like.device)
        return torch.cat((torch.zeros_like(drawn[:1]), drawn))

    residual = (targets - found[0]) / noise_std
    right = back(residual + noise(targets)) + noise(prior_mean)
    z = conjugate_gradients(lambda v: v + back(half(v)), right, tolerance, iterations)
    solved = prior_mean + prior_std * z
    mean, samples = solved[0], solved[1:]
    return Predictive(mean, (samples - mean).square().mean(0), None, samples)


def conjugate_gradients(
    operator: Map, right: Float[Tensor, " k *size"], tolerance: float = 1e-6, iterations: int = 1000
) -> Float[Tensor, " k *size"]:
    """Solve operator(x) = right for every right-hand side at once, the operator being positive definite.

        ‖operator(x) − right‖ ≤ tolerance ‖right‖,  of each

    Shapes: (k, …) -> (k, …).
    Raises: InputError for an operator that is not positive definite, or no convergence.
    Holds: exactly, to the tolerance.
    Source: Hestenes, Stiefel 1952.
    """
    x, residual = torch.zeros_like(right), right.clone()
    direction, norms = residual, _dot(residual, residual)
    goal = norms * tolerance**2
    for _ in range(iterations):
        if bool((norms <= goal).all()):
            return x
        image = operator(direction)
        curvature = _dot(direction, image)
        if not bool((curvature[norms > goal] > 0).all()):
            raise InputError("the operator has to be positive definite; are its maps each other's adjoints?")
        step = torch.where(norms > goal, norms / curvature, 0)
        x = x + _over(step, right) * direction
        residual = residual - _over(step, right) * image
        after = _dot(residual, residual)
        ratio = torch.where(norms > goal, after / norms, 0)
        direction = residual + _over(ratio, right) * direction
        norms = after
    worst = float((norms / goal.clamp(min=torch.finfo(goal.dtype).tiny)).max().sqrt()) * tolerance
    raise InputError(
        f"conjugate gradients are at a relative residual of {worst:.3g} after {iterations} iterations; allow "
        f"more, or a larger tolerance than {tolerance:.3g}"
    )


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, " k"]:
    return (a * b).flatten(1).sum(1)


def _over(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *(1,) * (like.ndim - 1))


def _root(covariance: Number, like: Tensor) -> Float[Tensor, "n n"]:
    """Give L with L Lᵀ = S."""
    if isinstance(covariance, Tensor) and covariance.ndim == 2:
        matrix = _finite("the prior covariance", covariance)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if matrix.shape != (len(like), len(like)) or failed or not torch.allclose(matrix, matrix.mT):
            raise InputError(
                f"the prior covariance has to be symmetric and positive definite, {len(like)} × {len(like)}"
            )
        return factor
    return _variances("the prior covariance", covariance, like).sqrt().diag()


def _variances(name: str, value: Number, like: Tensor) -> Tensor:
    spread = _spread(name, value, like)
    if not (spread > 0).all():
        raise InputError(f"{name} has to be above 0")
    return spread


def _spread(name: str, value: Number, like: Tensor) -> Tensor:
    found = _finite(name, torch.as_tensor(value, dtype=torch.float64, device=like.device))
    if found.shape not in ((), like.shape):
        raise InputError(f"{name} has to be one number or {tuple(like.shape)}, not {tuple(found.shape)}")
    return found.expand(like.shape)


def _finite(name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise InputError(f"{name} has to be finite, but holds NaN or infinity")
    return values.double()
