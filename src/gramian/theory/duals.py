"""Duals of the activations in use: a closed form where there is one, a Hermite series otherwise."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gramian.core.gaussian import (
    Dual,
    Function,
    blocked,
    derivative,
    expectation,
    needs_grad,
    pair_expectation,
)
from gramian.errors import InputError
from gramian.nn import activations
from gramian.nn.tailored import Tailored, TailoredLeakyReLU


class PiecewiseLinear(Dual):
    """Dual of φ(x) = p·max(x, 0) + n·min(x, 0): ReLU, leaky ReLU, |x| and the identity.

    With α = (p + n)/2, β = (p − n)/2, s = √(ab − k²) and θ = atan2(s, k):
    E[φφ] = α²k + β²(2/π)(s + k(π/2 − θ)),  E[φ'φ'] = α² + β²(2/π)(π/2 − θ)

    A variance of 0 reads as c = 1.

    Holds: exactly.
    Source: Cho, Saul 2009, "Kernel methods for deep learning" (degrees 0 and 1).
    """

    def __init__(self, negative: float, positive: float = 1.0) -> None:
        self.negative, self.positive = negative, positive
        self._even, self._odd = ((positive - negative) / 2) ** 2, ((positive + negative) / 2) ** 2

    def function(self, x: Tensor) -> Tensor:
        """Apply φ itself."""
        return torch.where(x > 0, self.positive * x, self.negative * x)

    def both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Give the values and the slopes."""
        values, slopes = blocked(self._both, k, a, b)
        return values, slopes

    def variance(self, q: Tensor) -> Tensor:
        """Give E[φ(√q z)²] = (p² + n²) q/2."""
        return (self._even + self._odd) * q

    def gain(self, q: Tensor) -> Tensor:
        """Give E[φ'(√q z)²] = (p² + n²)/2."""
        return (self._even + self._odd) * torch.ones_like(q)

    def mean(self, q: Tensor) -> Tensor:
        """Give E[φ(√q z)] = β √(2q/π)."""
        return (self.positive - self.negative) / 2 * _root(2 / math.pi * q)

    def _both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = _Absolute.apply(k, a, b) if needs_grad(k, a, b) else _absolute(k, a, b)  # pyright: ignore[reportGeneralTypeIssues]
        return torch.add(self._even * values, k, alpha=self._odd), self._even * slopes + self._odd


class Erf(Dual):
    """Dual of the error function.

    With D = (1 + 2a)(1 + 2b) − 4k²:  E[φφ] = (2/π) atan(2k/√D),  E[φ'φ'] = (4/π)/√D

    Holds: exactly.
    Source: Williams 1997, "Computing with infinite networks", Eq. 11 (there with arcsin).
    """

    def function(self, x: Tensor) -> Tensor:
        """Apply φ itself."""
        return x.erf()

    def both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Give the values and the slopes."""
        values, slopes = blocked(self._both, k, a, b)
        return values, slopes

    def mean(self, q: Tensor) -> Tensor:
        """Give E[φ(√q z)] = 0."""
        return torch.zeros_like(q)

    def _both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        k = _bounded(k, a, b)
        over_root = (4 * _determinant(k, a, b) + (1 + 2 * a) + 2 * b).rsqrt()
        return 2 / math.pi * (2 * k * over_root).atan(), 4 / math.pi * over_root


class Gelu(Dual):
    """Dual of x Φ(x), the exact GELU, with Φ the standard normal distribution function.

    With δ = ab − k², D = 1 + a + b + δ, g = 1/(1 + a) + 1/(1 + b), R = ¼ + atan(k/√D)/(2π) and
    h = δ + g k²:  E[φφ] = h/(2π√D) + kR,  E[φ'φ'] = k(h/D + 2g − 1)/(2π√D) + R

    Holds: exactly.
    Source: Tsuchida, Pearce, van der Heide, Roosta, Gallagher 2021, arXiv 2002.08517 (another form).
    """

    def function(self, x: Tensor) -> Tensor:
        """Apply φ itself."""
        return functional.gelu(x)

    def both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Give the values and the slopes."""
        values, slopes = blocked(self._both, k, a, b)
        return values, slopes

    def mean(self, q: Tensor) -> Tensor:
        """Give E[φ(√q z)] = q/√(2π(1 + q))."""
        return q * (2 * math.pi * (1 + q)).rsqrt()

    def _both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        k = _bounded(k, a, b)
        determinant = _determinant(k, a, b)
        over_root = (determinant + (1 + a) + b).rsqrt()
        gap = 1 / (1 + a) + 1 / (1 + b)
        height = torch.addcmul(determinant, k * k, gap)
        ratio = k * over_root
        share = ratio.atan() / (2 * math.pi) + 0.25
        values = torch.addcmul(k * share, height, over_root, value=1 / (2 * math.pi))
        steep = torch.addcmul(2 * gap - 1, height, over_root * over_root)
        return values, torch.addcmul(share, ratio, steep, value=1 / (2 * math.pi))


