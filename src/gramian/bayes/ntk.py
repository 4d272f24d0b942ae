"""The empirical neural tangent kernel of any module: how two inputs move together when it trains."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gramian.bayes.ntk_layers import PAIRINGS, Features, Pairing, Work
from gramian.bayes.ntk_structure import (
    IrregularError,
    Structure,
    check_both,
    structure,
    two_rows,
    without_layers,
)
from gramian.core.jacobian import Function, Weights, function, jvp, scales, vjp
from gramian.errors import InputError

METHODS = ("auto", "structured", "contraction", "vector")
"""The ways to the kernel, and the choice of the cheapest."""
MEMORY = 2**30
"""Bytes used beside the result, unless told otherwise."""


def ntk(
    module: nn.Module,
    x: Shaped[Tensor, " n *size"],
    y: Shaped[Tensor, " m *other"] | None = None,
    *,
    outputs: str = "full",
    method: str = "auto",
    weights: Weights | None = None,
    parameters: Collection[str] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "..."]:
    """Give the empirical neural tangent kernel of two sets of rows, or of one with itself.

        Θ(x_n, y_m)_op = Σ_j s_j ∂f_o(x_n)/∂θ_j ∂f_p(y_m)/∂θ_j

    `outputs` says which outputs of two rows meet: "full" all pairs; "diagonal" o = p; "trace" Σ_o of those.
    The full kernel is a matrix by `.flatten(2).flatten(0, 1)`. `weights` are the s_j, 1 when not given: the
    variances of the initialisation make the kernel that of the infinitely wide network. `parameters` names
    those that count, or modules that hold them: those of the last layer alone, say.

    `method` chooses the way, never the result. With F multiplications of one row's forward pass, O outputs,
    P products of outputs (O² in full, else O) and, per layer, I inputs and D outputs at each of S positions:

        structured   (n + m)(1 + 2O) F + Σ_layers min of
                     n m (S² I + S² O D + S P D), or n m (I + P D) at S = 1, the parts kept apart
                     n m P I D + (n + m) O S I D, multiplied out
        contraction  (n + m)(1 + 2O) F + n m P · parameters
        vector       m O · 3F + n m O · 2F

    "auto" takes structured or vector, whichever costs less. Structured knows linear maps, convolutions,
    embeddings, norms and products or sums with a parameter, and contracts the Jacobian of parameters that
    are used in another way, tied across layers or weighed number by number. `memory` is how many bytes may
    be used beside the result, roughly; below that, rows are taken in parts.

    Shapes: x (n, …), y (m, …) -> full (n, O, m, O), diagonal (O, n, m), trace (n, m).
    Raises: InputError for inputs that are empty, not finite or do not fit each other, unknown names, weights
        that do not fit, a module without parameters, and one whose rows depend on each other or on chance.
    Holds: exactly.
    Source: Jacot, Gabriel, Hongler 2018, arXiv 1806.07572; structured: Novak, Sohl-Dickstein, Schoenholz
        2022, arXiv 2206.08720.
    """
    symmetric, other = y is None, x if y is None else y
    problem = _problem(module, x, other, outputs, method, weights, parameters, memory)
    n, m = len(x), len(other)

    def work(count: int) -> Work:
        return Work(n * m, n if symmetric else n + m, count, problem.pairing.products(count))

    found = structure(problem.f, two_rows(x, other), problem.scale, work)
    if method == "vector" or (method == "auto" and _vector_cost(found, n, m) < found.cost):
        return _by_vectors(problem, x, other, found)
    if method == "contraction":
        return _tiled(problem, without_layers(found, work), x, other, symmetric)
    try:
        return _tiled(problem, found, x, other, symmetric)
    except IrregularError:
        return _tiled(problem, without_layers(found, work), x, other, symmetric)


def ntk_diagonal(
    module: nn.Module,
    x: Shaped[Tensor, " n *size"],
    *,
    outputs: str = "full",
    weights: Weights | None = None,
    parameters: Collection[str] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, " n *outputs"]:
    """Give the kernel of every row with itself alone: the prior variance of its linearised outputs.

        Θ(x_n, x_n)_op = Σ_j s_j ∂f_o(x_n)/∂θ_j ∂f_p(x_n)/∂θ_j

    Options as those of `ntk`.

    Shapes: x (n, …) -> full (n, O, O), diagonal (n, O), trace (n).
    Raises: InputError as `ntk`.
    Holds: exactly.
    """
    problem = _problem(module, x, x, outputs, "auto", weights, parameters, memory)

    def work(count: int) -> Work:
        return Work(len(x), len(x), count, problem.pairing.products(count))

    def of(known: Structure) -> Tensor:
        rows = _rows_at_once(known, memory)
        return torch.cat([_same(known.features(part), problem.pairing) for part in x.split(rows)])

    found = structure(problem.f, two_rows(x, x), problem.scale, work)
    try:
        return of(found)
    except IrregularError:
        return of(without_layers(found, work))


@dataclass(frozen=True, eq=False)
class _Problem:
    f: Function
    scale: dict[str, Tensor]
    pairing: Pairing
    memory: int


def _problem(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    outputs: str,
    method: str,
    weights: Weights | None,
    parameters: Collection[str] | None,
    memory: int,
) -> _Problem:
    if outputs not in PAIRINGS:
        raise InputError(f"unknown outputs {outputs!r}; choose {', '.join(PAIRINGS)}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    if memory < 1:
        raise InputError(f"the memory must be a positive number of bytes, got {memory}")
    check_both(x, y)
    f = function(module, parameters)
    return _Problem(f, scales(f, weights), PAIRINGS[outputs], memory)


def _rows_at_once(known: Structure, memory: int) -> int:
    """Return how many rows' features fit into half of the memory, so that two parts fit at a time."""
    itemsize = max(p.element_size() for p in known.f.parameters.values())
    return max(1, memory // (2 * itemsize * known.numbers))


def _tiled(problem: _Problem, known: Structure, x: Tensor, y: Tensor, symmetric: bool) -> Tensor:
    """Compute the kernel tile by tile; of rows with themselves one half, and its mirror image."""
    pairing = problem.pairing
    rows = _rows_at_once(known, problem.memory)
    like = next(iter(problem.scale.values()))
    result = like.new_empty(pairing.shape(len(x), len(y), known.outputs))
    strips = _Strips(pairing, problem.memory // (4 * like.element_size()))
    for i, part in _parts(x, rows):
        left = known.features(part)
        for j, other in _parts(y, rows, i if symmetric else 0):
            tile = pairing.part(result, i, len(part), j, len(other))
            if symmetric and i == j:
                strips.fill_half(tile, left)
            else:
                strips.fill(tile, left, known.features(other))
            if symmetric and i != j:
                pairing.part(result, j, len(other), i, len(part)).copy_(tile.permute(pairing.flip))
    return result


def _parts(x: Tensor, rows: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    yield from ((i, x[i : i + rows]) for i in range(start, len(x), rows))


@dataclass(frozen=True)
class _Strips:
    """Fills tiles of a kernel by strips of rows that need at most so many numbers beside the result."""

    pairing: Pairing
    numbers: int

    def fill(self, tile: Tensor, left: list[Features], right: list[Features]) -> None:
        """Write the kernel of two lists of features."""
        n, m = (tile.shape[axis] for axis in self.pairing.axes)
        rows = self._rows(left, n, m)
        for i in range(0, n, rows):
            here = [feature.rows(slice(i, i + rows)) for feature in left]
            self._add(self.pairing.part(tile, i, min(rows, n - i), 0, m), here, right)

    def fill_half(self, tile: Tensor, features: list[Features]) -> None:
        """Write the kernel of a list of features with itself: what lies behind the diagonal is mirrored."""
        n = tile.shape[self.pairing.axes[0]]
        rows = min(self._rows(features, n, n), max(8, -(-n // 4)))
        for i in range(0, n, rows):
            count = min(rows, n - i)
            strip = self.pairing.part(tile, i, count, i, n - i)
            here = [feature.rows(slice(i, i + rows)) for feature in features]
            self._add(strip, here, [feature.rows(slice(i, None)) for feature in features])
            behind = self.pairing.part(tile, i, count, i + count, n - i - count)
            mirror = self.pairing.part(tile, i + count, n - i - count, i, count)
            mirror.copy_(behind.permute(self.pairing.flip))

    def _rows(self, features: list[Features], n: int, m: int) -> int:
        per_row = max(feature.workspace(m, self.pairing) for feature in features)
        return max(1, min(n, self.numbers // max(per_row, 1)))

    def _add(self, strip: Tensor, left: list[Features], right: list[Features]) -> None:
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            term = one.against(other, self.pairing)  # type: ignore[arg-type]
            strip.add_(term) if place else strip.copy_(term)


def _same(features: list[Features], pairing: Pairing) -> Tensor:
    total = features[0].same(pairing)
    for feature in features[1:]:
        total = total + feature.same(pairing)
    return total


def _vector_cost(known: Structure, n: int, m: int) -> int:
    return m * known.outputs * known.forward * (3 + 2 * n)


def _by_vectors(problem: _Problem, x: Tensor, y: Tensor, known: Structure) -> Tensor:
    """Compute the kernel column by column, Θ e = J_x diag(s) J_yᵀ e: no Jacobian is held."""
    pairing, count = problem.pairing, known.outputs
    like = next(iter(problem.scale.values()))
    result = like.new_zeros(pairing.shape(len(x), len(y), count))
    for m, row in enumerate(y.split(1)):
        for p in range(count):
            unit = torch.nn.functional.one_hot(torch.tensor([p]), count).to(like)
            tangent = {name: g * problem.scale[name] for name, g in vjp(problem.f, row, unit).items()}
            _COLUMNS[pairing.cross](result, jvp(problem.f, x, tangent), m, p)
    return result


def _full_column(result: Tensor, column: Tensor, m: int, p: int) -> None:
    result[:, :, m, p] = column


def _diagonal_column(result: Tensor, column: Tensor, m: int, p: int) -> None:
    result[p, :, m] = column[:, p]


def _trace_column(result: Tensor, column: Tensor, m: int, p: int) -> None:
    result[:, m] += column[:, p]


_COLUMNS: dict[str, Callable[[Tensor, Tensor, int, int], None]] = {
    PAIRINGS["full"].cross: _full_column,
    PAIRINGS["diagonal"].cross: _diagonal_column,
    PAIRINGS["trace"].cross: _trace_column,
}
