"""Constants that shape an activation for its depth (Deep Kernel Shaping, Tailored Activation Transformation).

    φ̂(x) = γ (φ(α x + β) + δ)

In a wide network with orthogonal or Gaussian weights a layer maps the mean square q of its input and the
cosine c of two inputs by

    Q(q) = E φ̂(√q z)²,   C(c) = E[φ̂(u) φ̂(v)] / Q(1),   z, u, v ~ N(0, 1),  E[u v] = c

The four constants are chosen such that Q(1) = Q'(1) = 1 and that no sub-network is too steep at c = 1 or, at
c = 0, too close to a constant. How the layers form sub-networks is said by a `Maximal`.

Means over z are taken by the trapezoidal rule: for a function that is analytic near the real line its error
falls exponentially in 1/step, where Gauss–Hermite needs far more points.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.maximal import Local, Maximal, bisect, check_above
from gramian.errors import InputError

Function = Callable[[Tensor], Tensor]
"""An elementwise function."""

STEEPEST_RELU = math.pi / (math.pi - 1)
"""The largest C'(1) of a leaky ReLU shifted to zero mean: that of ReLU itself."""


@dataclass(frozen=True)
class Shaping:
    """The four constants of a shaped activation.

    φ̂(x) = output_scale · (φ(input_scale · x + input_shift) + output_shift)

    Holds: exactly.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """

    input_scale: float = 1.0
    input_shift: float = 0.0
    output_shift: float = 0.0
    output_scale: float = 1.0

    def __call__(self, function: Function, x: Tensor) -> Tensor:
        """Apply the shaped function."""
        y = function(x.mul(self.input_scale).add_(self.input_shift))
        return y.add(self.output_shift).mul_(self.output_scale)


class LocalMaps(NamedTuple):
    """The numbers of a layer's Q and C maps at q = 1: Q(1), Q'(1), C(0), C'(1), C''(1)."""

    q: float
    q_slope: float
    c_zero: float
    c_slope: float
    c_curvature: float


@torch.inference_mode(False)
@torch.enable_grad()
def local_maps(function: Function) -> LocalMaps:
    """Return the numbers of the Q and C maps of a smooth elementwise function at q = 1.

        Q(1) = E φ²,  Q'(1) = E φ φ' z,  C(0) = (E φ)² / Q(1),  C'(1) = E φ'² / Q(1),  C''(1) = E φ''² / Q(1)

    Raises: InputError when the function has a kink or bends too sharply for the quadrature.
    Holds: to about 1e-12.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """
    _check_smooth(function)
    mean, q, q_slope, slope, curvature = _moments(function, _vector(0.0, 0.0, 0.0, 0.0)).tolist()
    return LocalMaps(q, q_slope, mean * mean / q, slope / q, curvature / q)


def dks(function: Function, slope: float) -> Shaping:
    """Shape a smooth function by Deep Kernel Shaping: a given slope, and orthogonal inputs stay orthogonal.

        Q(1) = 1,  Q'(1) = 1,  C(0) = 0,  C'(1) = slope

    Raises: InputError unless slope > 1, when the function has a kink (`dks_relu` and `dks_leaky_relu` are for
    those), and when no constants are found.
    Holds: the four conditions to 1e-10.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """
    check_above("the slope of a layer", slope, 1)
    curvature = 2 * (slope - 1)  # to first order

    def conditions(moments: Tensor) -> Tensor:
        mean, q, q_slope, c_slope, _ = moments
        excess = torch.stack((q_slope - q, c_slope - q - (slope - 1))) / curvature
        return torch.stack((q - 1, *excess, mean / math.sqrt(curvature)))

    return _shaped(function, conditions, curvature, -1 / 2)


