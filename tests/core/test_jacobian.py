"""Derivatives by a module's parameters against closed forms, single gradients and finite differences."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from gramian.core.jacobian import Function, function, jacobian, jacobian_gram, jvp, scales, vjp
from gramian.errors import InputError
from gramian.nn.transformer import TransformerConfig, build


def rows(n: int, *size: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(inputs: int = 5, outputs: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


class Tied(nn.Module):
    """Two layers with one weight, beside a frozen one and a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.full((4,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(torch.tanh(self.first(x) + self.shift)))


def one_by_one(f: Function, x: Tensor) -> dict[str, Tensor]:
    """The Jacobian, one gradient after the other, of the module itself."""
    named = {name: p for name, p in f.module.named_parameters() if name in f.parameters}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for row in x:
        y = f.module(row[None]).flatten()
        for value in y:
            gradients = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
            for (name, p), gradient in zip(named.items(), gradients, strict=True):
                found[name].append(torch.zeros_like(p) if gradient is None else gradient)
    return {name: torch.stack(g).unflatten(0, (len(x), -1)) for name, g in found.items()}


def flat(parameters: dict[str, Tensor], start: int) -> Tensor:
    return torch.cat([p.flatten(start) if p.ndim > start else p[..., None] for p in parameters.values()], -1)


def test_the_jacobian_of_a_linear_map_is_its_inputs() -> None:
    x = rows(4, 3)
    found = jacobian(function(nn.Linear(3, 2).double()), x)
    expected = torch.einsum("op,ni->nopi", torch.eye(2, dtype=torch.float64), x)
    torch.testing.assert_close(found["weight"], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(found["bias"], torch.eye(2).double().expand(4, 2, 2), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rows_at_once", [2, 256])
@pytest.mark.parametrize("make", [mlp, lambda: Tied().double()], ids=["mlp", "tied"])
def test_the_jacobian_is_single_gradients(make, rows_at_once: int) -> None:
    module = make()
    f, x = function(module), rows(5, next(module.parameters()).shape[1])
    found, expected = jacobian(f, x, rows_at_once), one_by_one(f, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-13)


def test_tied_parameters_are_one_and_frozen_ones_are_none() -> None:
    f = function(Tied())
    assert list(f.parameters) == ["first.weight", "first.bias"]
    assert sorted(f.constants) == ["frozen.bias", "frozen.weight"]


def test_a_transformer_of_tokens() -> None:
    config = TransformerConfig(vocabulary=6, width=8, depth=1, heads=2, context=4)
    f, x = function(build(config, 0).double()), torch.tensor([[1, 2, 3], [4, 0, 5]])
    expected = one_by_one(f, x)
    for name, value in jacobian(f, x).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    tangent = {name: rows(*p.shape, seed=3) for name, p in f.parameters.items()}
    along = jvp(f, x, tangent)  # forward mode through attention
    torch.testing.assert_close(along, flat(expected, 2) @ flat(tangent, 0), rtol=0, atol=1e-11)


def test_torchs_own_transformer_in_forward_mode() -> None:
    """At evaluation it goes a fast way that has no derivative in forward mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    f, x = function(nn.Sequential(layer, nn.Flatten())), rows(2, 3, 4)
    tangent = {name: rows(*p.shape, seed=3) for name, p in f.parameters.items()}
    with torch.no_grad():
        along = jvp(f, x, tangent)
    torch.testing.assert_close(along, flat(one_by_one(f, x), 2) @ flat(tangent, 0), rtol=0, atol=1e-11)


def test_an_operation_without_a_derivative_in_forward_mode() -> None:
    module = nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    module.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
    f, x = function(module), rows(5, 4)
    matrix = flat(one_by_one(f, x), 2)
    tangent = {name: rows(*p.shape, seed=3).requires_grad_() for name, p in f.parameters.items()}
    along = jvp(f, x, tangent)
    torch.testing.assert_close(along, matrix @ flat(tangent, 0), rtol=0, atol=1e-12)
    (pulled,) = torch.autograd.grad(along[0, 1], tangent["2.weight"])  # it is differentiable by the tangent
    torch.testing.assert_close(pulled, one_by_one(f, x)["2.weight"][0, 1], rtol=0, atol=1e-12)
    with torch.no_grad():
        assert not jvp(f, x, tangent).requires_grad


def test_as_many_rows_as_outputs() -> None:
    """torch's own vmap of the derivative of PReLU takes one for the other."""
    for module in (nn.PReLU(4), nn.PReLU()):
        f, x = function(nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 3)).double()), rows(3, 4)
        expected = one_by_one(f, x)
        for at_once in (3, 256):
            for name, value in jacobian(f, x, at_once).items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-13)


def test_both_products_are_products_with_the_jacobian() -> None:
    f, x = function(mlp()), rows(6, 5)
    matrix = flat(jacobian(f, x), 2)
    tangent = {name: rows(*p.shape, seed=1) for name, p in f.parameters.items()}
    u = rows(6, 3, seed=2)
    for at_once in (4, 256):
        torch.testing.assert_close(jvp(f, x, tangent, at_once), matrix @ flat(tangent, 0), rtol=0, atol=1e-12)
        transposed = flat(vjp(f, x, u, at_once), 0)
        torch.testing.assert_close(transposed, torch.einsum("nop,no->p", matrix, u), rtol=0, atol=1e-12)
    assert (flat(vjp(f, x, u.flip(0)), 0) - transposed).norm() > 0.1  # control: rows are told apart


