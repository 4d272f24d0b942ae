"""Linear maps on positions: windows of a convolution, pooling, flattening and mixing of tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory.signal import Signal

Axes = tuple[tuple[int, ...], ...]
"""For every axis of the positions the dimensions of a tensor that it occupies, two in all pairs."""

Operator = Callable[[Tensor, Axes], Tensor]


def positioned(signal: Signal, act: Operator, space: tuple[int, ...], *, mixes: bool) -> Signal:
    """Apply a linear operator to both positions of all moments and of the tangent.

        K'[α, α'] = Σ_{β, β'} A[α, β] K[β, β'] A[α', β'],   Θ' likewise

    `mixes` says that variances after it need moments between different positions before it.

    Raises: InputError without positions, and for an operator that mixes where only pairs of one position
    are kept.
    """
    if not signal.space:
        raise InputError('a map on positions needs some; make the signal by positions="same" or "all"')
    if signal.all_pairs:
        return _of_all_pairs(signal, act, space, mixes)
    if mixes:
        raise InputError(
            'pooling and mixing need all pairs of positions; make the signal by positions="all", not "same"'
        )
    axes = tuple((axis,) for axis in range(len(space)))
    cross = act(signal.activation.cross, axes)
    left, right = signal.variances(cross, lambda q: act(q, axes))
    tangent = None if signal.tangent is None else act(signal.tangent, axes)
    return Signal(Gram(cross, left, right), tangent, space)


def _of_all_pairs(signal: Signal, act: Operator, space: tuple[int, ...], mixes: bool) -> Signal:
    k, old = len(space), signal.space
    between = tuple((1 + axis, 2 + k + axis) for axis in range(k))
    inside = tuple((1 + axis, 1 + k + axis) for axis in range(k))
    own = tuple((1 + axis,) for axis in range(k))

    def pairs(moments: Tensor) -> Tensor:
        blocked = act(moments.unflatten(1, (-1, *old)).unflatten(0, (-1, *old)), between)
        return blocked.flatten(1 + k).flatten(0, k)

    def block(moments: Tensor) -> Tensor:
        return act(moments.unflatten(2, old).unflatten(1, old), inside).flatten(1 + k).flatten(1, k)

    cross = pairs(signal.activation.cross)
    tangent = None if signal.tangent is None else pairs(signal.tangent)
    within = None if signal.symmetric else tuple(block(moments) for moments in signal.blocks)
    if mixes and within is not None:
        left, right = (moments.diagonal(dim1=1, dim2=2).flatten() for moments in within)
    else:
        left, right = signal.variances(cross, lambda q: act(q.unflatten(0, (-1, *old)), own).flatten())
    return Signal(Gram(cross, left, right), tangent, space, within)  # pyright: ignore[reportArgumentType]


def windowed(signal: Signal, size: tuple[int, ...], padding: str, stride: int) -> Signal:
    """Average both positions over the same offsets β of a window.

        K'[α, α'] = (1/|window|) Σ_β K[s α + β, s α' + β],   Θ' likewise

    Raises: InputError unless the window has as many axes as the positions.
    """
    _same_axes(signal, size)

    def act(moments: Tensor, axes: Axes) -> Tensor:
        for width, dims in zip(size, axes, strict=True):
            if width > 1:
                moments = _window_sum(moments, width, dims, padding)
            for dim in dims if stride > 1 else ():
                moments = moments[(slice(None),) * dim + (slice(None, None, stride),)]
        return moments / math.prod(size)

    return positioned(signal, act, tuple(-(-length // stride) for length in signal.space), mixes=False)


def _window_sum(moments: Tensor, width: int, dims: tuple[int, ...], padding: str) -> Tensor:
    """Sum over the offsets of one axis, common to its dimensions; an even width reaches further right."""
    length, before = moments.shape[dims[0]], (width - 1) // 2
    total = moments.clone()
    for offset in range(-before, width - before):
        pieces = _pieces(length, offset, padding) if offset else []
        for chosen in product(pieces, repeat=len(dims)):
            target, source = total, moments
            for dim, (start, moved, count) in zip(dims, chosen, strict=True):
                target, source = target.narrow(dim, start, count), source.narrow(dim, moved, count)
            target += source
    return total


def _pieces(length: int, offset: int, padding: str) -> list[tuple[int, int, int]]:
    """Return the ranges (start, start + offset, count) that an offset brings together, wrapped or cut off."""
    if padding == "circular":
        offset %= length
        pieces = [(0, offset, length - offset), (length - offset, 0, offset)]
    else:
        pieces = [(max(0, -offset), max(0, offset), length - abs(offset))]
    return [piece for piece in pieces if piece[2] > 0]


@dataclass(frozen=True)
class AveragePool:
    """Averages over windows that do not overlap.

        K'[α, α'] = |window|^-2 Σ_{β, β'} K[s α + β, s α' + β'],   Θ' likewise, s the size of the window

    Raises: InputError without all pairs of positions, and unless the size divides the positions.
    Holds: exactly.
    """

    size: tuple[int, ...]
    pairwise: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        """Pool."""
        _same_axes(signal, self.size)
        if any(length % width for length, width in zip(signal.space, self.size, strict=True)):
            raise InputError(f"an average pool of {self.size} must divide the positions {signal.space}")
        space = tuple(length // width for length, width in zip(signal.space, self.size, strict=True))
        return positioned(signal, self._pooled, space, mixes=True)

    def _pooled(self, moments: Tensor, axes: Axes) -> Tensor:
        widths = {dim: width for width, dims in zip(self.size, axes, strict=True) for dim in dims}
        for dim, width in sorted(widths.items()):  # outer dimensions first: they are contiguous
            first, *others = moments.unflatten(dim, (-1, width)).unbind(dim + 1)
            moments = sum(others, first)
        return moments / math.prod(widths.values())


@dataclass(frozen=True)
class GlobalPool:
    """The mean over all positions, which are gone afterwards.

        K' = P^-2 Σ_{α, α'} K[α, α'],   Θ' likewise

    Raises: InputError without all pairs of positions.
    Holds: exactly.
    """

    pairwise: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        """Pool."""
        return _without_positions(AveragePool(signal.space)(signal))


@dataclass(frozen=True)
class Flatten:
    """Positions laid out as features; a signal without positions stays as it is.

        K' = P^-1 Σ_α K[α, α],   Θ' likewise

    Holds: exactly.
    """

    pairwise: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        """Flatten."""
        if not signal.space:
            return signal
        k, positions = len(signal.space), math.prod(signal.space)

        def side(q: Tensor) -> Tensor:
            return (
                q.unflatten(0, (-1, positions)).mean(-1) if signal.all_pairs else q.flatten(0, k - 1).mean(0)
            )

        def pair(moments: Tensor) -> Tensor:
            if not signal.all_pairs:
                return moments.flatten(0, k - 1).mean(0)
            blocked = moments.unflatten(1, (-1, positions)).unflatten(0, (-1, positions))
            return blocked.diagonal(dim1=1, dim2=3).mean(-1)

        cross = pair(signal.activation.cross)
        left, right = signal.variances(cross, side)
        return Signal(Gram(cross, left, right), None if signal.tangent is None else pair(signal.tangent))


@dataclass(frozen=True, eq=False)
class Mixing:
    """Tokens mixed by a matrix that does not depend on them, as attention at its start.

        K' = A K Aᵀ for every pair of inputs,   Θ' likewise

    Heads that share a projection are a sum: `Sum(*(Serial(Mixing(A_h), Scale(H^-1/2)) for A_h in heads))`.

    Shapes: matrix (tokens, tokens).
    Raises: InputError unless the signal has all pairs of as many tokens.
    Holds: exactly for a fixed A; for attention as width → ∞, where its logits concentrate.
    Source: He et al. 2023, arXiv 2302.10322.
    """

    matrix: Float[Tensor, "tokens tokens"]
    pairwise: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        """Mix."""
        if signal.space and signal.space != tuple(self.matrix.shape[:1]):
            raise InputError(
                f"a mixing of {self.matrix.shape[0]} tokens cannot act on positions {signal.space}"
            )
        return positioned(signal, self._mixed, signal.space, mixes=True)

    def _mixed(self, moments: Tensor, axes: Axes) -> Tensor:
        matrix = self.matrix.to(moments)
        for dim in axes[0]:
            moments = torch.movedim(torch.movedim(moments, dim, -1) @ matrix.mT, -1, dim)
        return moments


def _same_axes(signal: Signal, size: tuple[int, ...]) -> None:
    if not signal.space:
        raise InputError('a map on positions needs some; make the signal by positions="same" or "all"')
    if len(size) != len(signal.space):
        raise InputError(f"a window of size {size} cannot act on positions {signal.space}")


def _without_positions(signal: Signal) -> Signal:
    """Drop positions of which a single one is left."""
    return Signal(signal.activation, signal.tangent)
