"""What ensembles of infinite width predict once they are trained, in closed form from two kernels.

A network of infinite width is linear in its parameters, f(x, θ) = f₀(x) + J(x)(θ − θ₀), with the kernels
K = Cov f₀ (NNGP) and Θ = J Λ Jᵀ (NTK). Trained to the end with the noise σ² as regularisation, a member that
starts from the random function g, as it is at its anchor, predicts

    f = g_* + A(y + ε − g_X),  A = Θ_*X C⁻¹,  C = Θ_XX + (σ² + jitter · mean Θ_ii) I

so that over members mean f = A y and

    Cov f = S_** − A S_X* − S_*X Aᵀ + A (S_XX + τ²I) Aᵀ,  S = Cov g,  τ² = Var ε

A method is a choice of S, σ² and τ²; f is a draw from the posterior of the Gaussian process N(0, Θ) where
S = Θ and τ² = σ². The noise of new targets is in no variance here but in the `noise` of a `Predictive`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.conditioning import condition
from gramian.core.predictive import Predictive
from gramian.errors import InputError

JITTER = 1e-10
"""Share of the kernel's mean variance that is added to σ² in every solve, so that duplicate rows have one."""

ROUNDING = 1e-8
"""How far below 0 an eigenvalue of a covariance may be, as a share of its mean variance."""

Law = tuple[Float[Tensor, "m ..."], Float[Tensor, "m ..."]]
"""Mean at the test inputs, and the variances or the covariance there."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel at the training inputs X and the test inputs *: K_XX, K_*X, and K_** or its diagonal.

    Kernels are added and scaled: those of sums of independent functions.

    Shapes: train (n, n), cross (m, n), test (m) or (m, m).
    Raises: InputError for shapes that do not fit and numbers that are not finite.
    """

    train: Float[Tensor, "..."]
    cross: Float[Tensor, "..."]
    test: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        n, m = len(self.train), len(self.test)
        fits = self.train.shape == (n, n) and self.cross.shape == (m, n) and self.test.shape in ((m,), (m, m))
        if not fits:
            raise InputError(
                "a kernel has to be (n, n), (m, n) and (m) or (m, m), not "
                f"{tuple(self.train.shape)}, {tuple(self.cross.shape)} and {tuple(self.test.shape)}"
            )
        for name in ("train", "cross", "test"):
            if not getattr(self, name).isfinite().all():
                raise InputError(f"the {name} kernel has to be finite, but holds NaN or infinity")

    @classmethod
    def of(cls, joint: Float[Tensor, "all all"], train: int) -> "Kernel":
        """Cut a kernel of all inputs, the first `train` of which are the training inputs.

        Shapes: joint (n + m, n + m) -> (n, n), (m, n), (m, m).
        Raises: InputError for more training inputs than there are, and as the class.
        Holds: exactly.
        """
        if not 0 <= train <= len(joint):
            raise InputError(f"{train} training inputs of {len(joint)} are not possible")
        return cls(joint[:train, :train], joint[train:, :train], joint[train:, train:])

    def __add__(self, other: "Kernel") -> "Kernel":
        self.check_like(other)
        return Kernel(self.train + other.train, self.cross + other.cross, self.test + other.test)

    def __sub__(self, other: "Kernel") -> "Kernel":
        return self + (-1.0) * other

    def __rmul__(self, factor: float) -> "Kernel":
        return Kernel(factor * self.train, factor * self.cross, factor * self.test)

    def check_like(self, other: "Kernel") -> None:
        """Refuse a kernel of other inputs.

        Raises: InputError unless all shapes are equal.
        """
        for name in ("train", "cross", "test"):
            mine, theirs = tuple(getattr(self, name).shape), tuple(getattr(other, name).shape)
            if mine != theirs:
                raise InputError(
                    f"two kernels have to be of one shape, but in {name} they are {mine}, {theirs}"
                )


