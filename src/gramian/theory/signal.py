"""The state that theory folds maps over: second moments of two sets of inputs and their tangent kernel."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gramian.core.gram import Gram, gram
from gramian.errors import InputError


@dataclass(frozen=True, eq=False)
class Signal:
    """Second moments of a layer of infinite width, and the tangent kernel of all parameters before it.

        activation_ij = E[z(x_i) z(y_j)],   tangent_ij = Σ_θ E[∂_θ z(x_i) ∂_θ z(y_j)]

    `space` is the shape of an input's positions (pixels, tokens), P = ∏ space of them, in one of two layouts
    that the number of dimensions of `cross` tells apart. *Same position* keeps pairs of one position:
    cross (*space, n, m), left (*space, n). *All pairs* keeps every pair, rows running over (input, position)
    with the position fastest: cross (n·P, m·P), left (n·P). `within` then holds the moments between the
    positions of one input for each side; it is None where both sides are the same inputs, since the blocks
    on the diagonal of `cross` are those. A side that is the very same tensor as the other says so.

    Shapes: cross (*batch, n, m) without space; within (n, P, P) and (m, P, P).
    """

    activation: Gram
    tangent: Float[Tensor, "..."] | None = None
    space: tuple[int, ...] = ()
    within: tuple[Float[Tensor, "n p p"], Float[Tensor, "m p p"]] | None = None

    @property
    def all_pairs(self) -> bool:
        """Whether there are positions and every pair of them is kept."""
        return bool(self.space) and self.activation.cross.ndim == 2

    @property
    def symmetric(self) -> bool:
        """Whether both sides are the same inputs."""
        return self.activation.left is self.activation.right

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """Moments between the positions of one input, for each distinct side; all pairs of positions only."""
        if self.within is not None:
            return self.within
        if not (self.all_pairs and self.symmetric):
            raise InputError(
                "moments between the positions of one input are needed here; make the signal of two sets of "
                'inputs by signal(x, y, positions="all")'
            )
        blocked = self.activation.cross.unflatten(0, (-1, math.prod(self.space)))
        blocked = blocked.unflatten(2, (blocked.shape[0], -1))
        return (blocked.diagonal(dim1=0, dim2=2).permute(2, 0, 1),)

    def variances(self, cross: Tensor, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the two sides' variances after a map that gave `cross`.

        For one set of inputs they are its diagonal: a variance computed otherwise could differ in the last
        digit, of which slopes at correlation 1 would keep the square root.
        """
        if self.symmetric:
            left = right = cross.diagonal(dim1=-2, dim2=-1).contiguous()
            return left, right
        return change(self.activation.left), change(self.activation.right)

    def elementwise(
        self, change: Callable[[Tensor, Tensor, Tensor], Tensor], cross: Tensor | None = None
    ) -> "Signal":
        """Change every moment given the variances (a, b) of its pair; the tangent is dropped.

            k -> change(k, a, b)

        `cross` is what became of the cross moments, where the caller has it already.
        """
        g = self.activation
        if cross is None:
            cross = change(g.cross, g.left[..., :, None], g.right[..., None, :])
        left, right = self.variances(cross, lambda q: change(q, q, q))
        within = None
        if self.within is not None:
            positions = math.prod(self.space)
            q, p = g.left.unflatten(-1, (-1, positions)), g.right.unflatten(-1, (-1, positions))
            x, y = self.within
            within = (
                change(x, q[:, :, None], q[:, None, :]),
                change(y, p[:, :, None], p[:, None, :]),
            )
        return Signal(Gram(cross, left, right), None, self.space, within)

    def with_tangent(self, tangent: Tensor | None) -> "Signal":
        """Return the same moments with this tangent."""
        return Signal(self.activation, tangent, self.space, self.within)


def signal(
    x: Shaped[Tensor, "..."],
    y: Shaped[Tensor, "..."] | None = None,
    *,
    positions: str = "none",
    tangent: bool = True,
    dtype: torch.dtype | None = torch.float64,
) -> Signal:
    """Start from inputs, features last: their mean inner products, with no parameter seen yet.

        K_0(x, x') = ⟨x, x'⟩ / d,   Θ_0 = 0

    `positions` "same" keeps for inputs with positions the pairs of one position (enough for a flattened
    read-out), "all" every pair (needed by pooling and by mixing of tokens). `tangent=False` follows the
    second moments alone. A `dtype` of None keeps that of x.

    Shapes: x (*batch, n, d), y (*batch, m, d); with positions x (n, *space, d), y (m, *space, d).
    Raises: InputError for inputs that are not finite, for other features or positions in y, and where
    positions are asked for and x has none.
    Holds: exactly.
    """
    x = _checked(x, dtype, "x")
    y = None if y is None else _checked(y, x.dtype, "y")
    if positions not in ("none", "same", "all"):
        raise InputError(f'positions must be "none", "same" or "all", got {positions!r}')
    rows = -2 if positions == "none" else 0
    if y is not None and x.select(rows, 0).shape != y.select(rows, 0).shape:
        raise InputError(
            f"x and y must agree in positions and features, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if positions != "none" and x.ndim < 3:
        raise InputError(f"inputs with positions have shape (n, *space, features), got {tuple(x.shape)}")
    space = () if positions == "none" else tuple(x.shape[1:-1])
    if positions == "same":
        x, y = x.movedim(0, -2), None if y is None else y.movedim(0, -2)
    within = None
    if positions == "all":
        if y is not None:
            within = (_blocks(x), _blocks(y))
        x, y = x.flatten(0, -2), None if y is None else y.flatten(0, -2)
    products, features = gram(x, y), x.shape[-1]
    left = products.left / features
    right = left if y is None else products.right / features
    moments = Gram(products.cross / features, left, right)
    return Signal(moments, torch.zeros_like(moments.cross) if tangent else None, space, within)


def _checked(x: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"{name} must be inputs × features with at least one of each, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise InputError(f"{name} holds numbers that are not finite")
    return x if dtype is None else x.to(dtype)


def _blocks(x: Tensor) -> Tensor:
    x = x.flatten(1, -2)
    return x @ x.mT / x.shape[-1]
