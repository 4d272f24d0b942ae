import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.theory.duals import dual
from gramian.theory.kernels import kernels, variances
from gramian.theory.maps import (
    Activation,
    AveragePool,
    BatchNorm,
    Convolution,
    Dense,
    Flatten,
    GlobalPool,
    Mixing,
    Norm,
    Residual,
    Serial,
    signal,
)

RELU, GELU = Activation(dual("relu")), Activation(dual("gelu"))
DENSE = Serial(Dense(1.2, 0.3), RELU, Norm(), Residual(Serial(GELU, Dense(1.1)), 0.5), Dense(1.0))
FLAT = Serial(Convolution((3, 3), 1.2, 0.1, "zeros"), GELU, Convolution((2, 3), 1.2), RELU, Flatten(), DENSE)
POOLED = Serial(Convolution((3, 3), 1.2, 0.1, "zeros"), RELU, AveragePool((2, 2)), GELU, GlobalPool(), DENSE)
TOKENS = Serial(Mixing(torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]), RELU, GlobalPool(), DENSE)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = [
    (DENSE, "none", (6,), (1, 4, 9, None)),
    (FLAT, "same", (4, 4, 2), (64, 150)),
    (POOLED, "all", (4, 4, 2), (1, 1024)),
    (TOKENS, "all", (4, 3), (64, None)),
]


@pytest.mark.parametrize(("network", "positions", "shape", "tiles"), CASES)
def test_tiles_equal_the_plain_fold(network, positions, shape, tiles):
    x, y = draws(4, *shape), draws(3, *shape, seed=1)
    for other in (None, y):
        fold = network(signal(x, other, positions=positions))
        for tile in tiles:
            tiled = kernels(network, x, other, positions=positions, tile=tile)
            torch.testing.assert_close(tiled.nngp, fold.activation.cross, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(tiled.ntk, fold.tangent, rtol=1e-12, atol=1e-13)
    alone = variances(network, x, positions=positions)
    square = kernels(network, x, positions=positions)
    torch.testing.assert_close(alone.nngp, square.nngp.diagonal(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(alone.ntk, square.ntk.diagonal(), rtol=1e-12, atol=1e-13)
    with pytest.raises(AssertionError):  # control: other inputs
        torch.testing.assert_close(tiled.nngp, kernels(network, y, x, positions=positions).nngp.mT.flip(0))


def test_only_half_of_a_symmetric_kernel_is_computed():
    seen: list[tuple[int, int]] = []

    class Watched(Dense):
        def __call__(self, state):
            seen.append(tuple(state.activation.cross.shape))
            return super().__call__(state)

    x = draws(6, 4)
    kernels(Watched(1.0), x, tile=4)
    assert seen == [(2, 2)] * 6
    seen.clear()
    kernels(Watched(1.0), x, x.clone(), tile=4)
    assert seen == [(2, 2)] * 9


def test_a_network_over_the_batch_is_folded_in_one_piece():
    x, network = draws(7, 5), Serial(Dense(1.2), RELU, BatchNorm(), Dense(1.0))
    fold = network(signal(x))
    torch.testing.assert_close(kernels(network, x, tile=4).ntk, fold.tangent)
    part = network(signal(x[:2])).tangent  # control: pieces would be something else
    assert not torch.allclose(part, fold.tangent[:2, :2])
    with pytest.raises(InputError, match="all inputs at once"):
        variances(network, x)


def test_gradients_pass_through_tiles_on_several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = draws(7, 4).requires_grad_()
        tiled = torch.autograd.grad(kernels(DENSE, x, tile=9).ntk.sum(), x)[0]
        whole = torch.autograd.grad(DENSE(signal(x)).tangent.sum(), x)[0]
        torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            assert not kernels(DENSE, x, tile=9).ntk.requires_grad
    finally:
        torch.set_num_threads(before)


def test_precision_of_choice():
    x = draws(4, 6)
    assert kernels(DENSE, x.float()).ntk.dtype == torch.float64
    assert kernels(DENSE, x, dtype=torch.float32).ntk.dtype == torch.float32
    assert variances(DENSE, x, dtype=torch.float32).nngp.dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(InputError, match="tile"):
        kernels(DENSE, draws(3, 4), tile=0)
    with pytest.raises(InputError, match="keeps its positions"):
        kernels(Dense(1.0), draws(3, 4, 2), positions="all")
    with pytest.raises(InputError, match="lost the tangent"):
        kernels(lambda state: state.with_tangent(None), draws(3, 4))
    with pytest.raises(InputError, match="finite"):
        kernels(DENSE, draws(3, 4) / 0)