def tat(function: Function, curvature: float) -> Shaping:
    """Tailor a smooth function: unit slope and a given small curvature at 1, so that cosines move slowly.

        Q(1) = 1,  Q'(1) = 1,  C'(1) = 1,  C''(1) = curvature

    Roots with a gain input_scale · output_scale ≥ 2 are rejected: there the function is flat, with a slope φ'
    of a half. For a function that is nowhere as steep as 1 the gain counts in units of its largest slope.

    Raises: InputError unless curvature > 0, when the function has a kink (`tat_leaky_relu` is for those), and
    when no constants are found.
    Holds: the four conditions to 1e-10.
    Source: Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """
    check_above("the curvature of a layer", curvature, 0)
    gain = 2 / min(_steepest(function) or 1.0, 1.0)

    def conditions(moments: Tensor) -> Tensor:
        _, q, q_slope, c_slope, c_curvature = moments
        excess = torch.stack((q_slope - q, c_slope - q, c_curvature - curvature)) / curvature
        return torch.cat(((q - 1)[None], excess))

    return _shaped(function, conditions, curvature, -1 / math.sqrt(2), gain)


def dks_relu(slope: float) -> Shaping:
    """Shape ReLU by Deep Kernel Shaping; the condition Q'(1) = 1 is given up.

        Q(1) = 1,  C(0) = 0,  C'(1) = slope;   β = 1 if slope < π/(π−1), else −1

    Raises: InputError unless slope > 1.
    Holds: the three conditions, to 1e-12.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """
    check_above("the slope of a layer", slope, 1)
    beta = 1.0 if slope < STEEPEST_RELU else -1.0

    def reached(log_alpha: float) -> bool:
        alpha = math.exp(log_alpha)
        _, variance, active = _rectified(alpha, beta)
        return beta * alpha * alpha * active >= beta * slope * variance

    alpha = math.exp(bisect(reached, -5.0, 10.0))
    mean, variance, _ = _rectified(alpha, beta)
    return Shaping(alpha, beta, -mean, 1 / math.sqrt(variance))


def dks_leaky_relu(slope: float) -> tuple[float, Shaping]:
    """Return the negative slope of a leaky ReLU, and its constants, by Deep Kernel Shaping.

        Q(1) = 1,  Q'(1) = 1,  C(0) = 0,  C'(1) = slope;   α = 1,  β = 0
        a = (1 − √(1 − (1−κ)²)) / (1−κ),   κ = π (1 − 1/slope)

    Raises: InputError unless 1 < slope ≤ π/(π−1), the slope of ReLU itself.
    Holds: exactly.
    Source: Martens et al. 2021, arXiv 2110.01765; the closed form is our algebra.
    """
    check_above("the slope of a layer", slope, 1)
    if slope > STEEPEST_RELU:
        raise InputError(
            f"a leaky ReLU of zero mean has a slope of at most {STEEPEST_RELU:.6g}, not {slope:.6g}; take a "
            "deeper network or a smaller zeta"
        )
    rest = max(1 - math.pi * (1 - 1 / slope), 0.0)
    a = rest / (1 + math.sqrt(1 - rest * rest))
    mean = (1 - a) / math.sqrt(2 * math.pi)
    return a, Shaping(output_shift=-mean, output_scale=1 / math.sqrt((1 + a * a) / 2 - mean * mean))


def leaky_relu_map(slope: float) -> Local:
    """Return the C map of a leaky ReLU with a negative slope a; that of ReLU for a = 0.

        C(c) = c + (1−a)² / (π (1+a²)) · (√(1−c²) − c arccos c)

    Holds: exactly, at every q.
    Source: Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """
    bend = (1 - slope) ** 2 / (math.pi * (1 + slope * slope))

    def cosine(c: float) -> float:
        c = min(max(c, -1.0), 1.0)
        return c + bend * (math.sqrt(1 - c * c) - c * math.acos(c))

    return cosine


