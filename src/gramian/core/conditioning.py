"""Gaussian conditioning from Gram matrices: posterior, log evidence, and the KL from posterior to prior.

The model everywhere: f ~ N(0, K), y = f + ε, ε ~ N(0, σ²I). Computed in float64 through one Cholesky factor
of C = K + (σ² + jitter · mean K_ii) I; the jitter is 0 unless it is given.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError

Number = float | Tensor


def condition(
    train: Float[Tensor, "n n"],
    cross: Float[Tensor, "m n"],
    test: Float[Tensor, " m"] | Float[Tensor, "m m"],
    targets: Float[Tensor, "n ..."],
    noise_variance: Number,
    jitter: float = 0.0,
) -> tuple[Float[Tensor, "m ..."], Float[Tensor, " m"] | Float[Tensor, "m m"]]:
    """Give mean and variance of the latent f at test points; the covariance when `test` is a matrix.

    mean = K_* C⁻¹ y,  covariance = K_** − K_* C⁻¹ K_*ᵀ

    The noise is not in the variance: add it for the variance of new targets. A variance below 0 by
    rounding is given as 0.

    Shapes: train (n, n), cross (m, n), test (m) or (m, m), targets (n) or (n, k) -> mean (m) or (m, k).
    Raises: InputError for NaN, a negative noise or jitter, and a train matrix that is asymmetric or with
    its noise not positive definite.
    Holds: exactly, to rounding times the condition number of C.
    Source: Rasmussen, Williams 2006, "Gaussian processes for machine learning", Eq. 2.25–2.26.
    """
    factor, targets = _factor(train, targets, noise_variance, jitter)
    cross, test = _finite("the cross kernel", cross), _finite("the test kernel", test)
    half = torch.linalg.solve_triangular(factor, cross.mT, upper=False)
    mean = half.mT @ torch.linalg.solve_triangular(factor, _columns(targets), upper=False)
    explained = half.square().sum(0) if test.ndim == 1 else half.mT @ half
    spread = (test - explained).clamp(min=0) if test.ndim == 1 else test - explained
    return mean.view(len(test), *targets.shape[1:]), spread


def log_evidence(
    train: Float[Tensor, "n n"], targets: Float[Tensor, "n ..."], noise_variance: Number, jitter: float = 0.0
) -> Float[Tensor, "..."]:
    """Give the log density of the targets under the model; one number for each column of targets.

    log p(y) = −½ yᵀC⁻¹y − ½ ln det C − (n/2) ln 2π

    Shapes: train (n, n), targets (n) or (n, k) -> () or (k).
    Raises: InputError as `condition`.
    Holds: exactly.
    Source: Rasmussen, Williams 2006, Eq. 2.30.
    """
    factor, targets = _factor(train, targets, noise_variance, jitter)
    half = torch.linalg.solve_triangular(factor, _columns(targets), upper=False)
    fit = half.square().sum(0).view(targets.shape[1:])
    return -0.5 * fit - factor.diagonal().log().sum() - 0.5 * len(targets) * math.log(2 * math.pi)


def information_gain(
    train: Float[Tensor, "n n"], targets: Float[Tensor, "n ..."], noise_variance: Number, jitter: float = 0.0
) -> Float[Tensor, "..."]:
    """Give KL(posterior ‖ prior) of the latent f at the training points; a number for each column.

    KL = ½ [ln det(I + K/σ²) − tr K C⁻¹ + yᵀC⁻¹ K C⁻¹y],  σ² with the jitter in it

    Shapes: train (n, n), targets (n) or (n, k) -> () or (k).
    Raises: InputError as `condition`, and without noise, where it is infinite.
    Holds: exactly.
    Source: the KL of two Gaussians, Rasmussen, Williams 2006, Eq. A.23.
    """
    factor, targets = _factor(train, targets, noise_variance, jitter)
    noise = _diagonal(train.double(), noise_variance, jitter)
    if float(noise.detach()) == 0:
        raise InputError("without noise the posterior is infinitely far from the prior; give noise above 0")
    inverse_trace = torch.linalg.solve_triangular(factor, torch.eye(len(train)).to(factor), upper=False)
    shrunk = noise * inverse_trace.square().sum()  # tr σ²C⁻¹ = n − tr K C⁻¹
    weights = torch.cholesky_solve(_columns(targets), factor)
    fit = (weights * (_columns(targets) - noise * weights)).sum(0).view(targets.shape[1:])
    volume = 2 * factor.diagonal().log().sum() - len(train) * noise.log()
    return 0.5 * (volume - len(train) + shrunk + fit)


def _factor(train: Tensor, targets: Tensor, noise_variance: Number, jitter: float) -> tuple[Tensor, Tensor]:
    """Give the Cholesky factor of C and the targets in float64."""
    train, targets = _finite("the train kernel", train), _finite("the targets", targets)
    asymmetry = (train - train.mT).abs().max() if len(train) else 0.0
    if asymmetry > 1e-6 * train.abs().max():
        raise InputError(f"the train kernel has to be symmetric, but its halves differ by {asymmetry:.3g}")
    noise = _diagonal(train, noise_variance, jitter)
    matrix = train + noise * torch.eye(len(train)).to(train)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        smallest = float(torch.linalg.eigvalsh(matrix.detach())[0])
        raise InputError(
            f"the train kernel with its noise has to be positive definite, but its smallest eigenvalue is "
            f"{smallest:.3g}; raise the noise or the jitter"
        )
    return factor, targets


def _diagonal(train: Tensor, noise_variance: Number, jitter: float) -> Tensor:
    noise = torch.as_tensor(noise_variance, dtype=torch.float64, device=train.device)
    for name, value in (("noise variance", float(noise.detach())), ("jitter", jitter)):
        if not 0 <= value < math.inf:
            raise InputError(f"the {name} has to be a finite number of at least 0, not {value}")
    return noise + jitter * train.diagonal().mean()


def _finite(name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise InputError(f"{name} has to be finite, but holds NaN or infinity")
    return values.double()


def _columns(targets: Tensor) -> Tensor:
    return targets if targets.ndim == 2 else targets[:, None]
