"""The neural tangent kernel as a matrix that is never formed: products, solutions, extreme eigenvalues."""

import math
from collections.abc import Collection

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gramian.bayes.ntk_structure import check_both, check_rows_apart, two_rows
from gramian.core.jacobian import ROWS, Weights, function, jvp, scales, vjp
from gramian.errors import InputError


class NTKOperator:
    """The kernel of two sets of rows, or of one with itself, as a matrix that is only multiplied by.

        Θ v = J_x diag(s) J_yᵀ v

    A product is one pass in reverse and one in forward mode, `rows` rows at a time; nothing of the size of
    the kernel or of a Jacobian is held. `weights` and `parameters` are those of `ntk`.

    Shapes: x (n, …), y (m, …); a matrix (n O, m O) whose rows are those of x, output by output.
    Raises: InputError as `ntk`.
    Holds: exactly.
    Source: Novak, Sohl-Dickstein, Schoenholz 2022, arXiv 2206.08720, section 3.2.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Shaped[Tensor, " n *size"],
        y: Shaped[Tensor, " m *other"] | None = None,
        *,
        weights: Weights | None = None,
        parameters: Collection[str] | None = None,
        rows: int = ROWS,
    ) -> None:
        self.x, self.y, self.rows = x, x if y is None else y, rows
        self.symmetric = y is None
        check_both(self.x, self.y)
        if rows < 1:
            raise InputError(f"at least one row has to go through the module at once, got {rows}")
        self.f = function(module, parameters)
        self.scale = scales(self.f, weights)
        with torch.no_grad():
            alone = self.f(self.f.parameters, x[:1])
            check_rows_apart(alone, self.f(self.f.parameters, two_rows(self.x, self.y)))
        self.outputs = alone.shape[1]
        self.like = alone

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return len(self.x) * self.outputs, len(self.y) * self.outputs

    def __matmul__(self, vectors: Float[Tensor, "columns ..."]) -> Float[Tensor, "rows ..."]:
        """Multiply a vector, or every column of a matrix.

        Shapes: (m O) -> (n O), or (m O, k) -> (n O, k).
        Raises: InputError for vectors of another length.
        """
        if vectors.ndim not in (1, 2) or len(vectors) != self.shape[1]:
            raise InputError(
                f"the operator multiplies vectors of length {self.shape[1]}, got shape {tuple(vectors.shape)}"
            )
        columns = vectors.to(self.like).reshape(len(vectors), -1)
        products = torch.stack([self._product(column) for column in columns.unbind(1)], 1)
        return products.reshape(len(products), *vectors.shape[1:])

    def _product(self, vector: Tensor) -> Tensor:
        pulled = vjp(self.f, self.y, vector.view(-1, self.outputs), self.rows)
        tangent = {name: gradient * self.scale[name] for name, gradient in pulled.items()}
        return jvp(self.f, self.x, tangent, self.rows).flatten()

    def solve(
        self,
        targets: Float[Tensor, "rows ..."],
        noise_variance: float,
        *,
        tolerance: float = 1e-6,
        iterations: int = 1000,
    ) -> Float[Tensor, "rows ..."]:
        """Solve (Θ + σ² I) v = y by conjugate gradients, every column of the targets on its own.

        An iteration is one product with each column; about √((λ_max + σ²)/(λ_min + σ²)) · ln(2/tolerance)/2
        of them are needed at most.

        Shapes: (n O) or (n O, k) -> the same.
        Raises: InputError for two different sets of rows, σ² ≤ 0, targets of another length or not finite,
            and when the residual |y − (Θ + σ² I) v| is still above tolerance · |y| after the last iteration.
        Holds: to the tolerance.
        Source: Hestenes, Stiefel 1952, J. Res. Nat. Bur. Standards 49.
        """
        self._check_square()
        if not 0 < noise_variance < math.inf:
            raise InputError(f"the noise variance must be positive and finite, got {noise_variance:g}")
        if len(targets) != self.shape[0] or not targets.isfinite().all():
            raise InputError(f"targets must be {self.shape[0]} finite numbers, or columns of as many")
        b = targets.to(self.like).reshape(len(targets), -1)
        limit = tolerance * b.norm(dim=0)
        v, residual = torch.zeros_like(b), b.clone()
        direction, squared = residual.clone(), residual.square().sum(0)
        for _ in range(iterations):
            if (squared.sqrt() <= limit).all():
                return v.reshape(targets.shape)
            product = self @ direction + noise_variance * direction
            step = _ratio(squared, (direction * product).sum(0))
            v, residual = v + step * direction, residual - step * product
            previous, squared = squared, residual.square().sum(0)
            direction = residual + _ratio(squared, previous) * direction
        if (squared.sqrt() <= limit).all():
            return v.reshape(targets.shape)
        worst = float((squared.sqrt() / b.norm(dim=0)).max())
        raise InputError(
            f"conjugate gradients left a relative residual of {worst:.2g} after {iterations} iterations; "
            "raise the noise, the tolerance or the iterations, or use float64"
        )

    def extreme_eigenvalues(self, steps: int = 40, seed: int = 0) -> tuple[float, float]:
        """Estimate the smallest and the largest eigenvalue by Lanczos' iteration from a random start.

        Both estimates lie between the true ones, and the largest is close first; with as many steps as there
        are distinct eigenvalues both are exact.

        Raises: InputError for two different sets of rows, or fewer than one step.
        Holds: as steps → n O, exactly.
        Source: Lanczos 1950, J. Res. Nat. Bur. Standards 45; here with full reorthogonalisation.
        """
        self._check_square()
        if steps < 1:
            raise InputError(f"Lanczos' iteration needs at least one step, got {steps}")
        generator = torch.Generator(self.like.device).manual_seed(seed)
        start = torch.randn(
            self.shape[0], generator=generator, dtype=self.like.dtype, device=self.like.device
        )
        basis, diagonal, beside = [start / start.norm()], [], []
        for _ in range(min(steps, self.shape[0])):
            vector = self @ basis[-1]
            diagonal.append(vector @ basis[-1])
            before = torch.stack(basis, 1)
            for _ in range(2):  # once leaves a rounding error that grows
                vector = vector - before @ (before.mT @ vector)
            size = vector.norm()
            if size <= 100 * torch.finfo(vector.dtype).eps * max(abs(entry) for entry in diagonal):
                break  # the space that is spanned is invariant
            beside.append(size)
            basis.append(vector / size)
        off = torch.stack(beside[: len(diagonal) - 1]) if len(diagonal) > 1 else self.like.new_zeros(0)
        matrix = torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1)
        values = torch.linalg.eigvalsh(matrix)
        return float(values[0]), float(values[-1])

    def _check_square(self) -> None:
        if not self.symmetric:
            raise InputError(
                "only the kernel of one set of rows with itself can be inverted or has eigenvalues"
            )


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a/b, and 0 where a is: a column that is solved stays as it is."""
    return torch.where(a > 0, a / b.clamp(min=torch.finfo(b.dtype).tiny), 0)
