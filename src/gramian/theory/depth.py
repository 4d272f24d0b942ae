"""Signals and gradients through depth: traces of any network, and the fixed points of plain ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gaussian import Dual
from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory.limits import homogeneous
from gramian.theory.maps import Map, Scale, Signal, pairwise

NEUTRAL = 1e-9
"""Slopes closer to 1 than this count as 1: no depth scale above 1e9 layers is told from an infinite one."""


def trace(maps: Sequence[Map], signal: Signal) -> list[Signal]:
    """Return the signal after 0, 1, …, L of the maps.

    Holds: as width → ∞, error O(width^-1/2) at every fixed depth.
    """
    signals = [signal]
    for step in maps:
        signals.append(step(signals[-1]))
    return signals


def gradient_profile(maps: Sequence[Map], signal: Signal) -> Float[Tensor, " length"]:
    """Return the expected squared gradient norm at the input of map 1, …, L and at the output.

        G_l = E|Jᵀg|²,  J = ∂y_L/∂y_l,  E|g|² = 1 with g isotropic over features and positions

    The mean over the inputs of the signal; norms are summed over features and positions. It is inf where it
    overflows, and where variances have overflowed before a map behind that feels their scale.

    Shapes: (L + 1,), the last entry 1.
    Raises: InputError unless both sides of the signal are the same inputs.
    Holds: as width → ∞, error O(width^-1/2); Π_k (1 + λ_k² s_k) over the blocks behind for residual networks.
    """
    return log_gradient_profile(maps, signal).exp()


def log_gradient_profile(maps: Sequence[Map], signal: Signal) -> Float[Tensor, " length"]:
    """Return the logarithm of `gradient_profile`, which does not overflow with depth.

    Every map moves the tangent by Θ' = J Θ + own, so that the second moment of a gradient goes back by the
    adjoint of J, one map at a time: no graph through the depth is kept, only the Grams of the trace. Where
    all maps are pairwise, single inputs are followed instead of pairs.

    Shapes: (L + 1,), the last entry 0.
    Raises: InputError unless both sides of the signal are the same inputs.
    Holds: as `gradient_profile`.
    """
    befores, last = _inputs(maps, _single_inputs(maps, _kernel_alone(signal)))
    n, rows = last.activation.cross.shape[-1], last.activation.left.numel()
    gradient = torch.eye(n, dtype=last.activation.cross.dtype, device=last.activation.cross.device)
    gradient = gradient.expand_as(last.activation.cross) / rows
    profile = [gradient.new_zeros(())]
    for step, before in zip(reversed(maps), reversed(befores), strict=True):
        gradient = _pull_back(step, before, gradient)
        norm = gradient.diagonal(dim1=-2, dim2=-1).sum()
        profile.append(profile[-1] + norm.log())
        gradient = gradient / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return torch.stack(profile[::-1]).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _inputs(maps: Sequence[Map], signal: Signal) -> tuple[list[Signal], Signal]:
    """Return what enters every map, and the outcome, scaled down on the way while that changes no slope.

    Duals multiply two variances, which must not overflow. A map that feels the scale, behind a signal that
    was scaled, makes it NaN.
    """
    befores, scaled = [], False
    large = torch.finfo(signal.activation.cross.dtype).max ** (1 / 3)
    for step in maps:
        if signal.activation.left.max() > large:
            signal, scaled = Scale(large**-0.25)(signal), True
        if scaled and not homogeneous(step, signal):
            signal = Scale(math.nan)(signal)
        befores.append(signal)
        signal = step(signal)
    return befores, signal


def _kernel_alone(signal: Signal) -> Signal:
    """Return the detached second moments without their tangent."""
    g = signal.activation
    if g.cross.shape[-2] != g.cross.shape[-1] or not torch.equal(g.left, g.right):
        raise InputError("a gradient profile needs one set of inputs: make the signal of x alone")
    left = g.left.detach()
    return Signal(Gram(g.cross.detach(), left, left), None, signal.space)


def _single_inputs(maps: Sequence[Map], signal: Signal) -> Signal:
    """Return a batch of 1×1 Grams, one an input, where no map looks at pairs of inputs."""
    if signal.space or signal.activation.cross.ndim != 2 or not all(map(pairwise, maps)):
        return signal
    left = signal.activation.left[:, None]
    return Signal(Gram(left[..., None], left, left))


def _pull_back(step: Map, before: Signal, gradient: Tensor) -> Tensor:
    """Apply the adjoint of the linear part of a map's action on the tangent."""
    tangent = torch.zeros_like(before.activation.cross, requires_grad=True)
    with torch.enable_grad():
        after = step(before.with_tangent(tangent)).tangent
    if after is None or not after.requires_grad:
        return torch.zeros_like(tangent)
    return torch.autograd.grad(after, tangent, gradient, materialize_grads=True)[0]


