"""Depth rules of residual networks, and what is left of the kernel as the depth grows without bound.

A residual network x ← x + λ_l B_l(x) moves its kernel by Q ← Q + λ_l² B(Q): the Euler scheme, with steps
λ_l², of the flow dQ/dt = B(Q). So Σ λ² is the time that a network lasts; where it is finite there is a limit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.nn.residual import decreasing_gain, uniform_gain
from gramian.theory.maps import Map, Residual, Scale, Signal, combined

Gains = Tensor | Sequence[float]
"""The branch gains λ_1, …, λ_L of one network, in the order of its blocks."""


@dataclass(frozen=True)
class Rule:
    """A depth rule: the branch gains of a network of every depth, and the time that they last.

        gains(L) = (λ_{1,L}, …, λ_{L,L}),  time = lim_{L→∞} Σ_{l≤L} λ²_{l,L}

    `nested` says that a deeper network continues a shallower one, λ_{l,L} = λ_l; otherwise every single
    gain vanishes as L → ∞.
    """

    gains: Callable[[int], Tensor]
    time: float
    nested: bool


def uniform(depth: int) -> Float[Tensor, " depth"]:
    """Return the gains λ = 1/√L of L blocks.

    Shapes: (L,), float64.
    Raises: InputError unless depth ≥ 1.
    Holds: Σ λ² = 1, exactly.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    return torch.full((depth,), uniform_gain(depth), dtype=torch.float64)


def decreasing(depth: int) -> Float[Tensor, " depth"]:
    """Return the gains λ_l = 1/(√l · ln(l + 1)) of L blocks.

    Shapes: (L,), float64.
    Raises: InputError unless depth ≥ 1.
    Holds: Σ λ² < `DECREASING.time`, which it approaches as 1/ln L.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    _check_depth(depth)
    return torch.tensor([decreasing_gain(layer) for layer in range(1, depth + 1)], dtype=torch.float64)


def power(exponent: float) -> Rule:
    """Return the rule λ_l = l^−p: unscaled at p = 0, square-summable from p > 1/2 on.

    Holds: lim Σ λ² = ζ(2p) for p > 1/2 and ∞ otherwise.
    """
    order = torch.tensor(2 * exponent, dtype=torch.float64)
    time = torch.special.zeta(order, torch.ones_like(order)).item() if exponent > 0.5 else math.inf

    def gains(depth: int) -> Tensor:
        _check_depth(depth)
        return torch.arange(1, depth + 1, dtype=torch.float64) ** -exponent

    return Rule(gains, time, nested=True)


def profile(shape: Callable[[Tensor], Tensor]) -> Rule:
    """Return the rule λ_l = g(l/L)/√L, a profile g over the relative depth.

        lim Σ λ² = ∫₀¹ g(u)² du,  by the midpoint rule on 10 000 cells

    Because the flow does not depend on time explicitly, a net of equal blocks feels nothing of g but this.

    Holds: as L → ∞, error O(1/L), for a g that is piecewise continuous.
    """
    cells = 10_000
    midpoints = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells

    def gains(depth: int) -> Tensor:
        _check_depth(depth)
        return shape(torch.arange(1, depth + 1, dtype=torch.float64) / depth) / math.sqrt(depth)

    return Rule(gains, shape(midpoints).square().mean().item(), nested=False)


def _decreasing_time() -> float:
    """Σ_{l≥1} 1/(l ln²(l+1)) = Σ_{m≥2} f(m), f(m) = 1/((m−1) ln² m), by the Euler–Maclaurin formula."""
    start, cells = 1000, 2000
    head = math.fsum(1 / ((m - 1) * math.log(m) ** 2) for m in range(2, start))
    first = 1 / ((start - 1) * math.log(start) ** 2)
    slope = -first * (1 / (start - 1) + 2 / (start * math.log(start)))
    # ∫ f = 1/ln M + ∫_{ln M}^∞ du / (u² (e^u − 1)), the latter by Simpson's rule
    low, width = math.log(start), 40 / cells
    heights = [1 / (u * u * math.expm1(u)) for u in (low + i * width for i in range(cells + 1))]
    rest = width / 3 * (heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1])
    return head + 1 / low + rest + first / 2 - slope / 12


UNIFORM = Rule(uniform, 1.0, nested=False)
DECREASING = Rule(decreasing, _decreasing_time(), nested=True)
UNSCALED = power(0.0)
RULES = {"none": UNSCALED, "uniform": UNIFORM, "decreasing": DECREASING}


def partial_times(gains: Gains) -> Float[Tensor, " length"]:
    """Return the time that a residual network has lasted before block 1, 2, … and after the last one.

        τ_l = Σ_{k≤l} λ_k²,  l = 0, …, L

    Shapes: (L,) -> (L + 1,), float64.
    Holds: exactly.
    """
    return _accumulated(_squares(gains))


def log_growth(gains: Gains, slope: float) -> Float[Tensor, " length"]:
    """Return the logarithm of the growth of second moments through a residual network.

        ln(q_l / q_0) = Σ_{k≤l} ln(1 + λ_k² s),  l = 0, …, L

    s is what a branch multiplies a variance by, σ_w²/2 for a dense branch of ReLU with σ_b = 0. The squared
    gradient grows by the same factors on its way back: over all L blocks by exp of the last entry.

    Shapes: (L,) -> (L + 1,), float64.
    Raises: InputError unless slope ≥ 0.
    Holds: exactly for branches of positively homogeneous activations without bias; for the gradient of any
        other branch with its slope at the variance of each block.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    if not slope >= 0:
        raise InputError(f"the slope of a branch must be at least 0, got {slope:g}")
    return _accumulated((_squares(gains) * slope).log1p())


