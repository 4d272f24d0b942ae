"""Subspaces that the path of an optimiser uses: components and distances to spans, of a Gram `steps`.

`trajectory` says what `steps` is. Few components are no evidence of structure: a random walk in any number
of dimensions has a participation ratio of 5/2.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.readings import spectrum
from gramian.core.trajectory import centred, checkpoint, combined, seen_from, sums
from gramian.errors import InputError

TOLERANCE = 1e-12
"""Directions whose share of the largest eigenvalue of unit rows is smaller are not in a span."""


def explained_variance(steps: Gram) -> Float[Tensor, "*batch n"]:
    """Shares of the principal components in the variance of the points, largest first.

    λ_k / Σ_j λ_j,  λ the spectrum of `centred`

    Range [0, 1], sum 1; 1, 0, … for a line, ½, ½, 0, … for a circle and 6/(π²k²) for a random walk as
    T, p → ∞, .608, .152, .068; NaN for a path that does not move.

    Shapes: steps (*batch, n, n) -> (*batch, n); the last share is 0, as n points have n − 1 directions.
    Holds: exactly.
    """
    values = spectrum(centred(steps)).clamp(min=0)
    return values / values.sum(-1, keepdim=True)


def principal_scores(steps: Gram, count: int = 2) -> Float[Tensor, "*batch n k"]:
    """Coordinates of the checkpoints in their principal components, the component of most variance first.

    s_ik = u_ik √λ_k,  centred = U diag(λ) Uᵀ;  the sign is that in which the last checkpoint is not negative

    Range (−∞, ∞), each component of mean 0. A random walk shows cosines of k/2 periods, a Lissajous figure.

    Shapes: steps (*batch, n, n) -> (*batch, n, count).
    Raises: InputError unless the count is from 1 to n.
    Holds: exactly, up to rotations among components of equal variance.
    """
    n = steps.cross.shape[-1]
    if not 1 <= count <= n:
        raise InputError(f"{n} checkpoints have from 1 to {n} principal components, not {count}")
    values, vectors = torch.linalg.eigh(centred(steps).cross)
    values, vectors = values.flip(-1)[..., :count], vectors.flip(-1)[..., :count]
    scores = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return torch.where(scores[..., -1:, :] < 0, -scores, scores)


def span_distance(
    steps: Gram, index: int, others: Sequence[int], affine: bool = True
) -> Float[Tensor, "*batch"]:
    """Distance of a checkpoint to the affine or linear span of others.

    min_c |θ_j − Σ_i c_i θ_i|,  Σ_i c_i = 1 for the affine span

    By least squares on the Gram of unit rows seen from the nearest of the others in the path; directions of
    an eigenvalue below `TOLERANCE` of the largest are left out.

    Range [0, min_i |θ_j − θ_i|]; 0 for a line and two others, |δ| for a random walk and all checkpoints
    before, σ√(1 + 1/k) for jitter and k others.

    Shapes: steps (*batch, n, n) -> (*batch).
    Raises: InputError for numbers that are no checkpoints, and for no others.
    Holds: exactly, down to √ε times the distance to the nearest of the others, ε the machine epsilon.
    """
    n = steps.cross.shape[-1]
    index, found = checkpoint(n, index), sorted({checkpoint(n, other) for other in others})
    if not found:
        raise InputError("a span needs at least one checkpoint, not 0")
    nearest = min(found, key=lambda other: abs(other - index))
    differences = seen_from(n, nearest)
    basis = [differences[[other for other in found if other != nearest]]]
    if not affine:
        basis.append(sums(n)[[nearest]])
    return _distance_to_span(steps, differences[index], torch.cat(basis))


def _distance_to_span(steps: Gram, row: Tensor, basis: Tensor) -> Tensor:
    both = combined(steps, torch.cat([row[None], basis]))
    lengths = both.left[..., 1:].sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0)
    unit = both.cross[..., 1:, 1:] * scale[..., :, None] * scale[..., None, :]
    inner = both.cross[..., 1:, :1] * scale[..., :, None]
    inverse = torch.linalg.pinv(unit, rtol=TOLERANCE, hermitian=True)
    coefficients = (inverse @ inner)[..., 0] * scale
    residual = torch.cat([torch.ones_like(both.left[..., :1]), -coefficients], -1)
    squared = torch.einsum("...i,...ij,...j->...", residual, both.cross, residual)
    return squared.clamp(min=0).sqrt()
