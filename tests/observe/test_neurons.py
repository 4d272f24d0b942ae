import pytest
import torch
from torch import Tensor

from gramian.core.moments import Moments
from gramian.observe.neurons import neuron_readings, outlier_neurons
from oracles import moment_readings


def stream() -> Tensor:
    x = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 11] *= 20
    x[..., 4] *= 5
    return x


def test_readings_are_named_by_their_convention():
    got = neuron_readings(Moments.of(stream()))
    expected = moment_readings(stream().flatten(0, 1))
    assert got == pytest.approx({name: expected[name] for name in got}, rel=1e-9)
    assert {name for name in got if "kurtosis" in name} == {
        "neuron_kurtosis",
        "elementwise_kurtosis",
        "token_excess_kurtosis",
    }
    assert len(got) == 7


def test_planted_neurons_are_found():
    x = stream()
    squares = x.square().mean((0, 1))
    (first, share), (second, _) = outlier_neurons(Moments.of(x), 2)
    assert (first, second) == (11, 4)
    assert share == pytest.approx((squares[11] / squares.mean()).item(), rel=1e-10)
    x[..., 11] /= 20  # control: without the plant it is not found
    assert outlier_neurons(Moments.of(x), 1)[0][0] == 4


def test_no_more_neurons_than_there_are():
    assert len(outlier_neurons(Moments.of(stream()), 99)) == 32