class Sine(Dual):
    """Dual of the sine.

    With m = (a + b)/2:  E[φφ] = ½(e^{k−m} − e^{−k−m}),  E[φ'φ'] = ½(e^{k−m} + e^{−k−m})

    Holds: exactly.
    """

    def function(self, x: Tensor) -> Tensor:
        """Apply φ itself."""
        return x.sin()

    def both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Give the values and the slopes."""
        values, slopes = blocked(self._both, k, a, b)
        return values, slopes

    def mean(self, q: Tensor) -> Tensor:
        """Give E[φ(√q z)] = 0."""
        return torch.zeros_like(q)

    def _both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        k, mean = _bounded(k, a, b), (a + b) / 2
        near, far = (k - mean).exp() / 2, (-k - mean).exp() / 2
        return near - far, near + far


class Series(Dual):
    """Dual of any elementwise function by its Hermite series; derivatives of φ come from autograd.

    E[φ(u)φ(v)] = Σ_n φ_n(a) φ_n(b) cⁿ,  c = k/√(ab),  φ_n(q) = E[φ(√q z) He_n(z)]/√n!

    Holds: to about 1e-13 for smooth φ at variances up to 8 and beyond (tanh, SiLU, softplus, GELU), to
    1e-6 at 100; k = ±√(ab) and Gram stay exact. A φ with a kink at 0 has values to 1e-6, and slopes to
    1e-13 while |c| < 0.97 but to 1e-2 next to ±1; with kinks elsewhere values are off by up to 1e-4 and
    slopes by up to 1e-2.
    Source: Daniely, Frostig, Singer 2016, arXiv 1602.05897 (dual activations).
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._slope = derivative(function)

    def function(self, x: Tensor) -> Tensor:
        """Apply φ itself."""
        return self._function(x)

    def both(self, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Give the values and the slopes."""
        return self.values(k, a, b), self.slopes(k, a, b)

    def values(self, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Give E[φ(u)φ(v)]."""
        return pair_expectation(self._function, self._function, k, a, b)

    def slopes(self, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Give E[φ'(u)φ'(v)]."""
        return pair_expectation(self._slope, self._slope, k, a, b)

    def variance(self, q: Tensor) -> Tensor:
        """Give E[φ(√q z)²]."""
        return expectation(lambda x: self._function(x).square(), q)

    def gain(self, q: Tensor) -> Tensor:
        """Give E[φ'(√q z)²]."""
        return expectation(lambda x: self._slope(x).square(), q)


def _softplus(beta: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.logaddexp(beta * x, torch.zeros_like(x)) / beta


DUALS: dict[str, Dual] = {
    "relu": PiecewiseLinear(0.0),
    "leaky_relu": PiecewiseLinear(0.01),
    "erf": Erf(),
    "gelu": Gelu(),
    "gelu_tanh": Series(lambda x: functional.gelu(x, approximate="tanh")),
    "silu": Series(functional.silu),
    "tanh": Series(torch.tanh),
    "sin": Sine(),
    "softplus": Series(_softplus()),
    "identity": PiecewiseLinear(1.0),
    "abs": PiecewiseLinear(-1.0),
}

_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    functional.relu: "relu",
    functional.leaky_relu: "leaky_relu",
    torch.erf: "erf",
    functional.gelu: "gelu",
    functional.silu: "silu",
    torch.tanh: "tanh",
    torch.sin: "sin",
    functional.softplus: "softplus",
    torch.abs: "abs",
}


_MODULES: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Identity: "identity",
    activations.Erf: "erf",
    activations.Sin: "sin",
    activations.Abs: "abs",
}


def dual(activation: str | nn.Module | Callable[[Tensor], Tensor] | Dual) -> Dual:
    """Give the dual of an activation named, given as a module, or as any elementwise function.

    Names, torch modules and torch functions with a closed form get it; everything else elementwise is
    expanded in a Hermite series. A dual is returned as it is.

    Raises: InputError for an unknown name, trainable parameters, and what is not elementwise.
    """
    if isinstance(activation, Dual):
        return activation
    if isinstance(activation, str):
        if activation not in DUALS:
            raise InputError(f"unknown activation {activation!r}; known are {', '.join(DUALS)}")
        return DUALS[activation]
    if isinstance(activation, nn.Module):
        return _of_module(activation)
    try:
        if activation in _FUNCTIONS:
            return DUALS[_FUNCTIONS[activation]]
    except TypeError:  # not hashable
        pass
    return _series(activation)


def _of_module(module: nn.Module) -> Dual:
    match module:
        case nn.ReLU():
            return DUALS["relu"]
        case nn.LeakyReLU():
            return PiecewiseLinear(module.negative_slope)
        case TailoredLeakyReLU():
            return PiecewiseLinear(module.output_scale * module.negative_slope, module.output_scale)
        case Tailored():
            return _tailored(module)
        case nn.GELU():
            return DUALS["gelu" if module.approximate == "none" else "gelu_tanh"]
        case nn.Softplus():
            return Series(_softplus(module.beta))
    for kind, name in _MODULES.items():
        if isinstance(module, kind):
            return DUALS[name]
    return _series(module)


def _tailored(module: Tailored) -> Dual:
    """Keep the closed form of a piecewise linear φ without shifts."""
    inner, constants = dual(module.inner), module.shaping
    if not isinstance(inner, PiecewiseLinear) or constants.input_shift or constants.output_shift:
        return _series(module)
    slopes = inner.negative, inner.positive
    gain = constants.input_scale * constants.output_scale
    return PiecewiseLinear(
        *(gain * slope for slope in (slopes if constants.input_scale > 0 else slopes[::-1]))
    )


def _series(function: Callable[[Tensor], Tensor]) -> Series:
    if isinstance(function, nn.Module) and any(p.requires_grad for p in function.parameters()):
        raise InputError(f"{type(function).__name__} has trainable parameters, so it has no dual")
    _check_elementwise(function)
    return Series(function)


def _check_elementwise(function: Callable[[Tensor], Tensor]) -> None:
    name = getattr(function, "__name__", type(function).__name__)
    probe = torch.linspace(-3.3, 3.1, 12, dtype=torch.float64)
    try:
        with torch.no_grad():
            whole, parts = function(probe.view(3, 4)), function(probe.view(2, 6))
            same = whole.shape == (3, 4) and torch.allclose(whole.flatten(), parts.flatten(), 1e-9, 1e-12)
    except Exception as error:
        raise InputError(f"{name} cannot be applied to any tensor elementwise: {error}") from error
    if not same:
        raise InputError(f"{name} is not a deterministic elementwise function, so it has no dual")


def _bounded(k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Take back to ±√(ab) what rounding put beyond, which a slope above 1 would let grow with depth."""
    with torch.no_grad():
        root = (a * b).sqrt_()
        bounded = k.clamp(-root, root)
    return k + (bounded - k).detach() if needs_grad(k) else bounded


def _determinant(k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Give ab − k², exactly 0 on the diagonal, and never below 0 by rounding."""
    determinant = a * b - k * k
    if needs_grad(determinant):
        return determinant + (-determinant).detach().clamp_(min=0)
    return determinant.clamp_(min=0)


def _root(x: Tensor) -> Tensor:
    """Give √x, whose infinite derivative at 0 is given as 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)


def _absolute(k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give E|u||v| and E[sgn u sgn v]; ab − k² in factors keeps the digits of near-duplicates."""
    root = (a * b).sqrt_()
    chord = (root - k).mul_(root + k).clamp_(min=0).sqrt_()
    angle = torch.atan2(chord, k).neg_().add_(math.pi / 2)
    return chord.addcmul_(angle, k).mul_(2 / math.pi), angle.mul_(2 / math.pi)


class _Absolute(torch.autograd.Function):
    """`_absolute` with ∂E|u||v| = (E[sgn sgn], s/(πa), s/(πb)) and ∂E[sgn sgn] = (2, −k/a, −k/b)/(πs)."""

    @staticmethod
    def forward(ctx, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(k, a, b)
        return _absolute(k, a, b)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        k, a, b = ctx.saved_tensors
        of_values, of_slopes = grads
        slopes = _Absolute.apply(k, a, b)[1]  # pyright: ignore[reportOptionalSubscript]
        root = _root(a * b)
        chord = _root((root - k) * (root + k))
        over_chord = torch.where(chord > 0, of_slopes / (math.pi * torch.where(chord > 0, chord, 1)), 0)
        by_k = of_values * slopes + 2 * over_chord
        sides = []
        for x in (a, b):
            over = torch.where(x > 0, 1 / torch.where(x > 0, x, 1), 0)
            sides.append(((of_values * chord / math.pi - k * over_chord) * over).sum_to_size(x.shape))
        return by_k.sum_to_size(k.shape), *sides