def tat_leaky_relu(target: float, maximal: Maximal) -> float:
    """Return the negative slope a in [0, 1] with which the network takes orthogonal inputs to a given cosine.

        M(C_a)(0) = η

    The activation is √(2/(1+a²)) times the leaky ReLU, which keeps the mean square.

    Raises: InputError unless 0 < η < 1, and when even ReLU, a = 0, stays below η.
    Holds: to 1e-12 in η.
    Source: Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """
    if not 0 < target < 1:
        raise InputError(
            f"eta, the cosine of orthogonal inputs at the end, lies between 0 and 1, not at {target}"
        )
    most = maximal(leaky_relu_map(0.0), 0.0)
    if most < target:
        raise InputError(
            f"eta = {target:.6g} cannot be reached: even ReLU takes orthogonal inputs to a cosine of only "
            f"{most:.6g}; lower eta or take more layers"
        )
    return bisect(lambda a: maximal(leaky_relu_map(a), 0.0) <= target, 0.0, 1.0)


def _rectified(alpha: float, beta: float) -> tuple[float, float, float]:
    """Return mean and variance of relu(αz + β), and the probability that it is above 0."""
    active = math.erfc(-beta / alpha / math.sqrt(2)) / 2
    density = math.exp(-((beta / alpha) ** 2) / 2) / math.sqrt(2 * math.pi)
    mean = beta * active + alpha * density
    return mean, (beta * beta + alpha * alpha) * active + alpha * beta * density - mean * mean, active


def _vector(*values: float) -> Tensor:
    """Return a vector on the processor, wherever models are being built; it takes gradients."""
    return torch.tensor(values, dtype=torch.float64, device="cpu", requires_grad=True)


@lru_cache
def _rule(step: float = 1 / 32, reach: float = 12.0) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the trapezoidal rule for E f(z), z ~ N(0, 1)."""
    nodes = torch.linspace(-reach, reach, round(2 * reach / step) + 1, dtype=torch.float64, device="cpu")
    weights = torch.exp(-nodes.square() / 2)
    return nodes, weights / weights.sum()


def _derivative(y: Tensor, x: Tensor) -> Tensor:
    """Return dy/dx elementwise, differentiable again; a function without an x in it has the derivative 0."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)[0]


def _moments(function: Function, unknowns: Float[Tensor, "4"]) -> Float[Tensor, "5"]:
    """Return E f, E f², E f f' z, E f'² and E f''² for f = φ̂; the unknowns are log α, β, δ and log γ."""
    alpha, beta, delta, gamma = unknowns[0].exp(), unknowns[1], unknowns[2], unknowns[3].exp()
    z, weights = _rule()
    x = alpha * z + beta
    y = function(x)
    slope = _derivative(y, x)
    f, f1, f2 = gamma * (y + delta), gamma * alpha * slope, gamma * alpha.square() * _derivative(slope, x)
    return torch.stack((f, f * f, f * f1 * z, f1 * f1, f2 * f2)) @ weights


def _check_smooth(function: Function) -> None:
    """Raise InputError when φ, φ' and φ'' from autograd break Stein's identity E[φ z] = E φ'."""
    z, weights = _rule()
    x = (z + 0.3).requires_grad_()
    y = function(x)
    if y.shape != x.shape or not y.isfinite().all():
        raise InputError("shaping needs an elementwise function with finite values")
    slope = _derivative(y, x)
    for f, derivative in ((y, slope), (slope, _derivative(slope, x))):
        size = f.abs().max().item()
        if not ((f * z - derivative) @ weights).abs() <= 1e-10 * size:
            raise InputError(
                "this shaping needs a smooth function and this one has a kink, a jump or too sharp a bend; "
                "ReLU and leaky ReLU have a shaping of their own"
            )


