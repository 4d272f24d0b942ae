"""What a ray takes from each pixel: the sparse matrix of a scan, built view by view without loops over rays.

    (A f)_{view, detector} = Σ_pixel weight · f_pixel,  weights in mm

Three discretisations: `linear` (Joseph's method, also called so), `area` (strips as wide as a detector), and
`rotation` (sums over the rows of the turned image).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.geometry import Beam, ParallelBeam

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Model = Literal["linear", "joseph", "area", "rotation"]

View = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Weights, pixels and the number of entries of each detector: the rows of one view."""

MOST = 2**31 - 1
"""Entries that 32-bit indices can count."""


def matrix(geometry: Beam, model: Model = "linear", dtype: torch.dtype = torch.float32) -> "csr_array":
    """Return the matrix (views·detectors, rows·columns) of a scan.

    Weights are computed in float64 and rounded once.

    Raises: InputError for an unknown model, `rotation` with a fan beam, and 2³¹ entries or more.
    Holds: exactly, for the discretisation that is chosen.
    """
    from scipy.sparse import csr_array  # a second to import, so only where it is used

    if model not in MODELS:
        raise InputError(f"unknown discretisation {model!r}: {', '.join(MODELS)} are accepted")
    number = np.float32 if dtype == torch.float32 else np.float64
    weights, pixels, counts = [], [], []
    for weight, pixel, count in MODELS[model](geometry):
        if len(weight) * len(geometry.angles) > MOST:
            raise InputError(
                f"a matrix of {len(weight):,} entries a view and {len(geometry.angles)} views is beyond 2³¹ "
                f"entries: fewer views or larger pixels are accepted"
            )
        weights.append(weight.astype(number))
        pixels.append(pixel.astype(np.int32, copy=False))
        counts.append(count)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
    rows, columns = geometry.shape
    shape = (len(geometry.angles) * geometry.detectors, rows * columns)
    return csr_array((_joined(weights), _joined(pixels), starts), shape=shape)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate arrays, and give back the memory of each as it is copied."""
    whole = np.empty(sum(map(len, parts)), parts[0].dtype)
    stop = len(whole)
    while parts:
        part = parts.pop()
        whole[stop - len(part) : stop] = part
        stop -= len(part)
    return whole


def linear(geometry: Beam) -> Iterator[View]:
    """Yield views by linear interpolation where a ray crosses the rows, or columns, of the image.

        p = Σ_i ℓ·((1 − w_i) f_{i,⌊c_i⌋} + w_i f_{i,⌊c_i⌋+1}),  w_i = c_i − ⌊c_i⌋,  ℓ = pixel_mm/|d_y|

    c_i is the column at which the ray crosses row i; rays closer to the x axis are taken by columns instead.
    Outside the image f is 0.

    Source: Joseph 1982, IEEE Transactions on Medical Imaging 1, 192.
    """
    rows, columns = geometry.shape
    step = np.arange(max(rows, columns), dtype=np.int32)
    for points, directions in zip(*map(Tensor.numpy, geometry.rays()), strict=True):
        flat = np.abs(directions[:, 0]) > np.abs(directions[:, 1])  # these rays cross every column
        along = np.where(flat, 0, 1)
        ray = np.arange(len(flat))
        main, minor = directions[ray, along], directions[ray, 1 - along]
        lengths = np.array([columns, rows])[along]  # steps along the ray
        widths = np.array([columns, rows])[1 - along]
        slope = minor / main
        start = points[ray, 1 - along] - points[ray, along] * slope  # where the ray crosses the middle
        start = start / geometry.pixel_mm + (widths - 1) / 2 - (lengths - 1) / 2 * slope
        at = start[:, None] + step * slope[:, None]
        low = np.floor(at)
        upper = at - low
        low = low.astype(np.int32)
        inside = step < lengths[:, None]
        strides = np.where(flat, 1, columns)[:, None], np.where(flat, columns, 1)[:, None]
        pixel = step * strides[0] + low * strides[1]
        kept = np.empty((*low.shape, 2), bool)
        kept[..., 0] = inside & (low >= 0) & (low < widths[:, None])
        kept[..., 1] = inside & (low >= -1) & (low < widths[:, None] - 1)
        weight = np.stack((1 - upper, upper), -1)
        weight *= (geometry.pixel_mm / np.abs(main))[:, None, None]
        pixel = np.stack((pixel, pixel + strides[1]), -1)
        yield weight[kept], pixel[kept], kept.sum((1, 2))


def area(geometry: Beam) -> Iterator[View]:
    """Yield views by the mean over each detector of the line integrals of square pixels.

        weight = (1/w) ∫_{s−w/2}^{s+w/2} shadow(u) du

    The shadow of a pixel is a trapezoid between its four corners as the detector sees them, as high as the
    longest chord of its central ray. For a parallel beam that is the overlap of a pixel with a strip, over
    the strip's width w; for a fan beam the rays through one pixel are taken to be parallel.

    Source: Long, Fessler, Balter 2010, IEEE Transactions on Medical Imaging 29, 1839 (separable footprints).
    """
    from scipy.sparse import csc_array

    x, y = (at.flatten() for at in geometry.pixels())
    width, half = geometry.spacing_mm, geometry.pixel_mm / 2
    first = float(geometry.offsets[0]) - width / 2  # the first detector's lower edge
    for angle in geometry.theta.tolist():
        corners = [geometry.footprint(x + i, y + j, angle)[0] for i in (-half, half) for j in (-half, half)]
        corners = torch.stack(corners).sort(0).values.numpy()
        ray = (geometry.footprint(x, y, angle)[1] - angle).numpy()  # its direction is (sin, cos)
        height = geometry.pixel_mm / np.maximum(np.abs(np.sin(ray)), np.abs(np.cos(ray)))
        low = np.floor((corners[0] - first) / width).astype(np.int32)
        count = int(np.max(np.floor((corners[3] - first) / width) - low)) + 1
        detector = low[:, None] + np.arange(count, dtype=np.int32)
        edges = first + width * (low + np.arange(count + 1)[:, None])
        weight = np.diff(_shadow(edges, corners), axis=0).T * (height / width)[:, None]
        kept = (detector >= 0) & (detector < geometry.detectors) & (weight > 0)
        starts = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
        columns = (weight[kept], detector[kept], starts)
        view = csc_array(columns, shape=(geometry.detectors, len(x))).tocsr()
        yield view.data, view.indices, np.diff(view.indptr)


def _shadow(u: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Integrate up to u the trapezoid of height 1 that rises, stays and falls between four corners."""
    a, b, c, d = corners
    tiny = np.finfo(float).tiny
    rise = np.square(np.clip(u, a, b) - a) / (2 * np.maximum(b - a, tiny))
    fall = np.square(d - np.clip(u, c, d)) / (2 * np.maximum(d - c, tiny))
    return rise + (np.clip(u, b, c) - b) + ((d - c) / 2 - fall)


