"""The kernels of infinitely wide networks (NNGP and NTK together) as a fold of maps over one signal.

NTK parametrisation: weights N(0, 1) times weight_std/√fan_in, biases N(0, 1) times bias_std; Jacobians of the
standard parametrisation weighted by the prior variances give the same kernels. Every map is affine in the
tangent, tangent_out = J(tangent_in) + own, where `own` counts the parameters of the map itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import ClassVar

import torch
from torch import Tensor

from gramian.core.gaussian import Dual
from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory.norms import BatchNorm, Norm
from gramian.theory.positions import AveragePool, Flatten, GlobalPool, Mixing, windowed
from gramian.theory.signal import Signal, signal

__all__ = [
    "Activation",
    "AveragePool",
    "BatchNorm",
    "Convolution",
    "Dense",
    "Flatten",
    "Gated",
    "GlobalPool",
    "Map",
    "Mixing",
    "Norm",
    "Residual",
    "Scale",
    "Serial",
    "Signal",
    "Sum",
    "pairwise",
    "signal",
]

Map = Callable[[Signal], Signal]
"""A layer, a block or a network of infinite width."""


def pairwise(network: Map) -> bool:
    """Tell whether each entry of the outcome depends on its own two inputs alone, so that tiles will do.

    A map says so by an attribute `pairwise`; one that says nothing is taken to need all inputs at once.
    """
    return getattr(network, "pairwise", False)


@dataclass(frozen=True)
class Dense:
    """A fully connected layer, the same at every position.

        K' = σ_w² K + σ_b²,   Θ' = K' + σ_w² Θ

    Raises: InputError unless both deviations are finite and not negative.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Lee et al. 2018, arXiv 1711.00165; Jacot et al. 2018, arXiv 1806.07572.
    """

    weight_std: float
    bias_std: float = 0.0
    pairwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_deviations(self.weight_std, self.bias_std)

    def __call__(self, signal: Signal) -> Signal:
        """Apply the layer."""
        weight, bias = self.weight_std**2, self.bias_std**2

        def moved(k: Tensor) -> Tensor:
            return (weight * k).add_(bias) if bias else weight * k

        out = signal.elementwise(lambda k, a, b: moved(k))
        if signal.tangent is None:
            return out
        return out.with_tangent(torch.add(out.activation.cross, signal.tangent, alpha=weight))


def _check_deviations(*deviations: float) -> None:
    for value in deviations:
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"a standard deviation must be finite and not negative, got {value:g}")


@dataclass(frozen=True)
class Convolution:
    """A convolution over one or more axes of positions.

        K'[α, α'] = σ_b² + σ_w²/|window| Σ_β K[s α + β, s α' + β],   Θ' = K' + σ_w²/|window| Σ_β Θ[…]

    Offsets β run over −(k−1)//2 … k//2 on each axis; `padding` "circular" wraps around, "zeros" leaves out
    what lies beyond the border; s is the stride. Fits signals of the same position and of all pairs.

    Raises: InputError for bad deviations, size, padding or stride, and on positions of other axes.
    Holds: as the number of channels → ∞, error O(channels^-1/2).
    Source: Novak et al. 2019, arXiv 1810.05148; Arora et al. 2019, arXiv 1904.11955.
    """

    size: tuple[int, ...]
    weight_std: float
    bias_std: float = 0.0
    padding: str = "circular"
    stride: int = 1
    pairwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_deviations(self.weight_std, self.bias_std)
        if self.padding not in ("circular", "zeros"):
            raise InputError(f'the padding must be "circular" or "zeros", got {self.padding!r}')
        if self.stride < 1 or not self.size or min(self.size) < 1:
            raise InputError(
                f"a window and its stride must be positive, got size {self.size} and stride {self.stride}"
            )

    def __call__(self, signal: Signal) -> Signal:
        """Apply the layer."""
        averaged = windowed(signal, self.size, self.padding, self.stride)
        return Dense(self.weight_std, self.bias_std)(averaged)


@dataclass(frozen=True)
class Activation:
    """An elementwise function φ of Gaussian pre-activations.

        K' = E[φ(u) φ(v)],   Θ' = E[φ'(u) φ'(v)] Θ,   (u, v) ~ N(0, [[K_xx, K_xy], [K_xy, K_yy]])

    Holds: exactly for Gaussian pre-activations, to the precision of the dual.
    Source: Cho & Saul 2009, "Kernel methods for deep learning"; Daniely et al. 2016, arXiv 1602.05897.
    """

    dual: Dual
    pairwise: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        """Apply the function."""

        def both(k: Tensor, a: Tensor, b: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
            values, slopes = self.dual.both(k, a, b)
            return values, slopes * tangent

        return _nonlinear(signal, self.dual.values, both)


@dataclass(frozen=True)
class Gated:
    """Half of the features, through φ, gate the other half, as in a gated linear unit.

        z = φ(u) ⊙ v with independent u, v:   K' = E[φφ] K,   Θ' = E[φ'φ'] K Θ + E[φφ] Θ

    Holds: exactly for Gaussian pre-activations of independent halves, to the precision of the dual.
    Source: derived; the block is Shazeer 2020, arXiv 2002.05202.
    """

    dual: Dual
    pairwise: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        """Apply the gate."""

        def both(k: Tensor, a: Tensor, b: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
            values, slopes = self.dual.both(k, a, b)
            return values * k, (slopes * k + values) * tangent

        return _nonlinear(signal, lambda k, a, b: self.dual.values(k, a, b) * k, both)


def _nonlinear(
    signal: Signal,
    values: Callable[[Tensor, Tensor, Tensor], Tensor],
    both: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Signal:
    """Carry the moments, and the tangent with those of different inputs, through a function of the pairs."""

    def alone(k: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _unless_overflown(lambda *pair: (values(*pair),), k, a, b)[0]

    g, given = signal.activation, signal.tangent
    pairs = g.cross, g.left[..., :, None], g.right[..., None, :]
    if given is None:
        return signal.elementwise(alone)
    cross, tangent = _unless_overflown(lambda k, a, b: both(k, a, b, given), *pairs)
    return signal.elementwise(alone, cross).with_tangent(tangent)


def _unless_overflown(
    compute: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]], k: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    """Return compute(k, a, b), and infinity where the product of two such variances would overflow.

    A correlation can no longer be told there, and NaN would hide that the network explodes.
    """
    limit = 0.1 * torch.finfo(k.dtype).max ** 0.5
    if a.max() <= limit and b.max() <= limit:
        return compute(k, a, b)
    lost = (a > limit) | (b > limit)
    found = compute(*(torch.where(lost, 1, part) for part in (k, a, b)))
    return tuple(torch.where(lost, torch.inf, part) for part in found)


@dataclass(frozen=True)
class Scale:
    """A constant factor.

        K' = c² K,   Θ' = c² Θ

    Holds: exactly.
    """

    factor: float
    pairwise: ClassVar[bool] = True

    def __call__(self, signal: Signal) -> Signal:
        """Multiply."""
        return combined((self.factor, signal))


@dataclass(frozen=True, init=False)
class Serial:
    """Maps one after the other.

        x -> m_L(… m_1(x))

    Holds: exactly.
    """

    maps: tuple[Map, ...]

    def __init__(self, *maps: Map) -> None:
        object.__setattr__(self, "maps", maps)

    @property
    def pairwise(self) -> bool:
        """Whether all maps act on pairs of inputs."""
        return all(pairwise(part) for part in self.maps)

    def __call__(self, signal: Signal) -> Signal:
        """Apply the maps in turn."""
        return reduce(lambda state, part: part(state), self.maps, signal)


@dataclass(frozen=True)
class Residual:
    """A branch with its skip and its gain.

        K' = skip² K + gain² B(K),   Θ' = skip² Θ + gain² B(Θ)

    B ends in a linear layer with weights of its own, so that it is independent of the stream.

    Raises: InputError where the branch changes the positions.
    Holds: exactly given B, for a branch that ends in a linear layer of zero-mean weights.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """

    branch: Map
    gain: float = 1.0
    skip: float = 1.0

    @property
    def pairwise(self) -> bool:
        """Whether the branch acts on pairs of inputs."""
        return pairwise(self.branch)

    def __call__(self, signal: Signal) -> Signal:
        """Add the skip and the branch."""
        return combined((self.skip, signal), (self.gain, self.branch(signal)))


@dataclass(frozen=True, init=False)
class Sum:
    """Branches side by side on the same input.

        K' = Σ_i B_i(K),   Θ' = Σ_i B_i(Θ)

    Raises: InputError without a branch, and where branches disagree about the positions.
    Holds: exactly given the B_i, when all but one of them end in linear layers of zero-mean weights.
    """

    branches: tuple[Map, ...]

    def __init__(self, *branches: Map) -> None:
        if not branches:
            raise InputError("a sum needs at least one branch")
        object.__setattr__(self, "branches", branches)

    @property
    def pairwise(self) -> bool:
        """Whether all branches act on pairs of inputs."""
        return all(pairwise(branch) for branch in self.branches)

    def __call__(self, signal: Signal) -> Signal:
        """Add the branches."""
        return combined(*((1.0, branch(signal)) for branch in self.branches))


def combined(*parts: tuple[float, Signal]) -> Signal:
    """Return the moments of Σ_i c_i z_i for independent signals z_i: Σ_i c_i² K_i, tangents likewise.

    Raises: InputError where the signals differ in positions or layout.
    """
    first, signals = parts[0][1], [part for _, part in parts]
    shapes = {(part.space, tuple(part.activation.cross.shape)) for part in signals}
    if len(shapes) > 1:
        raise InputError(f"signals to be added must have the same positions, got {sorted(shapes)}")
    weighted = partial(_weighted, [factor**2 for factor, _ in parts])
    cross = weighted([part.activation.cross for part in signals])
    if all(part.symmetric for part in signals):
        left = right = cross.diagonal(dim1=-2, dim2=-1).contiguous()
    else:
        left = weighted([part.activation.left for part in signals])
        right = weighted([part.activation.right for part in signals])
    tangents = [part.tangent for part in signals if part.tangent is not None]
    tangent = weighted(tangents) if len(tangents) == len(parts) else None
    inner = [part.within for part in signals if part.within is not None]
    within = None
    if len(inner) == len(parts):
        x, y = (weighted(blocks) for blocks in zip(*inner, strict=True))
        within = (x, y)
    return Signal(Gram(cross, left, right), tangent, first.space, within)


def _weighted(squares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0] if squares[0] == 1 else squares[0] * tensors[0]
    for square, tensor in zip(squares[1:], tensors[1:], strict=True):
        total = torch.add(total, tensor, alpha=square)
    return total
