"""Elementwise non-linearities by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gramian.errors import InputError

Activation = Callable[[], nn.Module]


class Erf(nn.Module):
    """The error function, erf x = 2/√π ∫₀ˣ exp(−t²) dt."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every entry."""
        return torch.erf(x)


class Sin(nn.Module):
    """The sine."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every entry."""
        return torch.sin(x)


class Abs(nn.Module):
    """The absolute value."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every entry."""
        return x.abs()


ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "erf": Erf,
    "sin": Sin,
    "softplus": nn.Softplus,
    "abs": Abs,
    "identity": nn.Identity,
}


def activation(name: str) -> Activation:
    """Return the factory of the activation registered under `name`.

    Raises: InputError when the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
