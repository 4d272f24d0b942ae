"""The Gram matrix of two sets of rows: the one instrument behind every reading."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products between two sets of rows, with the squared norms of both sides.

    cross_ij = ⟨x_i, y_j⟩,  left_i = |x_i|²,  right_j = |y_j|²

    Shapes: cross (*batch, n, m), left (*batch, n), right (*batch, m).
    """

    cross: Float[Tensor, "*batch n m"]
    left: Float[Tensor, "*batch n"]
    right: Float[Tensor, "*batch m"]


def gram(x: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"] | None = None) -> Gram:
    """Take the inner products of the rows of x with those of y, or with each other; nothing is normalised.

    cross = x yᵀ

    Half precisions are computed in float64; float32 stays float32, where the squared distance of
    nearby rows loses digits: pass `x.double()` for those. Without y the norms are the diagonal of
    the product itself, so that a row is at distance exactly 0 from itself.

    Shapes: x (*batch, n, d), y (*batch, m, d) -> cross (*batch, n, m).
    Holds: exactly.
    """
    x, y = _widened(x), None if y is None else _widened(y)
    if y is None:
        cross = x @ x.mT
        norms = cross.diagonal(dim1=-2, dim2=-1)
        return Gram(cross, norms, norms)
    return Gram(x @ y.mT, torch.linalg.vecdot(x, x), torch.linalg.vecdot(y, y))


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.dtype in (torch.float16, torch.bfloat16) else x