def trained(
    ntk: Kernel,
    start: Kernel,
    targets: Float[Tensor, "n ..."],
    noise_variance: float,
    target_noise: float,
    jitter: float = JITTER,
) -> Law:
    """Give mean and covariance over members that are trained by `ntk` from functions of covariance `start`.

        mean = A y,  Cov = S_** − A S_X* − S_*X Aᵀ + A (S_XX + τ²I) Aᵀ,  A = Θ_*X C⁻¹

    `noise_variance` σ² is the regularisation, 0 for none; `target_noise` τ² the variance of the noise that
    every member adds to its targets, 0 where all share them. Computed in float64; a variance below 0 by
    rounding is given as 0.

    Shapes: targets (n) or (n, k) -> (m) or (m, k), and (m) or (m, m) as the kernels' test part.
    Raises: InputError as `condition`, for an indefinite start, a negative noise, and shapes that do not fit.
    Holds: exactly for linear members trained to the end; as width → ∞, error O(width^-1/2) for networks.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864; Lee et al. 2019, arXiv 1902.06720.
    """
    ntk.check_like(start)
    _check(ntk, targets, target_noise)
    _check_definite(start.train)
    mean, pull = _solved(ntk, targets, noise_variance, jitter)
    train = start.train.double() + target_noise * torch.eye(len(targets)).to(mean)
    cross, test = start.cross.double(), start.test.double()
    if test.ndim == 1:
        spread = test - 2 * (pull * cross).sum(1) + ((pull @ train) * pull).sum(1)
        return mean, spread.clamp(min=0)
    once = pull @ cross.mT
    return mean, _symmetric(test - once - once.mT + pull @ train @ pull.mT)


def nngp_posterior(
    nngp: Kernel, ntk: Kernel, targets: Float[Tensor, "n ..."], noise_variance: float, jitter: float = JITTER
) -> Law:
    """Give the posterior of the NNGP: a Bayesian network, or one whose last layer alone is trained.

        mean = K_*X (K_XX + σ²I)⁻¹ y,  Cov = K_** − K_*X (K_XX + σ²I)⁻¹ K_X*

    Shapes: targets (n) or (n, k) -> (m) or (m, k), and (m) or (m, m).
    Raises: InputError as `condition`, and for shapes that do not fit.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Lee et al. 2018, arXiv 1711.00165.
    """
    return _posterior(nngp, targets, noise_variance, jitter)


def ntkgp(
    nngp: Kernel, ntk: Kernel, targets: Float[Tensor, "n ..."], noise_variance: float, jitter: float = JITTER
) -> Law:
    """Give the posterior of the NTKGP: NTKGP-param, NTKGP-Lin and the exact NTKGP-fn.

        S = Θ, τ² = σ²:  mean = A y,  Cov = Θ_** − A Θ_X*

    For NTKGP-Lin Θ is that of the member's own linearisation, at any width. The exact NTKGP-fn takes
    δ = J θ̃ + J^{≤L} θ₀^{≤L}, which undoes the start that its anchor 0 would leave in.

    Shapes: targets (n) or (n, k) -> (m) or (m, k), and (m) or (m, m).
    Raises: InputError as `condition`, and for shapes that do not fit.
    Holds: as width → ∞, error O(width^-1/2); NTKGP-Lin exactly.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864.
    """
    return _posterior(ntk, targets, noise_variance, jitter)


def randomised_prior(
    nngp: Kernel, ntk: Kernel, targets: Float[Tensor, "n ..."], noise_variance: float, jitter: float = JITTER
) -> Law:
    """Give the law of regularised members with noisy targets: RP-param and the exact RP-fn.

        S = K, τ² = σ²:  mean = A y,  Cov = K_** − A K_X* − K_*X Aᵀ + A (K_XX + σ²I) Aᵀ

    The exact RP-fn takes δ = f(·, θ̃) + J^{≤L} θ₀^{≤L}.

    Shapes: targets (n) or (n, k) -> (m) or (m, k), and (m) or (m, m).
    Raises: InputError as `trained`.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Osband, Aslanides, Cassirer 2018, arXiv 1806.03335; He et al. 2020, arXiv 2007.05864.
    """
    return trained(ntk, nngp, targets, noise_variance, noise_variance, jitter)