def flow(branch: Map, signal: Signal, time: float = 1.0, tolerance: float = 1e-10) -> Signal:
    """Carry a signal along the flow whose Euler steps are the blocks of a residual network.

        dQ/dt = Ψ(Q),  dΘ/dt = Ψ(Q) + Ψ̇(Q) Θ,  (Ψ, Ψ + Ψ̇Θ) = branch(Q, Θ)

    Classical Runge–Kutta; the number of steps is doubled from 10 on until doubling changes neither Q nor Θ
    by more than 15 · tolerance of its largest entry, which puts the error near the tolerance. Both diagonals
    of Q follow their own recursion. For a dense ReLU branch with σ_w² = 2, 20 steps leave about 1e-10.

    Raises: InputError for a negative or infinite time, and when the flow overflows or does not settle.
    Holds: the network of L blocks of gains √(time/L) is within O(1/L) of it.
    Source: Hayou et al. 2021, arXiv 2010.12859 (the continuous limit of uniform scaling).
    """
    if not 0 <= time < math.inf:
        raise InputError(f"a flow lasts a finite time of at least 0, got {time:g}")
    tolerance = max(tolerance, 16 * torch.finfo(signal.activation.cross.dtype).eps)
    steps, coarse = 10, _runge_kutta(branch, signal, time, 10)
    while steps < 5000:
        steps *= 2
        fine = _runge_kutta(branch, signal, time, steps)
        change = _change(coarse, fine)
        if change <= 15 * tolerance:
            return fine
        if not math.isfinite(change):
            raise InputError(f"the kernel overflows before time {time:g}: take smaller weights or gains")
        coarse = fine
    raise InputError(f"the flow of this branch did not settle to {tolerance:g} in {steps} steps")


