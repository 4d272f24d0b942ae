"""Kernels of whole networks, in tiles small enough for the cache."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.theory.maps import Map, pairwise
from gramian.theory.signal import Signal, signal

Corner = tuple[int, int]

VECTORS, IMAGES = 2**15, 2**21
"""Moments to a tile without positions (in a core's cache) and with them (bounded memory)."""


@dataclass(frozen=True, eq=False)
class Kernels:
    """The two kernels of a network of infinite width.

    `nngp` is the prior covariance of its outputs, `ntk` the kernel of its training by gradient descent.

    Shapes: (n, m) each; (n) from `variances`.
    """

    nngp: Float[Tensor, "..."]
    ntk: Float[Tensor, "..."]


def kernels(
    network: Map,
    x: Float[Tensor, "n *space d"],
    y: Float[Tensor, "m *space d"] | None = None,
    *,
    positions: str = "none",
    tile: int | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Kernels:
    """Fold the network's maps over all pairs of inputs, tile by tile; half of them where y is absent.

    The numbers are those of `network(signal(x, y, positions=positions))`. `tile` is the number of moments
    that a tile holds (pairs of inputs × pairs of positions kept; at least one pair of inputs): 2^15 without
    positions, 2^21 with them. Small tiles on a processor run on as many threads as torch may use. A network
    with a map that needs all inputs at once (BatchNorm) is folded in one piece.

    Shapes: x (n, *space, d), y (m, *space, d) -> (n, m).
    Raises: InputError as `signal` does, for a tile below 1, and where the network keeps its positions.
    Holds: as width → ∞, error O(width^-1/2).
    """
    _check(tile)
    columns = x if y is None else y
    side = _side(x, positions, tile) if pairwise(network) else max(len(x), len(columns))

    def kernel(corner: tuple[int, int]) -> Signal:
        i, j = corner
        other = None if y is None and i == j else columns[j : j + side]
        return _read_out(network(signal(x[i : i + side], other, positions=positions, dtype=dtype)))

    corners = list(product(range(0, len(x), side), range(0, len(columns), side)))
    wanted = [(i, j) for i, j in corners if y is not None or i <= j]
    small = x.device.type == "cpu" and positions == "none"
    tiles = dict(zip(wanted, _each(kernel, wanted, torch.get_num_threads() if small else 1), strict=True))
    return Kernels(
        _assembled({corner: tile.activation.cross for corner, tile in tiles.items()}, corners),
        _assembled({corner: _tangent(tile) for corner, tile in tiles.items()}, corners),
    )


def variances(
    network: Map,
    x: Float[Tensor, "n *space d"],
    *,
    positions: str = "none",
    dtype: torch.dtype | None = torch.float64,
) -> Kernels:
    """Fold the network's maps over every input with itself alone: the diagonals of `kernels(network, x)`.

    Shapes: x (n, *space, d) -> (n).
    Raises: InputError as `kernels` does, and for a network that needs all inputs at once.
    Holds: as width → ∞, error O(width^-1/2).
    """
    if not pairwise(network):
        raise InputError("this network needs all inputs at once; take the diagonal of its kernels")
    batches = [x[:, None]] if positions == "none" else list(x[:, None])
    outs = [_read_out(network(signal(batch, positions=positions, dtype=dtype))) for batch in batches]
    nngp = torch.cat([out.activation.cross.flatten() for out in outs])
    return Kernels(nngp, torch.cat([_tangent(out).flatten() for out in outs]))


def _check(tile: int | None) -> None:
    if tile is not None and tile < 1:
        raise InputError(f"a tile holds at least one moment, got {tile}")


def _side(x: Tensor, positions: str, tile: int | None) -> int:
    """Return how many inputs a side of a tile has."""
    kept = math.prod(x.shape[1:-1]) ** {"none": 0, "same": 1, "all": 2}[positions]
    limit = tile or (VECTORS if positions == "none" else IMAGES)
    return max(1, math.isqrt(limit // max(1, kept)))


def _read_out(out: Signal) -> Signal:
    if out.space:
        raise InputError("the network keeps its positions; end it with Flatten() or GlobalPool()")
    return out


def _tangent(out: Signal) -> Tensor:
    if out.tangent is None:
        raise InputError("the network lost the tangent kernel; every map must carry it")
    return out.tangent


def _each(kernel: Callable[[Corner], Signal], corners: Sequence[Corner], threads: int) -> list[Signal]:
    """Compute the tiles, whose operations are too small for torch to share out among threads itself."""
    if threads == 1 or len(corners) == 1:
        return [kernel(corner) for corner in corners]
    grad = torch.is_grad_enabled()  # a new thread would not know

    def alike(corner: Corner) -> Signal:
        with torch.set_grad_enabled(grad):
            return kernel(corner)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(alike, corners))


def _assembled(tiles: Mapping[Corner, Tensor], corners: Sequence[Corner]) -> Tensor:
    """Lay out the tiles; one that is missing is the transpose of its mirror image."""
    rows = {
        i: torch.cat([tiles[i, j] if (i, j) in tiles else tiles[j, i].mT for k, j in corners if k == i], 1)
        for i, _ in corners
    }
    return torch.cat(list(rows.values()))
