"""The projector of computed tomography: line integrals along a scan's rays, and its exact adjoint."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.linear_map import Map, mapped
from gramian.errors import InputError
from gramian.imaging.discretisation import MODELS, Model
from gramian.imaging.geometry import Beam
from gramian.imaging.kept import kept_matrix
from gramian.imaging.symmetry import Symmetry, fold

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import LinearOperator

COLUMNS = 32
"""Images, in all their poses, that are multiplied at once: more only takes memory."""


class LinearMap(Protocol):
    """Anything with a linear map A and its adjoint: this projector, or a physics of deepinv."""

    def A(self, x: Any) -> Any:  # noqa: N802
        """Return the measurements of images."""
        ...

    def A_adjoint(self, y: Any) -> Any:  # noqa: N802
        """Return the adjoint's images of measurements."""
        ...


class TensorMap(ABC):
    """A linear map of the last two axes of tensors: of images to sinograms.

    It can be differentiated any number of times, forwards and backwards, and goes through `torch.func.vmap`.
    """

    image_shape: tuple[int, int]
    """Rows and columns."""
    sinogram_shape: tuple[int, int]
    """Views and detectors."""

    def A(self, x: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch views detectors"]:  # noqa: N802
        """Project images.

        Raises: InputError for another size of image, and a dtype that would be rounded.
        """
        return mapped(self._given(x, self.image_shape, "images"), self._forward, self._backward)

    def A_adjoint(  # noqa: N802
        self, y: Float[Tensor, "*batch views detectors"]
    ) -> Float[Tensor, "*batch rows columns"]:
        """Apply the transpose of `A`: the unfiltered backprojection.

        Raises: InputError for another size of sinogram, and a dtype that would be rounded.
        """
        return mapped(self._given(y, self.sinogram_shape, "sinograms"), self._backward, self._forward)

    __call__ = A

    def _given(self, x: Tensor, shape: tuple[int, int], name: str) -> Tensor:
        if x.shape[-2:] != shape:
            found = " × ".join(map(str, x.shape)) or "one number"
            raise InputError(f"{name} of this scan are (…, {shape[0]}, {shape[1]}), got {found}")
        return x

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _backward(self, y: Tensor) -> Tensor: ...


class Projector(TensorMap):
    """Line integrals in millimetres of images along the rays of a scan.

        (A x)_{view, detector} = scale · Σ_pixel weight · x_pixel,   ⟨A x, y⟩ = ⟨x, Aᵀ y⟩

    The matrix and its transpose are held, of those views alone from which the others follow by turns and
    mirrors of the image. On a CPU the product is MKL's, and SciPy's where torch was built without it.

    Args:
        geometry: where the rays run.
        model: `linear` (Joseph's; `joseph` is the same), `area` (mean over a detector's width) or `rotation`
            (rotate-and-sum); see `imaging/discretisation.py`.
        dtype: float32 or float64, of weights and results.
        device: where the matrix is held.
        scale: factor of the integrals, as 1/(detectors·spacing_mm) for the mean of rotate-and-sum codes.
        symmetry: `all`, only quarter `turns`, or `none`.
        cache: folder in which matrices are kept and looked for; a damaged file is built anew.

    Raises: InputError for an unknown model or symmetry, and another dtype.
    Holds: exactly: the adjoint is the transpose, whatever the discretisation.
    """

    def __init__(
        self,
        geometry: Beam,
        model: Model = "linear",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scale: float = 1.0,
        symmetry: Symmetry = "all",
        cache: str | Path | None = None,
    ) -> None:
        if model not in MODELS:
            raise InputError(f"unknown discretisation {model!r}: {', '.join(MODELS)} are accepted")
        if symmetry not in ("none", "turns", "all"):
            raise InputError(f"unknown symmetry {symmetry!r}: none, turns and all are accepted")
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"a projector computes in float32 or float64, not in {dtype}")
        self.geometry, self.model, self.dtype, self.scale = geometry, model, dtype, scale
        self.folding = fold(geometry, symmetry)
        held = kept_matrix(self.folding.geometry, model, dtype, cache)
        if scale != 1:
            held.data *= held.data.dtype.type(scale)
        self._install(held, device)

    def _install(self, held: "csr_array", device: torch.device | str) -> None:
        self.image_shape = self.geometry.shape
        self.sinogram_shape = len(self.geometry.theta), self.geometry.detectors
        self._held = held
        self._matrix, self._transpose = _torch(held), _torch(held.T.tocsr())
        self._rows = self.folding.rows()
        self.to(device)

    @property
    def memory(self) -> int:
        """Bytes of the matrix and its transpose."""
        return sum(
            part.numel() * part.element_size()
            for one in (self._matrix, self._transpose)
            for part in (one.values(), one.col_indices(), one.crow_indices())
        )

    def to(self, device: torch.device | str) -> "Projector":
        """Move the matrix to a device."""
        self._matrix, self._transpose = self._matrix.to(device), self._transpose.to(device)
        self._rows = self._rows.to(device)
        self.device = self._rows.device
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Projector":
        """Return a projector on the same matrix, so that modules that hold one can be copied."""
        return copy(self)

    def subset(self, views: Sequence[int]) -> "Projector":
        """Return the projector of some views, by their numbers: its matrix is a part of this one.

        Raises: InputError for no views, and numbers beyond them.
        Holds: exactly.
        """
        count = self.sinogram_shape[0]
        if not len(views) or not all(0 <= v < count for v in views):
            raise InputError(f"a subset takes some of the views 0 to {count - 1}, got {list(views)}")
        part = copy(self)
        part.geometry = replace(self.geometry, angles=[self.geometry.angles[v] for v in views])
        part.folding, kept = self.folding.subset(views)
        detectors = np.arange(self.geometry.detectors)
        rows = (np.array(kept)[:, None] * self.geometry.detectors + detectors).ravel()
        part._install(self._held[rows], self.device)
        return part

    def as_linear_operator(self) -> "LinearOperator":
        """Return the map of flattened images to flattened sinograms for SciPy's solvers."""
        from scipy.sparse.linalg import LinearOperator

        sizes = math.prod(self.sinogram_shape), math.prod(self.image_shape)

        def flat(apply: Map, shape: tuple[int, int], columns: np.ndarray) -> np.ndarray:
            given = torch.as_tensor(np.ascontiguousarray(columns.T), dtype=self.dtype, device=self.device)
            return apply(given.unflatten(-1, shape)).flatten(-2).cpu().numpy().T

        def forward(columns: np.ndarray) -> np.ndarray:
            return flat(self.A, self.image_shape, columns)

        def backward(columns: np.ndarray) -> np.ndarray:
            return flat(self.A_adjoint, self.sinogram_shape, columns)

        maps = {"matvec": forward, "matmat": forward, "rmatvec": backward, "rmatmat": backward}
        make: Any = LinearOperator  # its type knows only the constructor of subclasses
        return make(sizes, dtype=_number(self.dtype), **maps)

    def _given(self, x: Tensor, shape: tuple[int, int], name: str) -> Tensor:
        if torch.promote_types(x.dtype, self.dtype) != self.dtype:
            raise InputError(f"a projector of {self.dtype} would round {name} of {x.dtype}: build it in that")
        if x.device != self.device:
            raise InputError(f"this projector is on {self.device} and {name} on {x.device}: move one of them")
        return super()._given(x, shape, name).to(self.dtype)

    def _forward(self, x: Tensor) -> Tensor:
        return _in_parts(x, COLUMNS // len(self.folding.poses), self._project, self.sinogram_shape)

    def _backward(self, y: Tensor) -> Tensor:
        return _in_parts(y, COLUMNS // len(self.folding.poses), self._backproject, self.image_shape)

    def _project(self, x: Tensor) -> Tensor:
        """Multiply all poses of images (n, rows, columns) at once, and choose the views among the results."""
        posed = torch.stack([pose.of(x).permute(1, 2, 0) for pose in self.folding.poses], 2)
        views = _multiply(self._matrix, posed.flatten(0, 1).flatten(1)).view(-1, len(x))
        return views.index_select(0, self._rows).T.unflatten(-1, self.sinogram_shape)

    def _backproject(self, y: Tensor) -> Tensor:
        """Apply the transpose of each step of `_project`, in reverse."""
        poses = self.folding.poses
        columns = len(poses) * len(y)
        views = y.new_zeros(self._matrix.shape[0] * len(poses), len(y))
        views.index_add_(0, self._rows, y.flatten(1).T.contiguous())
        posed = _multiply(self._transpose, views.view(-1, columns))
        images = posed.view(*self.image_shape, len(poses), len(y)).unbind(2)
        total = torch.zeros(len(y), *self.image_shape, dtype=y.dtype, device=y.device)
        for pose, image in zip(poses, images, strict=True):
            total += pose.undo(image.permute(2, 0, 1))
        return total


def projector_of(
    given: "LinearMap | LinearOperator",
    image_shape: tuple[int, int] | None = None,
    sinogram_shape: tuple[int, int] | None = None,
) -> LinearMap:
    """Return a linear map with `A` and `A_adjoint`, made of whatever a user has.

    Objects that have both, such as a `Projector` or a physics of deepinv, come back as they are. SciPy's
    LinearOperator is put on tensors (…, rows, columns) -> (…, views, detectors), with derivatives.

    Args:
        given: the map.
        image_shape: rows and columns, for a LinearOperator; a square by default.
        sinogram_shape: views and detectors, for a LinearOperator; one view by default.

    Raises: InputError for anything else, and shapes that do not fit the operator.
    Holds: exactly.
    """
    from scipy.sparse.linalg import LinearOperator

    if callable(getattr(given, "A", None)) and callable(getattr(given, "A_adjoint", None)):
        return given  # type: ignore[return-value]
    if not isinstance(given, LinearOperator):
        raise InputError(
            f"a projector has A and A_adjoint, or is a scipy LinearOperator; got {type(given).__name__}"
        )
    return _Borrowed(given, image_shape, sinogram_shape)


class _Borrowed(TensorMap):
    """A scipy LinearOperator on tensors."""

    def __init__(
        self, operator: "LinearOperator", image: tuple[int, int] | None, sinogram: tuple[int, int] | None
    ) -> None:
        rows, columns = operator.shape
        side = round(columns**0.5)
        self.operator = operator
        self.image_shape, self.sinogram_shape = image or (side, side), sinogram or (1, rows)
        sizes = ("images", self.image_shape, columns), ("sinograms", self.sinogram_shape, rows)
        for name, (first, second), size in sizes:
            if first * second != size:
                raise InputError(f"{name} of this operator have {size} entries, not {first} × {second}")

    def _forward(self, x: Tensor) -> Tensor:
        return self._apply(self.operator.matmat, x, self.sinogram_shape)

    def _backward(self, y: Tensor) -> Tensor:
        return self._apply(self.operator.rmatmat, y, self.image_shape)

    def _apply(
        self, product: Callable[[np.ndarray], np.ndarray], x: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        columns = x.detach().reshape(-1, x.shape[-2] * x.shape[-1]).T
        found = torch.from_numpy(np.ascontiguousarray(product(columns.cpu().numpy()).T))
        return found.to(x).reshape(*x.shape[:-2], *shape)


def _in_parts(x: Tensor, count: int, apply: Map, shape: tuple[int, int]) -> Tensor:
    """Apply a map of (n, …) to the last two axes, to some at a time."""
    flat = x.detach().reshape(-1, *x.shape[-2:]) if x.numel() else x.new_zeros(0, *x.shape[-2:])
    found = [apply(part) for part in flat.split(count) if len(part)]
    return torch.cat([*found, x.new_zeros(0, *shape)]).reshape(*x.shape[:-2], *shape)


def _multiply(matrix: Tensor, columns: Tensor) -> Tensor:
    """Multiply a sparse matrix with a dense one, in their own type even where autocast would round."""
    if matrix.is_cuda or torch.backends.mkl.is_available():
        with torch.autocast(matrix.device.type, enabled=False):
            return matrix @ columns if columns.shape[1] > 1 else (matrix @ columns[:, 0])[:, None]
    parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    from scipy.sparse import csr_array

    return torch.from_numpy(csr_array(tuple(map(Tensor.numpy, parts)), shape=matrix.shape) @ columns.numpy())


def _torch(rows: "csr_array") -> Tensor:
    """Return the same matrix, on the same memory, as torch's."""
    parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        return torch.sparse_csr_tensor(*parts, size=rows.shape, check_invariants=False)


def _number(dtype: torch.dtype) -> type[np.floating[Any]]:
    return np.float32 if dtype == torch.float32 else np.float64
