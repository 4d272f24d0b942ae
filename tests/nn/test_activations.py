"""Activations by name: what each computes, and which one a wrong name is told about."""

import math
from collections.abc import Callable

import pytest
import torch

from gramian.errors import InputError
from gramian.nn.activations import ACTIVATIONS, activation

BY_HAND: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "erf": math.erf,
    "sin": math.sin,
    "softplus": lambda x: math.log1p(math.exp(x)),
    "abs": abs,
    "identity": lambda x: x,
}
POINTS = (-2.5, -0.3, 0.0, 0.7, 3.1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name: str) -> None:
    x = torch.tensor(POINTS, dtype=torch.float64)
    expected = torch.tensor([BY_HAND[name](point) for point in POINTS], dtype=torch.float64)
    torch.testing.assert_close(activation(name)()(x), expected, rtol=1e-14, atol=1e-15)
    assert not list(activation(name)().parameters())


def test_every_name_is_a_function_of_its_own() -> None:
    """Control: no two names compute the same."""
    x = torch.tensor(POINTS)
    values = {tuple(activation(name)()(x).tolist()) for name in ACTIVATIONS}
    assert len(values) == len(ACTIVATIONS) == len(BY_HAND)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown activation 'step'; choose one of relu, .*, identity"):
        activation("step")