def infinite_depth(
    rule: Rule, branch: Map, signal: Signal, *, layers: int = 1000, tolerance: float = 1e-10
) -> Signal:
    """Return the signal behind infinitely many residual blocks of the same branch.

        uniform, profiles:       (Q, Θ) = flow over time lim Σ λ²
        nested (decreasing, …):  `layers` blocks one by one, then flow over the remaining time

    Raises: InputError for a rule whose Σ λ² diverges: there the kernel has no limit, see `rescaled`.
    Holds: exactly to the tolerance of `flow` for uniform gains and profiles; for nested rules with an error
        of O(Σ_{l > layers} λ_l⁴), about 1e-7 of the kernel for decreasing gains and 1000 layers.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    if rule.time == math.inf:
        raise InputError(
            "the squared gains of this rule have no finite sum, so the kernel grows without limit"
        )
    if not rule.nested:
        return flow(branch, signal, rule.time, tolerance)
    gains = rule.gains(layers)
    for gain in gains.tolist():
        signal = Residual(branch, gain)(signal)
    return flow(branch, signal, rule.time - gains.square().sum().item(), tolerance)


def rescaled(branch: Map, gains: Gains, signal: Signal) -> tuple[Signal, float]:
    """Fold a signal through residual blocks of any depth without overflow, kernel and tangent in one unit.

        (Q_L, Θ_L) = e^s · (Q, Θ),  max_i Q_ii = 1;  returned: the signal (Q, Θ) and the logarithm s

    Correlations, Θ/q and normalised tangent kernels are those of (Q_L, Θ_L) itself.

    Raises: InputError unless the branch is homogeneous, B(aQ, aΘ) = a B(Q, Θ) for a > 0: no bias, and an
        activation like ReLU.
    Holds: exactly.
    """
    signal, scale = _unit(signal)
    if not homogeneous(branch, signal):
        raise InputError(
            "only branches without bias and with activations like ReLU can be rescaled on the way"
        )
    for gain in torch.as_tensor(gains, dtype=torch.float64).tolist():
        signal, step = _unit(Residual(branch, gain)(signal))
        scale += step
    return signal, scale


def homogeneous(step: Map, signal: Signal) -> bool:
    """Tell whether a map takes four times a signal to four times its outcome, up to rounding.

    Holds: exactly for maps without bias and with positively homogeneous activations, and for any other at
        variances that dwarf its biases and where its activations are as good as two half-lines.
    """
    change = _change(step(Scale(2.0)(signal)), Scale(2.0)(step(signal)))
    return change <= 1e3 * torch.finfo(signal.activation.cross.dtype).eps


def _runge_kutta(branch: Map, signal: Signal, time: float, steps: int) -> Signal:
    h = time / steps
    for _ in range(steps):
        k1 = branch(signal)
        k2 = branch(_moved(signal, (h / 2, k1)))
        k3 = branch(_moved(signal, (h / 2, k2)))
        k4 = branch(_moved(signal, (h, k3)))
        signal = _moved(signal, (h / 6, k1), (h / 3, k2), (h / 3, k3), (h / 6, k4))
    return signal


def _moved(signal: Signal, *steps: tuple[float, Signal]) -> Signal:
    """Return signal + Σ time · change for times that are not negative."""
    return combined((1.0, signal), *((math.sqrt(time), change) for time, change in steps))


def _change(coarse: Signal, fine: Signal) -> float:
    """Return the largest change of kernel or tangent in units of its largest entry."""
    pairs = [(coarse.activation.left, fine.activation.left), (coarse.activation.right, fine.activation.right)]
    pairs.append((coarse.activation.cross, fine.activation.cross))
    if coarse.tangent is not None and fine.tangent is not None:
        pairs.append((coarse.tangent, fine.tangent))
    largest = [(a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny) for a, b in pairs]
    return torch.stack(largest).max().item()


def _unit(signal: Signal) -> tuple[Signal, float]:
    largest = torch.maximum(signal.activation.left.max(), signal.activation.right.max()).item()
    if not 0 < largest < math.inf:
        raise InputError(f"a signal to rescale needs a positive, finite variance, got {largest:g}")
    return Scale(1 / math.sqrt(largest))(signal), math.log(largest)


def _squares(gains: Gains) -> Tensor:
    return torch.as_tensor(gains, dtype=torch.float64).square()


def _accumulated(steps: Tensor) -> Tensor:
    return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def _check_depth(depth: int) -> None:
    if depth < 1:
        raise InputError(f"a depth must be at least 1, got {depth}")
