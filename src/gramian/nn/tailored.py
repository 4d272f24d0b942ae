"""Activations shaped for the depth of the network that they stand in, as modules."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from gramian.core.maximal import Maximal, local_curvature, local_slope, plain
from gramian.core.shaping import (
    Shaping,
    dks,
    dks_leaky_relu,
    dks_relu,
    leaky_relu_map,
    tat,
    tat_leaky_relu,
)
from gramian.nn.activations import Activation

Network = Callable[[int], Maximal]
"""From a depth to the maximal function of a network of that depth."""

ETA, TAU, ZETA = 0.9, 0.3, 1.5
"""Published targets: cosine of orthogonal inputs at the end, curvature and slope of the network at 1."""


class Tailored(nn.Module):
    """An activation with four constants of the architecture.

        φ̂(x) = output_scale · (φ(input_scale · x + input_shift) + output_shift)

    The constants are not in the state dict. Half precisions are computed in float32, since the shifts
    cancel most of φ.

    Shapes: (…) -> (…).
    Holds: exactly.
    Source: Martens et al. 2021, arXiv 2110.01765.
    """

    def __init__(self, inner: nn.Module, shaping: Shaping) -> None:
        super().__init__()
        self.inner, self.shaping = inner, shaping

    def forward(self, x: Tensor) -> Tensor:
        """Apply the shaped function; the result has the type of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.shaping(self.inner, wide).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the constants."""
        return ", ".join(f"{name}={value:.6g}" for name, value in vars(self.shaping).items())


class TailoredLeakyReLU(nn.Module):
    """A leaky ReLU that keeps the mean square of a Gaussian.

        φ̂(x) = output_scale · leaky_relu_a(x),   output_scale = √(2/(1+a²))

    Shapes: (…) -> (…).
    Holds: E φ̂(√q z)² = q for every q, exactly.
    Source: Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """

    def __init__(self, negative_slope: float) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.output_scale = math.sqrt(2 / (1 + negative_slope**2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the shaped function."""
        return nn.functional.leaky_relu(x, self.negative_slope).mul_(self.output_scale)

    def extra_repr(self) -> str:
        """Return the constants."""
        return f"negative_slope={self.negative_slope:.6g}, output_scale={self.output_scale:.6g}"


def tailored(activation: Activation, depth: int, network: Network = plain) -> nn.Module:
    """Return an activation tailored for a network of `depth` blocks with one nonlinear layer each (TAT).

        ReLU, leaky ReLU:  leaky ReLU whose slope takes orthogonal inputs to the cosine η = 0.9 at the end
        smooth functions:  Q(1) = Q'(1) = C'(1) = 1 and a curvature of the network at 1 of τ = 0.3

    `network` maps the depth to the maximal function: `plain`, or `lambda depth: residual(depth, skip)` for
    MLPs with a normalised skip. Where the network is too shallow to reach η, as a chain of 12 layers or fewer
    is, the slope is 0: ReLU, which stays below η. The identity needs no tailoring and is returned as it is.
    A gated MLP multiplies two halves, which these constants do not cover.

    Raises: InputError unless depth ≥ 1, and for functions with a kink other than ReLU and leaky ReLU.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """
    module = activation()
    if isinstance(module, nn.Identity):
        return module
    if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
        return TailoredLeakyReLU(_negative_slope(depth, network))
    return Tailored(module, _tat(activation, depth, network))


def deep_kernel_shaped(activation: Activation, depth: int, network: Network = plain) -> nn.Module:
    """Return an activation shaped for a network of `depth` blocks with one nonlinear layer each (DKS).

        Q(1) = Q'(1) = 1, C(0) = 0 and a slope of the steepest sub-network at 1 of ζ = 1.5

    For ReLU the condition Q'(1) = 1 is given up; a leaky ReLU gets another negative slope.

    Raises: InputError unless depth ≥ 1, for functions with a kink other than ReLU and leaky ReLU, and where
    no constants exist: for the identity, and at depth 1 for a leaky ReLU or softplus.
    Holds: as width → ∞, error O(width^-1/2).
    Source: Martens et al. 2021, arXiv 2110.01765.
    """
    module, slope = activation(), _slope(depth, network)
    if isinstance(module, nn.ReLU):
        return Tailored(module, dks_relu(slope))
    if isinstance(module, nn.LeakyReLU):
        negative_slope, shaping = dks_leaky_relu(slope)
        return Tailored(nn.LeakyReLU(negative_slope), shaping)
    return Tailored(module, _dks(activation, slope))


# Every layer of a network asks for the same constants, whose solution takes time that grows with the depth.


@lru_cache(maxsize=256)
def _negative_slope(depth: int, network: Network) -> float:
    maximal = network(depth)
    return tat_leaky_relu(ETA, maximal) if maximal(leaky_relu_map(0.0), 0.0) >= ETA else 0.0


@lru_cache(maxsize=256)
def _tat(activation: Activation, depth: int, network: Network) -> Shaping:
    return tat(_in_float64(activation), local_curvature(TAU, network(depth)))


@lru_cache(maxsize=256)
def _slope(depth: int, network: Network) -> float:
    return local_slope(ZETA, network(depth))


@lru_cache(maxsize=256)
def _dks(activation: Activation, slope: float) -> Shaping:
    return dks(_in_float64(activation), slope)


def _in_float64(activation: Activation) -> nn.Module:
    return activation().to("cpu", torch.float64)
