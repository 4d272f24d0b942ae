"""The path of an optimiser through parameter space, held as one Gram matrix of its start and its updates.

A path θ_0, …, θ_T of n = T + 1 checkpoints is the Gram `steps` of the n rows (θ_0, δ_0, …, δ_{T−1}) with
δ_t = θ_{t+1} − θ_t. Everything else follows from it by sums of terms of like size, where the Gram of the θ_t
themselves would subtract large numbers to find small ones. Grams of one path add over any partition of the
parameters. Angles and cosines are in `path_angles`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram, gram
from gramian.errors import InputError


def steps_of(points: Float[Tensor, "n p"]) -> Gram:
    """Take the Gram of a path from its points, in float64 whatever their precision.

    rows (θ_0, θ_1 − θ_0, …, θ_T − θ_{T−1})

    Shapes: points (n, p) -> steps (n, n).
    Raises: InputError without a point.
    Holds: exactly.
    """
    if not len(points):
        raise InputError("a path needs at least one point, not 0")
    points = points.double()
    return gram(torch.cat([points[:1], points.diff(dim=0)]))


def steps_from_positions(gram: Gram) -> Gram:
    """Take the Gram of a path from that of its positions, for those who have nothing better.

    D_st = K_{s+1,t+1} − K_{s+1,t} − K_{s,t+1} + K_st

    The second difference cancels: D is wrong by about 4ε|θ|², ε the machine epsilon, so that lengths below
    √(4ε)|θ| and the angles of such updates are noise. `steps_of` loses nothing.

    Shapes: Gram of positions (*batch, n, n) -> steps (*batch, n, n).
    Holds: exactly, up to that cancellation.
    """
    n = _rows(gram)
    return combined(gram, torch.eye(n).diff(dim=0, prepend=torch.zeros(1, n)))


def sum_of(grams: Sequence[Gram]) -> Gram:
    """Add the Grams of disjoint parts of the parameters: the Gram of those parts together.

    Σ_l steps^(l)

    Raises: InputError for no Gram, and for Grams of different size.
    Holds: exactly.
    """
    sizes = {part.cross.shape for part in grams}
    if len(sizes) != 1:
        found = ", ".join(str(tuple(size)) for size in sorted(sizes)) or "none"
        raise InputError(f"only Grams of one and the same size can be added, and these have: {found}")
    return Gram(
        torch.stack([part.cross for part in grams]).sum(0),
        torch.stack([part.left for part in grams]).sum(0),
        torch.stack([part.right for part in grams]).sum(0),
    )


def balanced(parts: Sequence[Gram]) -> Gram:
    """Add the paths of disjoint parts, each scaled to unit mean squared norm, so that no large part rules.

    Σ_l steps^(l) / mean_t |θ_t^(l)|²

    Parts that are zero throughout are left out.

    Raises: InputError as `sum_of`, and when all parts are zero throughout.
    Holds: exactly.
    """
    scaled = []
    for part in parts:
        scale = positions(part).left.mean(-1)
        if not bool((scale == 0).all()):
            scaled.append(Gram(*(x / scale.reshape(-1, *[1] * (x.ndim - scale.ndim)) for x in _fields(part))))
    if parts and not scaled:
        raise InputError("no part has a weight that differs from zero, so that none can be scaled to norm 1")
    return sum_of(scaled)


def combined(gram: Gram, coefficients: Float[Tensor, "m n"]) -> Gram:
    """Take the Gram of linear combinations of the rows.

    rows Mx:  cross = M (x xᵀ) Mᵀ

    Squared norms that rounding makes negative are 0.

    Shapes: gram (*batch, n, n), coefficients (m, n) -> (*batch, m, m).
    Raises: InputError unless both sides are the same n rows.
    Holds: exactly.
    """
    if _rows(gram) != coefficients.shape[-1]:
        raise InputError(f"coefficients for {coefficients.shape[-1]} rows do not fit {_rows(gram)} rows")
    coefficients = coefficients.to(gram.cross)
    cross = coefficients @ gram.cross @ coefficients.mT
    cross = (cross + cross.mT) / 2
    norms = cross.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    return Gram(cross, norms, norms)


def positions(steps: Gram) -> Gram:
    """Gram of the points θ_0, …, θ_T.

    K_ij = ⟨θ_i, θ_j⟩

    Line and random walk from the origin: K_ij = ij|δ|² and min(i, j)|δ|².

    Shapes: steps (*batch, n, n) -> (*batch, n, n).
    Holds: exactly.
    """
    return combined(steps, sums(_rows(steps)))


def displacements(steps: Gram, origin: int = 0) -> Gram:
    """Gram of the displacements from a checkpoint to the T others.

    R_ij = ⟨θ_i − θ_o, θ_j − θ_o⟩,  i, j ≠ o;  by default the origin o = 0 is the initialisation

    Line and random walk, o = 0: R_ij = ij|δ|² and min(i, j)|δ|², whatever |θ_0| is.

    Shapes: steps (*batch, n, n) -> (*batch, n−1, n−1).
    Raises: InputError for an origin that is no checkpoint.
    Holds: exactly.
    """
    n = _rows(steps)
    origin = checkpoint(n, origin)
    return combined(steps, seen_from(n, origin)[torch.arange(n) != origin])


def updates(steps: Gram) -> Gram:
    """Gram of the updates.

    D_st = ⟨δ_s, δ_t⟩,  δ_t = θ_{t+1} − θ_t

    Line: all entries |δ|²; random walk: |δ|² on the diagonal and 0 ± |δ|²/√p beside it.

    Shapes: steps (*batch, n, n) -> (*batch, T, T).
    Holds: exactly.
    """
    _rows(steps)
    return Gram(steps.cross[..., 1:, 1:], steps.left[..., 1:], steps.right[..., 1:])


def accelerations(steps: Gram) -> Gram:
    """Gram of the changes of the update.

    ⟨a_s, a_t⟩,  a_t = δ_{t+1} − δ_t

    Line: 0; random walk: 2|δ|² on the diagonal and −|δ|² beside it.

    Shapes: steps (*batch, n, n) -> (*batch, T−1, T−1).
    Holds: exactly.
    """
    return combined(updates(steps), torch.eye(_rows(steps) - 1).diff(dim=0))


def subpath(steps: Gram, indices: Sequence[int]) -> Gram:
    """Keep only some checkpoints of a path; an update then leads from one kept checkpoint to the next.

    Shapes: steps (*batch, n, n), m indices -> (*batch, m, m).
    Raises: InputError unless the indices are increasing numbers of checkpoints.
    Holds: exactly.
    """
    n, kept = _rows(steps), list(indices)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < n:
        raise InputError(f"a sub-path needs increasing numbers of checkpoints from 0 to {n - 1}, not {kept}")
    rows = torch.zeros(len(kept), n)
    rows[0, : kept[0] + 1] = 1
    for row, start, end in zip(rows[1:], kept, kept[1:], strict=False):
        row[start + 1 : end + 1] = 1
    return combined(steps, rows)


def every(steps: Gram, k: int) -> Gram:
    """Keep each k-th checkpoint of a path, from the first.

    Shapes: steps (*batch, n, n) -> (*batch, ⌈n/k⌉, ⌈n/k⌉).
    Raises: InputError unless k is positive.
    Holds: exactly.
    """
    if k < 1:
        raise InputError(f"every k-th checkpoint needs a k of 1 or more, not {k}")
    return subpath(steps, range(0, _rows(steps), k))


def centred(steps: Gram, weights: Float[Tensor, " n"] | None = None) -> Gram:
    """Gram of the points seen from their weighted average: the matrix of principal component analysis.

    ⟨θ_i − θ̄, θ_j − θ̄⟩,  θ̄ = Σ_i w_i θ_i;  uniform weights: H K H with H = I − 11ᵀ/n

    `readings.spectrum` of it has the squared singular values of the centred points, one of them 0; its
    participation ratio is 1 for a line and 5/2 for a random walk, as T, p → ∞.

    Shapes: steps (*batch, n, n), weights (n) -> (*batch, n, n).
    Raises: InputError unless there is one weight a checkpoint and their sum is not 0.
    Holds: exactly.
    """
    n = _rows(steps)
    to_average = torch.eye(n, dtype=torch.float64) - normalised(weights, n)
    return combined(steps, to_average @ seen_from(n, 0))


def average_norm(steps: Gram, weights: Float[Tensor, " n"]) -> Float[Tensor, "*batch"]:
    """Norm of a weighted average of the checkpoints.

    |θ̄|,  θ̄ = Σ_i w_i θ_i,  Σ_i w_i = 1 (the weights are divided by their sum)

    Range [0, max_i |θ_i|] for weights that are not negative.

    Raises: InputError as `centred`.
    Holds: exactly.
    """
    n = _rows(steps)
    return combined(steps, normalised(weights, n)[None] @ sums(n)).left[..., 0].sqrt()


def average_distances(steps: Gram, weights: Float[Tensor, " n"]) -> Float[Tensor, "*batch n"]:
    """Distances of a weighted average of the checkpoints to each of them.

    |θ_j − θ̄|,  θ̄ = Σ_i w_i θ_i,  Σ_i w_i = 1 (the weights are divided by their sum)

    Range [0, ∞). Jitter of size σ about a point, uniform weights on k: σ√(1 − 1/k) to these k, σ√(1 + 1/k)
    to the others.

    Raises: InputError as `centred`.
    Holds: exactly.
    """
    return centred(steps, weights).left.sqrt()


def norms(steps: Gram) -> Float[Tensor, "*batch n"]:
    """Norms of the points.

    |θ_t|

    Range [0, ∞). From the origin of parameter space a line has t|δ|, a random walk √t|δ|.

    Holds: exactly.
    """
    return positions(steps).left.sqrt()


def update_lengths(steps: Gram) -> Float[Tensor, "*batch t"]:
    """Lengths of the updates.

    ℓ_t = |δ_t|

    Range [0, ∞); constant for a line at constant speed and for a random walk.

    Shapes: steps (*batch, n, n) -> (*batch, T).
    Holds: exactly.
    """
    return updates(steps).left.sqrt()


def path_length(steps: Gram) -> Float[Tensor, "*batch"]:
    """Length of the path.

    Λ = Σ_t ℓ_t

    Range [Δ_T, ∞); T|δ| for a line and for a random walk.

    Holds: exactly.
    """
    return update_lengths(steps).sum(-1)


def displacement(steps: Gram) -> Float[Tensor, "*batch n"]:
    """Distances of the checkpoints from the first.

    Δ_t = |θ_t − θ_0|

    Range [0, Σ_{s<t} ℓ_s]; t|δ| for a line and √t|δ| for a random walk.

    Holds: exactly; a path that comes back to θ_0 reads √ε Λ rather than 0, ε the machine epsilon.
    """
    return combined(steps, seen_from(_rows(steps), 0)).left.sqrt()


def displacement_ratio(steps: Gram) -> Float[Tensor, "*batch"]:
    """Straightness of the path: the displacement from start to end by the length of the path.

    Δ_T / Λ

    Range [0, 1]; 1 for a line, 1/√T for a random walk; NaN for a path of no length. Of a window: the ratio
    of its `subpath`.

    Holds: exactly.
    """
    return displacement(steps)[..., -1] / path_length(steps)


def acceleration_lengths(steps: Gram) -> Float[Tensor, "*batch t"]:
    """Lengths of the changes of the update.

    |δ_{t+1} − δ_t|

    Range [0, ℓ_t + ℓ_{t+1}]; 0 for a line at constant speed, √2|δ| for a random walk, √3|δ| for jitter.

    Shapes: steps (*batch, n, n) -> (*batch, T−1).
    Holds: exactly; below √ε ℓ_t it is rounding, ε the machine epsilon.
    """
    return accelerations(steps).left.sqrt()


def distances(steps: Gram) -> Float[Tensor, "*batch n n"]:
    """Distances between all pairs of checkpoints, without the cancellation of `readings.distance`.

    d²_ij = Σ_{i≤s,t<j} D_st,  by  d²_{i,j+1} = d²_ij + 2⟨θ_j − θ_i, δ_j⟩ + D_jj

    Range [0, ∞), below the length of the path between the two; |i − j||δ| for a line and √|i − j||δ| for a
    random walk.

    Holds: exactly; points that the path returns to read √ε times its length, ε the machine epsilon.
    """
    return squared_distances(steps).sqrt()


def squared_distances(steps: Gram) -> Float[Tensor, "*batch n n"]:
    """Square the distances of all pairs of checkpoints, as `distances` has them."""
    products = updates(steps).cross
    earlier = products.triu(1).flip(-2).cumsum(-2).flip(-2)
    added = (2 * earlier + products.diagonal(dim1=-2, dim2=-1)[..., None, :]).triu()
    upper = torch.nn.functional.pad(added.cumsum(-1).triu(), (1, 0, 0, 1))
    return (upper + upper.mT).clamp(min=0)


def sums(n: int) -> Float[Tensor, "n n"]:
    """Coefficients that make the positions θ_i of the rows (θ_0, δ_0, …)."""
    return torch.ones(n, n, dtype=torch.float64).tril()


def seen_from(n: int, origin: int) -> Float[Tensor, "n n"]:
    """Coefficients that make the displacements θ_i − θ_o, a zero row at o, of the rows (θ_0, δ_0, …)."""
    return sums(n) - sums(n)[origin]


def normalised(weights: Float[Tensor, " m"] | None, n: int) -> Float[Tensor, " n"]:
    """Weights divided by their sum; uniform ones for None.

    Raises: InputError unless there are n finite weights whose sum is not 0.
    """
    if weights is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    weights = weights.detach().to("cpu", torch.float64)
    total = weights.sum()
    if len(weights) != n or not bool(weights.isfinite().all()) or total == 0:
        raise InputError(
            f"an average of {n} rows needs {n} finite weights whose sum is not 0, not {weights.tolist()}"
        )
    return weights / total


def checkpoint(n: int, index: int) -> int:
    """Count a checkpoint from the first, where one below 0 is counted from the end.

    Raises: InputError unless it is one of the n.
    """
    if not -n <= index < n:
        raise InputError(f"checkpoint {index} is not one of the {n} of this path")
    return index % n


def _rows(gram: Gram) -> int:
    n, m = gram.cross.shape[-2:]
    if n != m or not n:
        raise InputError(f"a path is the Gram of one set of rows, not of {n} rows against {m}")
    return n


def _fields(gram: Gram) -> tuple[Tensor, Tensor, Tensor]:
    return gram.cross, gram.left, gram.right
