import math

import pytest
import torch
from torch import nn

from gramian.errors import InputError
from gramian.nn.residual import (
    Residual,
    Sum,
    decreasing_gain,
    down_weighted_gain,
    normalised_skip,
    trainable,
    uniform_gain,
)


def linear(seed: int) -> nn.Linear:
    built = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    nn.init.normal_(built.weight, generator=torch.Generator().manual_seed(seed))
    return built


def test_residual_and_sum_are_their_equations() -> None:
    x, branch = torch.arange(8.0, dtype=torch.float64).view(2, 4), linear(0)
    torch.testing.assert_close(Residual(branch)(x), x + branch(x))
    torch.testing.assert_close(Residual(branch, skip=0.0, gain=0.5)(x), 0.5 * branch(x))
    torch.testing.assert_close(Residual(branch, trainable(2.0), trainable(3.0))(x), 2 * x + 3 * branch(x))
    torch.testing.assert_close(Sum(branch, linear(1), linear(2))(x), branch(x) + linear(1)(x) + linear(2)(x))
    assert len(list(Residual(branch, 1.0, trainable(3.0)).parameters())) == 2


def test_uniform_gains_have_unit_energy() -> None:
    for depth in (1, 7, 1000):
        assert depth * uniform_gain(depth) ** 2 == pytest.approx(1)


def test_decreasing_gains_are_square_summable_and_constant_ones_are_not() -> None:
    layers = range(1, 200_001)
    energy = sum(decreasing_gain(layer) ** 2 for layer in layers)
    assert 3.2 < energy < 3.38774
    tail = 3.38774 - energy  # the tail falls as 1/ln L
    assert tail * math.log(200_000) == pytest.approx(1, abs=0.05)


def test_gains_carried_across_depth_follow_inverse_square_root() -> None:
    assert down_weighted_gain(18, 0.1) == pytest.approx(0.1)
    assert down_weighted_gain(4 * 18, 0.1) == pytest.approx(0.05)


def test_normalised_skip_keeps_variance() -> None:
    for gain in (0.0, 0.3, 1.0):
        assert normalised_skip(gain) ** 2 + gain**2 == pytest.approx(1)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            normalised_skip(bad)
    with pytest.raises(InputError, match="at least 1"):
        uniform_gain(0)