@dataclass(frozen=True)
class FixedPoint:
    """Where a deep plain network takes variances and correlations, and how fast.

        q* = σ_w² E[φ(√q* z)²] + σ_b²,   c* = (σ_w² E[φ(u)φ(v)] + σ_b²)/q*  at correlation c*

    `variance` q* with `variance_slope` dq'/dq; `correlation` c* with `correlation_slope` χ_{c*} = dc'/dc;
    `gradient_slope` χ_1 = σ_w² E[φ'(√q* z)²], the factor of the squared gradient per layer. A slope below 1
    in absolute value makes a fixed point stable.
    """

    variance: float
    variance_slope: float
    correlation: float
    correlation_slope: float
    gradient_slope: float

    @property
    def variance_depth(self) -> float:
        """Layers over which a deviation of the variance shrinks by e: ξ_q = −1/ln|slope|, inf at slope 1."""
        return _depth_scale(self.variance_slope)

    @property
    def correlation_depth(self) -> float:
        """Layers over which a deviation of the correlation shrinks by e: ξ_c = −1/ln χ_{c*}, inf at 1."""
        return _depth_scale(self.correlation_slope)

    @property
    def gradient_depth(self) -> float:
        """Layers over which the squared gradient changes by e, either way: 1/|ln χ_1|, inf at 1."""
        return abs(_depth_scale(self.gradient_slope))

    @property
    def phase(self) -> str:
        """Return "ordered" (χ_1 < 1, gradients vanish), "chaotic" (χ_1 > 1, they explode) or "edge"."""
        if abs(self.gradient_slope - 1) <= NEUTRAL:
            return "edge"
        return "ordered" if self.gradient_slope < 1 else "chaotic"


def fixed_point(dual: Dual, weight_std: float, bias_std: float = 0.0, start: float = 1.0) -> FixedPoint:
    """Find the fixed point that a plain network of dense layers and activations takes a variance to.

        q ← σ_w² E[φ(√q z)²] + σ_b² from q = `start`, next fixed point in the direction of the first step

    Where q* = 0 all outputs collapse onto one another: c* = 1 is reported, with χ_1 for every slope.

    Raises: InputError for deviations that are not a network's, and when the variance grows without bound.
    Holds: as width → ∞, error O(width^-1/2); q* and c* by bisection to float64.
    Source: Poole et al. 2016, arXiv 1606.05340; Schoenholz et al. 2017, arXiv 1611.01232.
    """
    if not (0 < weight_std < math.inf and 0 <= bias_std < math.inf and 0 < start < math.inf):
        raise InputError(
            "a fixed point needs a finite weight_std > 0, bias_std ≥ 0 and start > 0, "
            f"got {weight_std:g}, {bias_std:g} and {start:g}"
        )
    weight, bias = weight_std**2, bias_std**2

    def variance(q: float) -> float:
        return weight * _number(dual.variance, q) + bias

    q = _variance_fixed_point(variance, start, f"weight_std {weight_std:g} and bias_std {bias_std:g}")
    gradient = weight * _number(dual.gain, q)
    if q == 0:
        return FixedPoint(0.0, gradient, 1.0, gradient, gradient)

    def correlation(c: float) -> float:
        return (weight * _number(dual.values, c * q, q, q) + bias) / q

    c = 1.0
    if gradient > 1 + NEUTRAL:  # the map is convex on [0, 1] and passes (1, 1) with slope χ_1
        c = _bisect(lambda c: correlation(c) - c, 0.0, 1.0)
    slope = gradient if c == 1 else weight * _number(dual.slopes, c * q, q, q)
    return FixedPoint(q, weight * _variance_slope(dual, q), c, slope, gradient)


