"""Numbers read off a Gram matrix; each says its range and its value at initialisation.

"At initialisation" means independent Gaussian rows x of width d, unless stated otherwise. A Gram over
inputs is `gram(X)` and one over neurons is `gram(X.mT)`; the same readings serve both.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError


def cosine(gram: Gram) -> Float[Tensor, "*batch n m"]:
    """Cosine of the angle between rows, clipped to what a cosine can be; NaN for a zero row.

    cos_ij = ⟨x_i, y_j⟩ / (|x_i| |y_j|)

    Range [−1, 1]; at initialisation 0 ± 1/√d off the diagonal.

    Holds: exactly.
    """
    norms = gram.left.sqrt()[..., :, None] * gram.right.sqrt()[..., None, :]
    return (gram.cross / norms).clamp(-1, 1)


def distance(gram: Gram) -> Float[Tensor, "*batch n m"]:
    """Euclidean distance between rows.

    dist_ij = √(|x_i|² + |y_j|² − 2⟨x_i, y_j⟩)

    Range [0, ∞); at initialisation √(2d) for rows of unit variance.

    Holds: exactly; nearby rows cancel, with an absolute error of about √(machine epsilon)·|x|.
    """
    squared = gram.left[..., :, None] + gram.right[..., None, :] - 2 * gram.cross
    return squared.clamp(min=0).sqrt()


def path_length(gram: Gram) -> Float[Tensor, "*batch"]:
    """Length of the path through the rows of `gram(x)` in their order.

    Λ = Σ_i |x_{i+1} − x_i|

    Range [0, ∞), at least the distance of the two ends; 0 for one row.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly, with the cancellation of `distance`.
    """
    _square(gram)
    return distance(gram).diagonal(offset=1, dim1=-2, dim2=-1).sum(-1)


def apex_angle(gram: Gram) -> Float[Tensor, "*batch n m"]:
    """Angle in radians under which two rows are seen from the apex, which is the origin of the rows.

    α_ij = arccos cos_ij;  for another apex a pass `gram(x − a)`

    Range [0, π]; at initialisation π/2.

    Holds: exactly; below √(machine epsilon) an angle is lost to rounding.
    """
    return cosine(gram).arccos()


def neuron_kurtosis(gram: Gram) -> Float[Tensor, "*batch"]:
    """Inequality of the squared norms: of neurons for `gram(X.mT)`, where it finds outlier features.

    Kurt = d Σ_j s_j² / (Σ_j s_j)²,  s_j = |x_j|² (the left side)

    Range [1, d]: 1 when all norms are equal, d when a single row is not zero. At initialisation
    1 + 2/n for neurons read on n tokens. There is no Gaussian baseline of 3.

    Shapes: left (*batch, d) -> (*batch).
    Holds: exactly.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279, Eq. 1.
    """
    return gram.left.shape[-1] * gram.left.square().sum(-1) / gram.left.sum(-1).square()


def correlation_mean(gram: Gram) -> Float[Tensor, "*batch"]:
    """Mean off-diagonal inner product in units of the mean squared norm (one scale for all rows).

    mean_{i≠j} ⟨x_i, x_j⟩ / mean_i |x_i|²

    Range [−1/(n−1), 1]: 1 when all rows are one and the same, the rank collapse of tokens. At
    initialisation 0. NaN for a single row.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly.
    Source: He et al. 2024, arXiv 2405.19279 (logged statistics).
    """
    return _off_diagonal_mean(gram.cross, _square(gram)) / gram.left.mean(-1)


def correlation_rms(gram: Gram) -> Float[Tensor, "*batch"]:
    """Root mean square off-diagonal inner product in units of the mean squared norm.

    √(mean_{i≠j} ⟨x_i, x_j⟩²) / mean_i |x_i|²

    Range [0, 1]: 1 when all rows are equal up to sign. At initialisation 1/√d for tokens and 1/√n
    for neurons read on n tokens. NaN for a single row.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly.
    Source: He et al. 2024, arXiv 2405.19279 (logged statistics).
    """
    return _off_diagonal_mean(gram.cross.square(), _square(gram)).sqrt() / gram.left.mean(-1)


def cosine_mean(gram: Gram) -> Float[Tensor, "*batch"]:
    """Mean off-diagonal cosine: every row is normalised by itself, unlike `correlation_mean`.

    mean_{i≠j} cos_ij

    Range [−1/(n−1), 1]; at initialisation 0. NaN for a single row or where a row is zero.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly.
    """
    return _off_diagonal_mean(cosine(gram), _square(gram))


def cosine_rms(gram: Gram) -> Float[Tensor, "*batch"]:
    """Root mean square off-diagonal cosine: every row is normalised by itself, unlike `correlation_rms`.

    √(mean_{i≠j} cos²_ij)

    Range [0, 1]; at initialisation 1/√d. NaN for a single row or where a row is zero.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly.
    """
    return _off_diagonal_mean(cosine(gram).square(), _square(gram)).sqrt()


def spectrum(gram: Gram) -> Float[Tensor, "*batch n"]:
    """Eigenvalues of the Gram matrix, largest first; NaN where the matrix holds a number that is not finite.

    λ_1 ≥ … ≥ λ_n,  cross = U diag(λ) Uᵀ

    Range [0, ∞) up to rounding, with sum Σ_i |x_i|². At initialisation Marchenko–Pastur of ratio n/d.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly.
    """
    _square(gram)
    finite = gram.cross.isfinite().all(-1).all(-1)[..., None]
    values = torch.linalg.eigvalsh(torch.where(finite[..., None], gram.cross, 0)).flip(-1)
    return torch.where(finite, values, torch.nan)


def effective_rank(gram: Gram) -> Float[Tensor, "*batch"]:
    """Count the directions that the rows use, by the entropy of the Gram's normalised eigenvalues.

    exp(−Σ_i p_i log p_i),  p = λ / Σλ

    Range [1, n]: 1 when all rows are parallel, n when they are orthogonal with equal norms. At
    initialisation close to n while n ≪ d. The original takes singular values of X where this takes
    their squares.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly.
    Source: Roy, Vetterli 2007, EUSIPCO, "The effective rank", Definition 1.
    """
    values = spectrum(gram).clamp(min=0)
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def participation_ratio(gram: Gram) -> Float[Tensor, "*batch"]:
    """Count the directions that the rows use, by second moments: no eigenvalues are needed.

    (Σ_i λ_i)² / Σ_i λ_i² = (Σ_i |x_i|²)² / ‖cross‖²_F

    Range [1, n], at most the effective rank. At initialisation n / (1 + n/d), nearly.

    Raises: InputError unless both sides are the same rows.
    Holds: exactly.
    """
    _square(gram)
    return gram.left.sum(-1).square() / gram.cross.square().sum((-2, -1))


def _square(gram: Gram) -> int:
    n, m = gram.cross.shape[-2:]
    if n != m:
        raise InputError(f"this reading needs the Gram of one set of rows, not of {n} rows against {m}")
    return n


def _off_diagonal_mean(square: Tensor, n: int) -> Tensor:
    diagonal = torch.diag_embed(square.diagonal(dim1=-2, dim2=-1))
    return (square - diagonal).sum((-2, -1)) / (n * (n - 1))
