"""Jacobians of single layers in the form that their Gram matrix is cheapest in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Pairing:
    """Which outputs of two rows meet: what is kept of Θ_{no,mp}.

    `cross` is the product of the features of all rows with all others, `met` the same where the others
    have been multiplied for each row already, `same` that of every row with itself; `axes` are those of
    the rows in the result.
    """

    cross: str
    met: str
    same: str
    axes: tuple[int, int]
    flip: tuple[int, ...]
    """How the axes of the result turn when the two sets of rows change places."""

    def shape(self, n: int, m: int, outputs: int) -> tuple[int, ...]:
        """Return the shape of the kernel of n rows against m."""
        sizes = {"n": n, "m": m, "o": outputs, "p": outputs}
        return tuple(sizes[axis] for axis in self.cross.split("->")[1])

    def products(self, outputs: int) -> int:
        """Count the products of features that two rows need."""
        return outputs * outputs if "p" in self.cross else outputs

    def part(self, kernel: Tensor, i: int, rows: int, j: int, others: int) -> Tensor:
        """Return the part of a kernel of some rows from i on against others from j on."""
        return kernel.narrow(self.axes[0], i, rows).narrow(self.axes[1], j, others)

    def spread(self, rows: Tensor) -> Tensor:
        """Return a matrix over pairs of rows with the axes of the result."""
        size = [1] * len(self.flip)
        size[self.axes[0]], size[self.axes[1]] = rows.shape
        return rows.reshape(size)


PAIRINGS = {
    "full": Pairing("nof,mpf->nomp", "nof,mpnf->nomp", "nof,npf->nop", (0, 2), (2, 3, 0, 1)),
    "diagonal": Pairing("nof,mof->onm", "nof,monf->onm", "nof,nof->no", (1, 2), (0, 2, 1)),
    "trace": Pairing("nof,mof->nm", "nof,monf->nm", "nof,nof->n", (0, 1), (1, 0)),
}
"""full: all pairs of outputs, (n, O, m, O); diagonal: every output with itself, (O, n, m); trace: its sum."""


@dataclass(frozen=True)
class Window:
    """The patches that a convolution reads."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    """Before and behind each axis, the last axis first."""
    groups: int

    @classmethod
    def of(cls, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int) -> "Window":
        """Read the arguments of torch's convolutions."""
        count = len(kernel)
        stride, dilation = _each(stride, count), _each(dilation, count)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(p, p) for p in _each(0 if padding == "valid" else padding, count)]
        flat = tuple(side for pair in reversed(sides) for side in pair)
        return cls(tuple(kernel), stride, dilation, flat, groups)

    def patches(self, x: Float[Tensor, "n channels *size"]) -> Float[Tensor, "n channels *all"]:
        """Return a view of what each tap of the kernel sees, (n, channels, *kernel, *positions)."""
        x, count = pad(x, self.padding), len(self.kernel)
        for axis, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        axes = range(2, 2 + 2 * count)
        return x.permute(0, 1, *axes[count:], *axes[:count])


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


@dataclass(frozen=True, eq=False)
class Explicit:
    """Rows of a Jacobian as they are.

        Θ = J J'ᵀ

    Shapes: jacobian (n, O, F).
    Holds: exactly.
    """

    jacobian: Float[Tensor, "n o f"]

    def rows(self, which: slice) -> "Explicit":
        """Return the features of some rows."""
        return Explicit(self.jacobian[which])

    def against(self, other: "Explicit", pairing: Pairing) -> Tensor:
        """Return the kernel of all rows against all others."""
        return torch.einsum(pairing.cross, self.jacobian, other.jacobian)

    def same(self, pairing: Pairing) -> Tensor:
        """Return the kernel of every row with itself."""
        return torch.einsum(pairing.same, self.jacobian, self.jacobian)

    def workspace(self, others: int, pairing: Pairing) -> int:
        """Count the numbers that one row needs against others beside the kernel."""
        return others * pairing.products(self.jacobian.shape[1])


