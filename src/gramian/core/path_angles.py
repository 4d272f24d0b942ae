"""Directions along the path of an optimiser: cosines, angles in radians and similarity, of a Gram `steps`.

`trajectory` says what `steps` is. An angle of a vector that is 0 is NaN. Angles are exact where they are
taken from vectors that are given; those between updates, and all below √ε (ε the machine epsilon), are
what the rounding of their inner products leaves.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.readings import cosine
from gramian.core.trajectory import (
    checkpoint,
    combined,
    normalised,
    positions,
    seen_from,
    squared_distances,
    sums,
    updates,
)
from gramian.errors import InputError


def directional_similarity(gram: Gram, weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, "*batch"]:
    """Mean cosine over all pairs of rows, each row's with itself included.

    ω = Σ_ij w_i w_j cos_ij,  Σ_i w_i = 1;  uniform weights: (1/n²) 1ᵀC1 = |mean_i x_i/|x_i||²

    Rows that are 0 have no direction and are left out. Range [0, 1]. Of `positions`, the absolute ω, it is
    near 1 for every path much shorter than |θ_0|; of `displacements`, the relative ω, it is 1 for a line,
    2/3 for a random walk as T → ∞ and 1/T for jitter about θ_0, ½ where θ_0 is a point of the jitter itself.

    Shapes: gram (*batch, n, n), weights (n) -> (*batch).
    Raises: InputError unless there is one weight a row and their sum is not 0.
    Holds: exactly.
    Source: Singh, He, Hofmann, Schölkopf 2024, arXiv 2403.07379 (mean directional similarity).
    """
    cosines, weights = _directions(gram, weights)
    return _quadratic(cosines, weights)


def directional_similarity_off(
    gram: Gram, weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "*batch"]:
    """Mean cosine over the pairs of different rows: `readings.cosine_mean` of the rows that are not 0.

    ω_off = (ω − Σ_i w_i²) / (1 − Σ_i w_i²);  uniform weights: (nω − 1) / (n − 1)

    Range [−1/(n−1), 1]; of `displacements` 1 for a line, 2/3 for a random walk as T → ∞ and 0 for jitter
    about θ_0, ½ where θ_0 is a point of the jitter itself. NaN for a single row.

    Shapes: gram (*batch, n, n), weights (n) -> (*batch).
    Raises: InputError as `directional_similarity`.
    Holds: exactly.
    """
    cosines, weights = _directions(gram, weights)
    own, single = weights.square().sum(-1), (weights != 0).sum(-1) < 2
    return ((_quadratic(cosines, weights) - own) / (1 - own)).masked_fill(single, torch.nan)


def spacing_weights(times: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights of checkpoints by the time between them, so that a crowded stretch does not count more.

    w_i = (t_{i+1} − t_{i−1}) / (2(t_{n−1} − t_0)), half an interval at the ends: the trapezoid rule

    Range (0, 1), sum 1; nearly uniform for even spacing, where the ends have half a weight.

    Raises: InputError unless the times are two or more and increase.
    Holds: exactly.
    """
    gaps = times.double().diff()
    if not len(gaps) or not bool((gaps > 0).all()):
        raise InputError(f"weights by time need two or more increasing times, not {times.tolist()}")
    ends = gaps.new_zeros(1)
    return (torch.cat([ends, gaps]) + torch.cat([gaps, ends])) / (2 * gaps.sum())


def update_angles(steps: Gram, lag: int = 1) -> Float[Tensor, "*batch t"]:
    """Angles between an update and the `lag`-th after it.

    φ_t = ∠(δ_t, δ_{t+lag})

    Range [0, π]; 0 for a line, π/2 for a random walk, 2π/3 at lag 1 and π/2 beyond for jitter.

    Shapes: steps (*batch, n, n) -> (*batch, T − lag).
    Raises: InputError for a lag below 1.
    Holds: exactly.
    """
    if lag < 1:
        raise InputError(f"the lag between two updates must be 1 or more, not {lag}")
    found = updates(steps)
    inner = found.cross.diagonal(offset=lag, dim1=-2, dim2=-1)
    return _angle(found.left[..., :-lag], found.left[..., lag:], inner)


def total_turning(steps: Gram) -> Float[Tensor, "*batch"]:
    """Sum of the angles by which the path turns at its checkpoints.

    Σ_t φ_t

    Range [0, (T−1)π]; 0 for a line, (T−1)π/2 for a random walk, 2π(T−1)/T for a circle in T steps.

    Holds: exactly.
    """
    return update_angles(steps).sum(-1)


def apex_angles(steps: Gram, apex: int | None = 0) -> Float[Tensor, "*batch t"]:
    """Angles under which the updates are seen from a checkpoint, or from the origin of parameter space.

    ∠(θ_t − a, θ_{t+1} − a),  a = θ_apex, by default the initialisation, or a = 0 for None

    Range [0, π]; from the initialisation 0 for a line, arccos √(t/(t+1)) for a random walk, π/3 for jitter;
    NaN beside the apex itself. Tiny angles are exact: no cosine is taken.

    Shapes: steps (*batch, n, n) -> (*batch, T).
    Raises: InputError for an apex that is no checkpoint.
    Holds: exactly.
    """
    return angle_map(steps, apex).diagonal(offset=1, dim1=-2, dim2=-1)


