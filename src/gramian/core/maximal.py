"""The largest value that any sub-network reaches, as a function of what one of its layers does.

A sub-network of slope (or curvature, or cosine of orthogonal inputs) far above that of a layer is what makes
a deep network hard to train. A `Maximal` turns a target for the worst sub-network into one for each layer.
"""

import math
from collections.abc import Callable

from gramian.errors import InputError

Local = Callable[[float], float]
"""What one nonlinear layer does to a number: to a slope, a curvature or a cosine."""

Maximal = Callable[[Local, float], float]
"""The largest value that any sub-network reaches from a start when every nonlinear layer acts alike."""


def plain(depth: int) -> Maximal:
    """Return the maximal function of a chain of nonlinear layers, which is the whole chain.

        M(r)(x) = r^depth(x)

    Slopes multiply, curvatures add: a layer has the slope ζ^(1/depth) or the curvature τ/depth.

    Raises: InputError unless depth ≥ 1.
    Holds: exactly.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """
    _check_count("nonlinear layers", depth, 1)

    def maximal(local: Local, start: float) -> float:
        for _ in range(depth):
            start = local(start)
        return start

    return maximal


def residual(blocks: int, skip: float, layers: int = 1, last: int = 0) -> Maximal:
    """Return the maximal function of residual blocks whose sums are normalised.

        x ← w² x + (1−w²) r^layers(x), for every block;   M(r)(x₀) = max(r^last(x), r^layers(x₀))

    A block is w·x + √(1−w²)·branch(x) with `layers` nonlinear layers in its branch; `last` more follow the
    last block. A Transformer has one nonlinear layer in the MLP of every block: with a skip of weight w
    around the MLP it is residual(depth, w), without one plain(depth), whatever is around the attention.

    Raises: InputError unless blocks ≥ 1, 0 ≤ skip < 1, layers ≥ 1 and last ≥ 0.
    Holds: exactly, for a local function that is increasing and not below the identity.
    Source: Martens et al. 2021, arXiv 2110.01765; Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """
    _check_count("blocks", blocks, 1)
    _check_count("nonlinear layers in a branch", layers, 1)
    _check_count("nonlinear layers behind the last block", last, 0)
    if not 0 <= skip < 1:
        raise InputError(f"the weight of a normalised skip is at least 0 and below 1, not {skip}")
    branch, tail, kept = plain(layers), plain(last) if last else _unchanged, skip * skip

    def maximal(local: Local, start: float) -> float:
        x = start
        for _ in range(blocks):
            x = kept * x + (1 - kept) * branch(local, x)
        return max(tail(local, x), branch(local, start))

    return maximal


def local_slope(target: float, maximal: Maximal) -> float:
    """Return the slope of one layer for which the steepest sub-network has a given slope at 1.

        M(y ↦ s y)(1) = ζ

    Raises: InputError unless ζ > 1.
    Holds: to rounding, where some sub-network is at least as steep as its layers.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """
    check_above("zeta, the slope of the steepest sub-network", target, 1)
    return bisect(lambda slope: maximal(lambda y: slope * y, 1.0) >= target, 1.0, target)


def local_curvature(target: float, maximal: Maximal) -> float:
    """Return the curvature of one layer for which the most curved sub-network has a given curvature at 1.

        M(y ↦ y + t)(0) = τ

    Raises: InputError unless τ > 0.
    Holds: to rounding, where some sub-network is at least as curved as its layers.
    Source: Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """
    check_above("tau, the curvature of the most curved sub-network", target, 0)
    return bisect(lambda curvature: maximal(lambda y: y + curvature, 0.0) >= target, 0.0, target)


def _unchanged(_: Local, start: float) -> float:
    return start


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"the number of {name} must be at least {least}, not {value}")


def check_above(name: str, value: float, bound: int) -> None:
    """Raise InputError unless bound < value < ∞."""
    if not bound < value < math.inf:
        raise InputError(f"{name} must be above {bound}, not {value}")


def bisect(reached: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition that holds from some point on begins to hold, to the last bit.

    Holds: exactly, for a condition that does not hold at low and holds at high.
    """
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