def deep_ensemble(
    nngp: Kernel, ntk: Kernel, targets: Float[Tensor, "n ..."], noise_variance: float, jitter: float = JITTER
) -> Law:
    """Give the law of members that interpolate the targets from their start, without regularisation.

        S = K, σ² = τ² = 0:  mean = A₀ y,  Cov = K_** − A₀ K_X* − K_*X A₀ᵀ + A₀ K_XX A₀ᵀ

    The noise has no part in it. Where Θ_XX is nearly singular, as of smooth activations, the numbers depend
    on the jitter.

    Shapes: targets (n) or (n, k) -> (m) or (m, k), and (m) or (m, m).
    Raises: InputError as `trained`.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Lee et al. 2019, arXiv 1902.06720; He et al. 2020, arXiv 2007.05864.
    """
    _check(ntk, targets, noise_variance)
    return trained(ntk, nngp, targets, 0.0, 0.0, jitter)


def rp_fn(
    nngp: Kernel, ntk: Kernel, targets: Float[Tensor, "n ..."], noise_variance: float, jitter: float = JITTER
) -> Law:
    """Give the law of RP-fn as published, δ = f(·, θ̃), where no data pull on a member: it keeps its start.

        S = 2K, τ² = σ²

    Its anchor is 0 and not its start, but directions that no data touch lose the start only at the rate of
    σ²/n. Trained beyond that it has S = K + V, V = Cov J^{≤L} θ₀^{≤L}: give `trained` that.

    Shapes: targets (n) or (n, k) -> (m) or (m, k), and (m) or (m, m).
    Raises: InputError as `trained`.
    Holds: as width → ∞, error O(width^-1/2), as σ² → 0 under training times below n/σ².
    Source: Osband, Aslanides, Cassirer 2018, arXiv 1806.03335; He et al. 2020, arXiv 2007.05864.
    """
    return trained(ntk, 2.0 * nngp, targets, noise_variance, noise_variance, jitter)


def ntkgp_fn(
    nngp: Kernel, ntk: Kernel, targets: Float[Tensor, "n ..."], noise_variance: float, jitter: float = JITTER
) -> Law:
    """Give the law of NTKGP-fn as published, δ = J (√2 θ̃^{≤L}, θ̃^{L+1}): wider than the NTKGP.

        S = 2Θ, τ² = σ²

    As `rp_fn` it keeps its start. Trained beyond that it has S = 2(Θ − K) + K + V, V = Cov J^{≤L} θ₀^{≤L}
    (L²K for ReLU without biases): give `trained` that.

    Shapes: targets (n) or (n, k) -> (m) or (m, k), and (m) or (m, m).
    Raises: InputError as `trained`.
    Holds: as width → ∞, error O(width^-1/2), as σ² → 0 under training times below n/σ².
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864.
    """
    return trained(ntk, 2.0 * ntk, targets, noise_variance, noise_variance, jitter)


METHODS: dict[str, Callable[..., Law]] = {
    "nngp": nngp_posterior,
    "deep_ensemble": deep_ensemble,
    "rp_param": randomised_prior,
    "rp_fn": rp_fn,
    "rp_fn_exact": randomised_prior,
    "ntkgp_param": ntkgp,
    "ntkgp_fn": ntkgp_fn,
    "ntkgp_fn_exact": ntkgp,
    "ntkgp_lin": ntkgp,
}
"""Every method, each a function of (nngp, ntk, targets, noise_variance, jitter)."""


