"""The kernel as an operator against the kernel as a matrix."""

import math

import pytest
import torch
from torch import Tensor, nn

from gramian.bayes.ntk import ntk
from gramian.bayes.ntk_operator import NTKOperator
from gramian.errors import InputError
from ntk_modules import MODULES, make, rows


def matrix(module: nn.Module, x: Tensor, y: Tensor | None = None, **options) -> Tensor:
    return ntk(module, x, y, **options).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("at_once", [2, 256])
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "tied_transformer"])
def test_products_are_those_of_the_matrix(name: str, at_once: int) -> None:
    module, inputs = make(name), MODULES[name][1]
    x, y = inputs(5, 0), inputs(3, 1)
    weights = lambda name, p: 1 / p.numel()  # noqa: E731
    operator, expected = (
        NTKOperator(module, x, y, weights=weights, rows=at_once),
        matrix(module, x, y, weights=weights),
    )
    assert operator.shape == expected.shape
    v = rows(expected.shape[1], 2, seed=3)
    scale = float(expected.abs().max())
    torch.testing.assert_close(operator @ v, expected @ v, rtol=0, atol=1e-11 * scale)
    torch.testing.assert_close(operator @ v[:, 0], expected @ v[:, 0], rtol=0, atol=1e-11 * scale)
    assert (operator @ v.flip(0) - expected @ v).norm() > 0.01 * (expected @ v).norm()  # control


def test_products_are_symmetric_and_never_negative() -> None:
    operator = NTKOperator(make("residual"), rows(7, 5))
    u, v = rows(14, seed=1), rows(14, seed=2)
    assert (u @ (operator @ v)).item() == pytest.approx((v @ (operator @ u)).item(), rel=1e-11)
    assert (u @ (operator @ u)).item() > 0


def test_conjugate_gradients_solve() -> None:
    module, x = make("mlp"), rows(8, 5)
    operator, kernel = NTKOperator(module, x), matrix(module, x)
    targets = rows(24, 3, seed=2)
    targets[:, 1] = 0
    expected = torch.linalg.solve(kernel + 0.1 * torch.eye(24, dtype=torch.float64), targets)
    found = operator.solve(targets, 0.1, tolerance=1e-11)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        operator.solve(targets[:, 0], 0.1, tolerance=1e-11), expected[:, 0], rtol=0, atol=1e-8
    )
    assert (
        operator.solve(targets, 0.2) - expected
    ).norm() > 0.01 * expected.norm()  # control: the noise counts
    with pytest.raises(InputError, match="after 2 iterations"):
        operator.solve(targets, 1e-3, iterations=2)


def test_lanczos_finds_both_ends() -> None:
    module, x = make("residual"), rows(6, 5)
    values = torch.linalg.eigvalsh(matrix(module, x))
    operator = NTKOperator(module, x)
    assert operator.extreme_eigenvalues(12) == pytest.approx((values[0].item(), values[-1].item()), rel=1e-9)
    lowest, highest = operator.extreme_eigenvalues(5)
    assert values[0] <= lowest < highest <= values[-1] * (1 + 1e-12)
    assert highest == pytest.approx(values[-1].item(), rel=1e-3)
    assert lowest > 2 * values[0]  # control: few steps do not reach it
    single = operator.extreme_eigenvalues(1)
    assert single[0] == single[1]


def test_lanczos_stops_in_an_invariant_space() -> None:
    module = nn.Linear(3, 2, bias=False).double()  # Θ = x xᵀ ⊗ I: two copies of three eigenvalues, and zero
    x = rows(8, 3)
    values = torch.linalg.eigvalsh(x @ x.T)
    lowest, highest = NTKOperator(module, x).extreme_eigenvalues(16)
    assert highest == pytest.approx(values[-1].item(), rel=1e-10)
    assert lowest == pytest.approx(0, abs=1e-10)


def test_bad_input() -> None:
    module, x = make("mlp"), rows(4, 5)
    operator, wide = NTKOperator(module, x), NTKOperator(module, x, x[:2])
    for call, words in (
        (lambda: NTKOperator(module, x[:0]), "at least one row"),
        (lambda: NTKOperator(module, x * math.inf), "NaN"),
        (lambda: NTKOperator(module, x, rows(3, 4)), "do not fit"),
        (lambda: NTKOperator(module, x, rows=0), "at least one row"),
        (lambda: NTKOperator(nn.Dropout(), x), "no trainable parameter"),
        (lambda: NTKOperator(nn.Sequential(nn.Linear(5, 9), nn.Dropout()).double(), x), "beside it"),
        (lambda: operator @ rows(11), "length 12"),
        (lambda: wide @ rows(12), "length 6"),
        (lambda: wide.solve(rows(12), 0.1), "one set of rows"),
        (lambda: wide.extreme_eigenvalues(), "one set of rows"),
        (lambda: operator.solve(rows(12), 0.0), "positive"),
        (lambda: operator.solve(rows(11), 0.1), "12 finite numbers"),
        (lambda: operator.solve(rows(12) * math.nan, 0.1), "12 finite numbers"),
        (lambda: operator.extreme_eigenvalues(0), "at least one step"),
    ):
        with pytest.raises(InputError, match=words):
            call()