@dataclass(frozen=True, eq=False)
class Kronecker:
    """Rows of a Jacobian as sums over positions of products of inputs and cotangents.

        J_no = Σ_s g_nos ⊗ a_ns,   Θ_{no,mp} = Σ_st (a_ns·a'_mt)(g_nos·g'_mpt)

    Inputs that are indices stand for unit vectors: their products are 1 where they agree.

    Shapes: inputs (n, S, I) or indices (n, S), cotangents (n, O, S, D).
    Holds: exactly.
    """

    inputs: Tensor
    cotangents: Float[Tensor, "n o s d"]

    def rows(self, which: slice) -> "Kronecker":
        """Return the features of some rows."""
        return Kronecker(self.inputs[which], self.cotangents[which])

    def against(self, other: "Kronecker", pairing: Pairing) -> Tensor:
        """Return the kernel of all rows against all others."""
        if self.inputs.shape[1] == 1:
            product = torch.einsum(pairing.cross, self.cotangents[:, :, 0], other.cotangents[:, :, 0])
            return product.mul_(pairing.spread(self._products(other)[:, :, 0, 0]))
        n, positions = self.inputs.shape[:2]
        met = self._products(other).permute(1, 0, 2, 3).flatten(1, 2)[:, None] @ other.cotangents
        # (m, P, n, S D): no copy, as the next product reads it
        met = met.unflatten(2, (n, positions)).flatten(3)
        return torch.einsum(pairing.met, self.cotangents.flatten(2), met)

    def same(self, pairing: Pairing) -> Tensor:
        """Return the kernel of every row with itself."""
        if self.inputs.is_floating_point():
            products = self.inputs @ self.inputs.mT
        else:
            products = (self.inputs[:, :, None] == self.inputs[:, None]).to(self.cotangents.dtype)
        met = torch.einsum("nst,nptd->npsd", products, self.cotangents)
        return torch.einsum(pairing.same, self.cotangents.flatten(2), met.flatten(2))

    def workspace(self, others: int, pairing: Pairing) -> int:
        """Count the numbers that one row needs against others beside the kernel."""
        outputs, positions, width = self.cotangents.shape[1:]
        result = others * pairing.products(outputs)
        if positions == 1:
            return result + others
        return result + others * (positions**2 + 2 * outputs * positions * width)

    def _products(self, other: "Kronecker") -> Tensor:
        """Return the products of inputs, (n, m, S, S')."""
        if not self.inputs.is_floating_point():
            equal = self.inputs[:, None, :, None] == other.inputs[None, :, None]
            return equal.to(self.cotangents.dtype)
        (n, s), (m, t) = self.inputs.shape[:2], other.inputs.shape[:2]
        flat = self.inputs.flatten(0, 1) @ other.inputs.flatten(0, 1).mT
        return flat.view(n, s, m, t).transpose(1, 2)


Features = Explicit | Kronecker


@dataclass(frozen=True)
class Work:
    """How many pairs of rows a kernel has, of how many rows features are made, and what is kept of a pair."""

    pairs: int
    rows: int
    outputs: int
    products: int

    def by_positions(self, positions: int, inputs: int, width: int) -> int:
        """Count the multiplications of a layer whose cotangents and inputs stay apart.

            pairs · (S² I + S² O D + S P D),   or pairs · (I + P D) at S = 1

        S positions, I inputs and D cotangents at each; O outputs, P products of outputs of a pair.
        """
        if positions == 1:
            return self.pairs * (inputs + self.products * width)
        met = positions * (inputs + self.outputs * width)
        return self.pairs * positions * (met + self.products * width)

    def multiplied_out(self, positions: int, inputs: int, width: int) -> int:
        """Count the multiplications of a layer whose Jacobian is multiplied out first.

        pairs · P D I + rows · O S D I
        """
        size = width * inputs
        return self.pairs * self.products * size + self.rows * self.outputs * positions * size