def predictive(
    method: str,
    nngp: Kernel,
    ntk: Kernel,
    targets: Float[Tensor, "n ..."],
    noise_variance: float,
    jitter: float = JITTER,
) -> Predictive:
    """Give what an infinite ensemble of a method predicts at the test inputs, with the noise of new targets.

    Shapes: targets (n) or (n, k) -> (m) or (m, k).
    Raises: InputError for an unknown method, and as the method.
    Holds: as the method.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; it has to be one of {', '.join(METHODS)}")
    mean, spread = METHODS[method](nngp, ntk, targets, noise_variance, jitter)
    variance = spread if spread.ndim == 1 else spread.diagonal().clamp(min=0)
    return Predictive.gaussian(mean, variance if mean.ndim == 1 else variance[:, None], noise_variance)


def draw(
    mean: Float[Tensor, "m ..."], covariance: Float[Tensor, "..."], count: int, generator: torch.Generator
) -> Float[Tensor, "count m ..."]:
    """Draw functions from a Gaussian law; every column of the mean is drawn on its own.

        f = mean + U √λ ε,  covariance = U diag(λ) Uᵀ,  ε ~ N(0, I)

    Eigenvalues below 0, as rounding makes them, count as 0.

    Shapes: mean (m) or (m, k), covariance (m, m) -> (count, m) or (count, m, k).
    Raises: InputError for a covariance that does not fit the mean or is not finite.
    Holds: exactly.
    """
    if covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"the covariance has to be ({len(mean)}, {len(mean)}), not {tuple(covariance.shape)}"
        )
    if not covariance.isfinite().all():
        raise InputError("the covariance has to be finite, but holds NaN or infinity")
    values, vectors = torch.linalg.eigh(_symmetric(covariance.double()))
    root = (vectors * values.clamp(min=0).sqrt()).to(mean)
    shape = (count, *mean.view(len(mean), -1).shape) if len(mean) else (count, 0, 1)
    place = generator.device
    epsilon = torch.randn(shape, generator=generator, device=place, dtype=mean.dtype).to(mean.device)
    return mean + (root @ epsilon).view(count, *mean.shape)


def _posterior(kernel: Kernel, targets: Tensor, noise_variance: float, jitter: float) -> Law:
    _check(kernel, targets, noise_variance)
    return condition(kernel.train, kernel.cross, kernel.test, targets, noise_variance, jitter)


def _solved(ntk: Kernel, targets: Tensor, noise_variance: float, jitter: float) -> tuple[Tensor, Tensor]:
    """Give A y and A, which is the mean for unit targets, by one solve."""
    n = len(targets)
    columns = targets.double()[:, None] if targets.ndim == 1 else targets.double()
    both = torch.cat((columns, torch.eye(n).to(columns)), 1)
    means, _ = condition(ntk.train, ntk.cross, ntk.test, both, noise_variance, jitter)
    mean, pull = means.split((columns.shape[1], n), 1)
    return mean.reshape(len(mean), *targets.shape[1:]), pull


def _check(kernel: Kernel, targets: Tensor, noise_variance: float) -> None:
    if len(kernel.train) == 0:
        raise InputError("a posterior needs at least 1 training row; without any it is the prior")
    if targets.ndim not in (1, 2) or len(targets) != len(kernel.train):
        raise InputError(
            f"targets have to be (n) or (n, k) for the {len(kernel.train)} training rows of the kernel, "
            f"not {tuple(targets.shape)}"
        )
    if not 0 <= noise_variance < float("inf"):
        raise InputError(f"the noise variance has to be a finite number of at least 0, not {noise_variance}")


def _check_definite(matrix: Tensor) -> None:
    """Refuse a covariance that no function has."""
    n, rounding = len(matrix), torch.finfo(matrix.dtype).eps
    matrix = _symmetric(matrix.double())
    slack = max(ROUNDING, 8 * n * rounding) * matrix.diagonal().abs().sum() / max(n, 1)
    floor = slack + torch.finfo(matrix.dtype).tiny
    _, failed = torch.linalg.cholesky_ex(matrix + floor * torch.eye(n).to(matrix))
    if failed:
        smallest = float(torch.linalg.eigvalsh(matrix)[0])
        raise InputError(
            f"a covariance has to be positive semidefinite, but its smallest eigenvalue is {smallest:.3g}"
        )


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