def angle_map(steps: Gram, apex: int | None = None) -> Float[Tensor, "*batch n n"]:
    """Angles between all pairs of checkpoints, seen from one of them or from the origin of parameter space.

    α_ij = ∠(θ_i − a, θ_j − a) = atan2(√(|u|²|v|² − ⟨u, v⟩²), |u|² + ⟨u, v⟩),  u = θ_i − a,  v = θ_j − θ_i

    Range [0, π]; from the initialisation 0 for a line and arccos √(i/j), i < j, for a random walk; NaN in the
    row and column of the apex. Tiny angles are exact: an arccos of the cosine would lose those below √ε.

    Shapes: steps (*batch, n, n) -> (*batch, n, n).
    Raises: InputError for an apex that is no checkpoint.
    Holds: exactly.
    """
    n = steps.cross.shape[-1]
    rows = sums(n) if apex is None else seen_from(n, checkpoint(n, apex))
    base = combined(steps, rows).left
    # ⟨θ_i − a, δ_t⟩ of all i and t, summed over t from i to j − 1, and |θ_j − θ_i|² of all i < j
    along = (rows.to(steps.cross) @ steps.cross)[..., 1:].triu().cumsum(-1)
    inner = torch.nn.functional.pad(along, (1, 0)).triu()
    moved = squared_distances(steps)
    across = (base[..., :, None] * moved - inner.square()).clamp(min=0).sqrt()
    upper = torch.atan2(across, base[..., :, None] + inner).triu(1)
    angles = upper + upper.mT
    nowhere = base == 0
    return angles.masked_fill(nowhere[..., :, None] | nowhere[..., None, :], torch.nan)


def angles_to_end(steps: Gram) -> Float[Tensor, "*batch t"]:
    """Angles between the updates and the displacement from start to end.

    ∠(δ_t, θ_T − θ_0)

    Range [0, π]; 0 for a line, arccos(1/√T) for a random walk.

    Shapes: steps (*batch, n, n) -> (*batch, T).
    Holds: exactly.
    """
    found = updates(steps)
    whole = found.cross.sum((-2, -1)).clamp(min=0)[..., None]
    return _angle(found.left, whole, found.cross.sum(-1))


def angles_to_remainder(steps: Gram) -> Float[Tensor, "*batch t"]:
    """Angles between the updates and the way that remains to the end.

    ∠(δ_t, θ_T − θ_t)

    Range [0, π]; 0 for a line, arccos(1/√(T − t)) for a random walk, π/3 for jitter, and always 0 for the
    last update, which is the way that remains.

    Shapes: steps (*batch, n, n) -> (*batch, T).
    Holds: exactly.
    """
    found = updates(steps)
    remaining = squared_distances(steps)[..., :-1, -1]
    return _angle(found.left, remaining, found.cross.triu().sum(-1))


def radial_updates(steps: Gram) -> Float[Tensor, "*batch t"]:
    """Parts of the updates along the weights: below 0 towards the origin, as weight decay pulls.

    ⟨δ_t, θ_t⟩ / |θ_t|

    Range [−ℓ_t, ℓ_t]; ℓ_t for a line through the origin, 0 ± ℓ_t/√p for a random walk.

    Shapes: steps (*batch, n, n) -> (*batch, T).
    Holds: exactly.
    """
    inner = (sums(steps.cross.shape[-1]).to(steps.cross) @ steps.cross)[..., 1:]
    return inner.diagonal(dim1=-2, dim2=-1) / positions(steps).left[..., :-1].sqrt()


def tangential_lengths(steps: Gram) -> Float[Tensor, "*batch t"]:
    """Lengths of the parts of the updates across the weights; scale-invariant layers move only so.

    √(ℓ_t² − (⟨δ_t, θ_t⟩ / |θ_t|)²)

    Range [0, ℓ_t]; 0 for a line through the origin, nearly ℓ_t for a random walk.

    Shapes: steps (*batch, n, n) -> (*batch, T).
    Holds: exactly.
    """
    return (updates(steps).left - radial_updates(steps).square()).clamp(min=0).sqrt()


def _directions(gram: Gram, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines with 0 for rows that are 0, and weights with sum 1 over the other rows."""
    cosines, zero = cosine(gram), gram.left == 0
    shares = normalised(weights, zero.shape[-1]).to(cosines) * ~zero
    nowhere = zero[..., :, None] | zero[..., None, :]
    return cosines.masked_fill(nowhere, 0), shares / shares.sum(-1, keepdim=True)


def _quadratic(square: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("...i,...ij,...j->...", weights, square, weights)


def _angle(left: Tensor, right: Tensor, inner: Tensor) -> Tensor:
    """Angle of two vectors by their squared norms and inner product; NaN where one of them is 0."""
    product = left * right
    across = (product - inner.square()).clamp(min=0).sqrt()
    return torch.atan2(across, inner).masked_fill(product == 0, torch.nan)
