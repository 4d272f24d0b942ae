"""Sampled finite networks approach the limit of the maps, at the rate width^-1/2.

Networks are sampled many at a time. Their kernels are exact sums over layers: with z = W h + b at every
position and δ = ∂f/∂z, weights and biases contribute Σ_{p,p'} ⟨δ_p, δ'_p'⟩ (σ_w² ⟨h_p, h'_p'⟩/fan_in + σ_b²),
which one test holds against the full Jacobian.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from gramian.theory.duals import dual
from gramian.theory.maps import (
    Activation,
    Convolution,
    Dense,
    GlobalPool,
    Map,
    Mixing,
    Residual,
    Serial,
    signal,
)

WEIGHT, BIAS = 1.1, 0.8
TOKENS = 4
ATTENTION = torch.ones(TOKENS, TOKENS).tril() / torch.arange(1, TOKENS + 1)[:, None]


@dataclass
class Sampler:
    """Draws dense layers for many networks at once and remembers what their kernels need."""

    networks: int
    generator: torch.Generator
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def dense(self, h: Tensor, width: int) -> Tensor:
        """Apply a layer to h (networks, inputs, positions, features)."""
        fan_in = h.shape[-1]
        weight = torch.randn(self.networks, fan_in, width, generator=self.generator)
        bias = torch.randn(self.networks, 1, 1, width, generator=self.generator)
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        z = WEIGHT / math.sqrt(fan_in) * (h.flatten(1, 2) @ weight).unflatten(1, h.shape[1:3]) + BIAS * bias
        self.layers.append((h, z))
        self.weights += [weight, bias]
        return z

    def tangent(self, outputs: Tensor) -> Tensor:
        """Return the tangent kernels (networks, n, n) of scalar outputs (networks, n)."""
        slopes = torch.autograd.grad(outputs.sum(), [z for _, z in self.layers])
        total = torch.zeros(())
        for (h, _), slope in zip(self.layers, slopes, strict=True):
            h, slope = h.detach().flatten(1, 2), slope.flatten(1, 2)
            seen = WEIGHT**2 / h.shape[-1] * h @ h.mT + BIAS**2
            n = outputs.shape[1]
            total = total + (slope @ slope.mT * seen).unflatten(2, (n, -1)).unflatten(1, (n, -1)).sum((2, 4))
        return total


Finite = Callable[[Sampler, Tensor, int], Tensor]
"""A network up to its last hidden features, as a function of inputs (1, n, positions, d)."""


def dense(sampler: Sampler, x: Tensor, width: int) -> Tensor:
    for _ in range(3):
        x = sampler.dense(x, width).relu()
    return x


def residual(sampler: Sampler, x: Tensor, width: int) -> Tensor:
    x = sampler.dense(x, width)
    for _ in range(3):
        x = x + sampler.dense(x.erf(), width) / math.sqrt(3)
    return x.erf()


def windows(x: Tensor) -> Tensor:
    """The features of a position and its two neighbours on a ring."""
    return torch.cat([x.roll(shift, 2) for shift in (1, 0, -1)], -1)


def convolutional(sampler: Sampler, x: Tensor, width: int) -> Tensor:
    for _ in range(2):
        x = sampler.dense(windows(x), width).relu()
    return x.mean(2, keepdim=True)


def attending(sampler: Sampler, x: Tensor, width: int) -> Tensor:
    """Token mixing with values and projection, then an MLP; both beside a skip."""
    x = sampler.dense(x, width)
    x = x + 0.7 * sampler.dense(ATTENTION @ sampler.dense(x, width), width)
    x = x + 0.7 * sampler.dense(sampler.dense(x, width).relu(), width)
    return x.relu().mean(2, keepdim=True)


LINEAR, RELU, ERF = Dense(WEIGHT, BIAS), Activation(dual("relu")), Activation(dual("erf"))


def limit_dense(linear: Map) -> Map:
    return Serial(*[linear, RELU] * 3, linear)


def limit_residual(linear: Map) -> Map:
    return Serial(linear, *[Residual(Serial(ERF, linear), 1 / math.sqrt(3))] * 3, ERF, linear)


def limit_convolutional(linear: Dense) -> Map:
    convolution = Convolution((3,), linear.weight_std, linear.bias_std)
    return Serial(*[convolution, RELU] * 2, GlobalPool(), linear)


def limit_attending(linear: Map) -> Map:
    mixed = Residual(Serial(linear, Mixing(ATTENTION), linear), 0.7)
    mlp = Residual(Serial(linear, RELU, linear), 0.7)
    return Serial(linear, mixed, mlp, RELU, GlobalPool(), linear)


ARCHITECTURES: dict[str, tuple[Finite, Callable[[Dense], Map], tuple[int, ...], str]] = {
    "dense": (dense, limit_dense, (3, 1, 5), "none"),
    "residual": (residual, limit_residual, (3, 1, 5), "none"),
    "convolutional": (convolutional, limit_convolutional, (2, 5, 3), "all"),
    "attention": (attending, limit_attending, (2, TOKENS, 3), "all"),
}


def inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def predicted(name: str, linear: Dense = LINEAR) -> tuple[Tensor, Tensor]:
    _, limit, shape, positions = ARCHITECTURES[name]
    x = inputs(shape)
    out = limit(linear)(signal(x[:, 0] if positions == "none" else x, positions=positions))
    assert out.tangent is not None
    return out.activation.cross.float(), out.tangent.float()


def sampled(name: str, width: int, networks: int, seed: int) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of finite networks: the covariance of an output given the hidden layers, and its NTK."""
    finite, _, shape, _ = ARCHITECTURES[name]
    chunk = max(1, min(networks, 2**23 // width**2))
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(networks // chunk):
        sampler = Sampler(chunk, generator)
        hidden = finite(sampler, inputs(shape)[None].expand(chunk, *shape), width)
        features = hidden.detach().squeeze(2)
        moments = WEIGHT**2 / width * features @ features.mT + BIAS**2
        outputs = sampler.dense(hidden, 1).squeeze(3).squeeze(2)
        found.append((moments, sampler.tangent(outputs)))
    nngp, ntk = (torch.cat(parts) for parts in zip(*found, strict=True))
    return nngp, ntk


def exponents(name: str, linear: Dense, widths: list[int], networks: int) -> list[float]:
    """The slopes of log RMS error against log width, for NNGP and NTK."""
    errors = []
    for width in widths:
        pairs = zip(sampled(name, width, networks, seed=width), predicted(name, linear), strict=True)
        errors.append([(mine - limit).square().mean().sqrt().log() for mine, limit in pairs])
    x = torch.tensor(widths).float().log()
    x = x - x.mean()
    return (x @ torch.tensor(errors) / x.square().sum()).tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tangent_kernel_equals_the_full_jacobian(name):
    """The factored sum over layers is Σ_θ ∂_θ f ∂_θ f', by autograd over every parameter."""
    finite, _, shape, _ = ARCHITECTURES[name]
    sampler = Sampler(1, torch.Generator().manual_seed(0))
    hidden = finite(sampler, inputs(shape)[None], 6)
    outputs = sampler.dense(hidden, 1).flatten()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, sampler.weights, retain_graph=True)])
        for out in outputs
    ]
    jacobian = torch.stack(rows)
    factored = sampler.tangent(outputs[None])[0]
    torch.testing.assert_close(factored, jacobian @ jacobian.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_error_falls_as_the_root_of_the_width(name):
    for exponent in exponents(name, LINEAR, [32, 64, 128, 256], 256):
        assert exponent == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_wrong_limit_is_not_approached(name):
    """Control: with the bias left out of the limit the error stays."""
    for exponent in exponents(name, Dense(WEIGHT), [32, 64, 128], 128):
        assert abs(exponent) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_error_falls_as_the_root_of_the_width_up_to_1024(name):
    for exponent in exponents(name, LINEAR, [64, 128, 256, 512, 1024], 256):
        assert exponent == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_mean_of_wide_networks_is_the_limit(name):
    for kernels, limit in zip(sampled(name, 256, 256, seed=5), predicted(name), strict=True):
        deviation = kernels.std(0) / math.sqrt(len(kernels))
        assert ((kernels.mean(0) - limit).abs() < 4 * deviation + 0.02 * limit.abs()).all()