@torch.inference_mode(False)
@torch.enable_grad()
def _shaped(
    function: Function,
    conditions: Callable[[Tensor], Tensor],
    curvature: float,
    bend: float,
    largest_gain: float = math.inf,
) -> Shaping:
    """Return the first root of the conditions that the starts lead to with a gain αγ that is allowed.

    The conditions are in units in which all matter alike at a small curvature.
    """
    _check_smooth(function)
    rounding = 1e-14 / min(curvature, 1.0)
    for start in _starts(function, curvature, bend):
        root = _solve(lambda unknowns: conditions(_moments(function, unknowns)), start, rounding)
        if root is not None and root[0] + root[3] < math.log(largest_gain):
            alpha, beta, delta, gamma = root.tolist()
            return Shaping(math.exp(alpha), beta, delta, math.exp(gamma))
    raise InputError(
        f"no scales and shifts were found that give this function a curvature of {curvature:.6g}"
    )


def _starts(function: Function, curvature: float, bend: float) -> list[Float[Tensor, "4"]]:
    """Return the solutions in the limit of a small curvature, the smallest shift first.

    φ''' φ' = bend · φ''² at β,   α = √curvature · |φ'/φ''|,   E φ̂ = 0,   E φ̂² = 1
    """
    x, first, second, third = _on_a_line(function)
    excess = third * first - bend * second.square()
    steep = first.abs() > 1e-3 * first.abs().max()
    crossings = ((excess[:-1] * excess[1:] < 0) & steep[:-1]).nonzero()[:, 0]
    share = excess[crossings] / (excess[crossings] - excess[crossings + 1])
    shifts = (x[crossings] + share * (x[1] - x[0])).tolist()
    scales = (math.sqrt(curvature) * first[crossings] / second[crossings]).abs().tolist()
    found = sorted(zip(shifts, scales, strict=True), key=lambda pair: (round(abs(pair[0]), 4), -pair[0]))
    return [_standardised(function, scale, shift) for shift, scale in found if 0 < scale < math.inf]


def _on_a_line(function: Function) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return points and the first three derivatives there."""
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64, device="cpu", requires_grad=True)
    first = _derivative(function(x), x)
    second = _derivative(first, x)
    return x.detach(), first.detach(), second.detach(), _derivative(second, x).detach()


@torch.inference_mode(False)
@torch.enable_grad()
def _steepest(function: Function) -> float:
    return _on_a_line(function)[1].abs().max().item()


def _standardised(function: Function, scale: float, shift: float) -> Float[Tensor, "4"]:
    """Return the unknowns that give φ(scale·z + shift) mean 0 and variance 1."""
    z, weights = _rule()
    y = function(scale * z + shift).detach()
    mean = torch.dot(y, weights).item()
    deviation = torch.dot((y - mean).square(), weights).sqrt().item()
    return _vector(math.log(scale), shift, -mean, -math.log(max(deviation, 1e-12)))


def _solve(
    equations: Callable[[Tensor], Tensor], unknowns: Float[Tensor, "4"], rounding: float
) -> Float[Tensor, "4"] | None:
    """Return the root that Levenberg–Marquardt steps reach from a start, or None when they reach none."""
    damping = 1e-3
    value, jacobian = _linearised(equations, unknowns)
    if not jacobian.isfinite().all():
        return None
    for _ in range(60):
        if value.abs().max() < rounding or damping > 1e8:
            break
        scaled = math.sqrt(damping) * jacobian.norm(dim=0).clamp(min=1e-12).diag()
        right = torch.cat((-value, torch.zeros_like(value)))[:, None]
        step = torch.linalg.lstsq(torch.cat((jacobian, scaled)), right).solution[:, 0]
        trial = _linearised(equations, unknowns + step)
        if trial[0].norm() < value.norm() and trial[1].isfinite().all():
            unknowns, (value, jacobian), damping = unknowns + step, trial, damping / 10
        else:
            damping *= 10
    return unknowns.detach() if value.abs().max() < 1e4 * rounding else None


def _linearised(equations: Callable[[Tensor], Tensor], unknowns: Tensor) -> tuple[Tensor, Tensor]:
    unknowns = unknowns.detach().requires_grad_()
    value = equations(unknowns)
    rows = [torch.autograd.grad(part, unknowns, retain_graph=True)[0] for part in value]
    return value.detach(), torch.stack(rows)
