"""Elementwise non-linearities by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from gramian.errors import InputError

Activation = Callable[[], nn.Module]

ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(name: str) -> Activation:
    """Return the factory of the activation registered under `name`.

    Raises: InputError when the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