def test_the_tangent_product_is_a_finite_difference() -> None:
    f, x = function(mlp()), rows(6, 5)
    tangent = {name: rows(*p.shape, seed=1) for name, p in f.parameters.items()}
    step = 1e-6
    moved = [
        f({name: p + sign * step * tangent[name] for name, p in f.parameters.items()}, x) for sign in (1, -1)
    ]
    torch.testing.assert_close(jvp(f, x, tangent), (moved[0] - moved[1]) / (2 * step), rtol=0, atol=1e-8)


def test_the_gram_matrix_weighs_every_parameter() -> None:
    f, x, y = function(mlp()), rows(4, 5), rows(3, 5, seed=1)
    variances = {name: rows(*p.shape, seed=4).square() for name, p in f.parameters.items()}
    j, k, s = flat(one_by_one(f, x), 2), flat(one_by_one(f, y), 2), flat(variances, 0)
    expected = torch.einsum("nos,mps,s->nomp", j, k, s)
    torch.testing.assert_close(jacobian_gram(f, x, y, variances), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        jacobian_gram(f, x, weights=lambda name, p: 0.5), 0.5 * jacobian_gram(f, x), rtol=0, atol=1e-12
    )
    assert (jacobian_gram(f, x, y) - expected).norm() > 0.1  # control: the weights count
    square = jacobian_gram(f, x).flatten(2).flatten(0, 1)
    assert torch.linalg.eigvalsh(square)[0] > -1e-12


def test_some_parameters_alone() -> None:
    f, whole, x = function(mlp(), ["2"]), function(mlp()), rows(4, 5)
    assert list(f.parameters) == ["2.weight", "2.bias"]
    rest = jacobian_gram(function(mlp(), ["0.weight", "0.bias"]), x)
    torch.testing.assert_close(jacobian_gram(f, x) + rest, jacobian_gram(whole, x), rtol=0, atol=1e-12)
    output = jvp(f, x, f.parameters)
    torch.testing.assert_close(output, mlp()(x), rtol=0, atol=1e-13)  # a linear read-out is its own tangent


class Branching(nn.Module):
    """Goes one of two ways by its data, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.ways[int(row.sum() > 0)](row[None]) for row in x])


def test_a_module_that_vmap_cannot_follow() -> None:
    f, x = function(Branching().double()), rows(6, 3)
    assert len((x.sum(1) > 0).unique()) == 2
    for name, value in one_by_one(f, x).items():
        torch.testing.assert_close(jacobian(f, x)[name], value, rtol=0, atol=1e-13)


def test_float32_and_modules_stay_as_they_are() -> None:
    module = mlp().float()
    found = jacobian(function(module), rows(3, 5).float())
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    vjp(function(module), rows(3, 5).float(), torch.ones(3, 3))
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_batch_norm_needs_evaluation_mode() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    with pytest.raises(InputError, match="eval"):
        function(module)
    assert jacobian(function(module.eval()), rows(5, 3))["1.weight"].shape == (5, 4, 4)
    with pytest.raises(InputError, match="over the batch"):
        function(nn.BatchNorm1d(4, track_running_stats=False).eval())


def test_bad_input() -> None:
    f, x = function(mlp()), rows(4, 5)
    with pytest.raises(InputError, match="no trainable parameter"):
        function(nn.Tanh())
    with pytest.raises(InputError, match="no trainable parameter"):
        function(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(InputError, match="'readout'"):
        function(mlp(), ["2", "readout"])
    with pytest.raises(InputError, match="NaN"):
        jacobian(f, x / torch.zeros(5, dtype=torch.float64))
    with pytest.raises(InputError, match="at least one row"):
        jacobian(f, x[:0])
    with pytest.raises(InputError, match="got 0"):
        jacobian(f, x, 0)
    with pytest.raises(InputError, match=r"tangent of 0\.bias"):
        jvp(f, x, {**f.parameters, "0.bias": torch.zeros(3)})
    with pytest.raises(InputError, match=r"tangent of 2\.bias .* got nothing"):
        jvp(f, x, {name: p for name, p in f.parameters.items() if name != "2.bias"})
    with pytest.raises(InputError, match="cotangent"):
        vjp(f, x, rows(4, 2))
    for weights, words in (
        ({"0.weight": 1.0}, "0.bias"),
        (lambda name, p: -1.0, "not negative"),
        (lambda name, p: math.nan, "finite"),
        (lambda name, p: torch.ones(2), "of shape"),
    ):
        with pytest.raises(InputError, match=words):
            scales(f, weights)


@pytest.mark.parametrize("result", [lambda x: x.sum(), lambda x: (x, x), lambda x: x[:1], lambda x: x.long()])
def test_outputs_that_are_no_rows(result) -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return result(super().forward(input))

    with pytest.raises(InputError, match="a row for each"):
        vjp(function(Odd(5, 2).double()), rows(4, 5), rows(4, 2))