def rotation(geometry: Beam) -> Iterator[View]:
    """Yield views by sums over the rows of the image that is turned by bilinear interpolation.

        p(θ, s) = spacing_mm Σ_t f(c + s e + t d),  t on the same grid as s without its offset

    As many samples along a ray as there are detectors: fewer of them than `padded` cut the corners off. This
    is the convention of rotate-and-sum codes, which take the mean: a `scale` of 1/(detectors·spacing_mm).

    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (code).
    """
    if not isinstance(geometry, ParallelBeam):
        raise InputError(
            "the discretisation 'rotation' is one of parallel beams: a fan beam takes linear or area"
        )
    rows, columns = geometry.shape
    along = geometry.offsets.numpy() - geometry.offset_mm
    for points, directions in zip(*map(Tensor.numpy, geometry.rays()), strict=True):
        at = points[:, None] + along[:, None] * directions[:, None]
        at = at / geometry.pixel_mm + (np.array([columns, rows]) - 1) / 2
        low = np.floor(at)
        upper = at - low
        weights, pixels, kept = [], [], []
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            column, row = low[..., 0] + j, low[..., 1] + i
            weight = np.abs(1 - j - upper[..., 0]) * np.abs(1 - i - upper[..., 1])
            weights.append(weight * geometry.spacing_mm)
            pixels.append(row * columns + column)
            kept.append((column >= 0) & (column < columns) & (row >= 0) & (row < rows))
        inside = np.stack(kept, -1)
        yield (
            np.stack(weights, -1)[inside],
            np.stack(pixels, -1)[inside].astype(np.int32),
            inside.sum((1, 2)),
        )


MODELS: dict[str, Callable[[Beam], Iterator[View]]] = {
    "linear": linear,
    "joseph": linear,
    "area": area,
    "rotation": rotation,
}