def edge_of_chaos(dual: Dual, bias_std: float = 0.0) -> float:
    """Return the weight_std at which a plain network neither contracts nor spreads nearby inputs.

        χ_1 = σ_w² E[φ'(√q* z)²] = 1,  q* = σ_w² E[φ(√q* z)²] + σ_b²,  q* stable

    The smallest q* that solves both; without bias, and with φ(0) = 0, that is the limit q* → 0 and
    σ_w = 1/√E[φ'(0 z)²] (√2 for ReLU, where every q* is one).

    Raises: InputError for a bias_std that is negative or infinite, and where no weight_std does it: ReLU
        and its kin have no edge with a bias, and at that of GELU and SiLU the variance runs away.
    Holds: as width → ∞, error O(width^-1/2); by bisection to float64.
    Source: Schoenholz et al. 2017, arXiv 1611.01232; Hayou et al. 2019, arXiv 1902.06853.
    """
    if not 0 <= bias_std < math.inf:
        raise InputError(f"a finite bias_std of at least 0 is needed, got {bias_std:g}")
    bias = bias_std**2

    def excess(q: Tensor) -> Tensor:
        return q - dual.variance(q) / dual.gain(q) - bias

    def attracting(q: float) -> bool:
        """Whether variances a little above q* come down to it: those below do so at all edges."""
        above = 1.01 * q if q else 1e-4
        return _number(dual.variance, above) / _number(dual.gain, q) + bias <= (1 + 1e-12) * above

    q = 0.0
    if bias or _number(dual.variance, 0.0) or not _number(dual.gain, 0.0):
        candidates = torch.logspace(-6, 6, 481, dtype=torch.float64) + bias
        beyond = (excess(candidates) > 1e-9 * candidates).nonzero().flatten().tolist()
        if not beyond:
            raise InputError(f"this activation has no edge of chaos with bias_std {bias_std:g}")
        low = candidates[beyond[0] - 1].item() if beyond[0] else bias
        q = _bisect(lambda q: -_number(excess, q), low, candidates[beyond[0]].item())
    if not attracting(q):
        raise InputError(
            f"with bias_std {bias_std:g} the variance is not stable at this activation's edge of chaos"
        )
    return 1 / math.sqrt(_number(dual.gain, q))


def _variance_fixed_point(variance: Callable[[float], float], start: float, where: str) -> float:
    """Bracket the first sign change of V(q) − q from `start` in the direction of V(start) − start."""
    excess = variance(start) - start
    if abs(excess) <= 1e-12 * start:
        return start
    if excess > 0:
        high = start
        while variance(high) > (1 - 1e-12) * high:  # a margin above rounding, for ReLU at σ_w² = 2
            high *= 2
            if not high < 1e12 * start:
                raise InputError(f"the variance grows without bound for {where}: it has no fixed point")
        return _bisect(lambda q: variance(q) - q, start, high)
    low = start
    while variance(low) < low:
        low /= 2
        if low < 1e-15 * start:
            return 0.0
    return _bisect(lambda q: variance(q) - q, low, 2 * low)


def _bisect(excess: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function that is positive at `low` and not so at `high` changes sign."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def _variance_slope(dual: Dual, q: float) -> float:
    """d/dq E[φ(√q z)²] by automatic differentiation."""
    variance = torch.tensor(q, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(dual.variance(variance), variance)
    return slope.item()


def _number(function: Callable[..., Tensor], *arguments: float) -> float:
    return function(*(torch.tensor(a, dtype=torch.float64) for a in arguments)).item()


def _depth_scale(slope: float) -> float:
    if abs(abs(slope) - 1) <= NEUTRAL:
        return math.inf
    return -1 / math.log(abs(slope)) if slope else 0.0
