"""Every way to the neural tangent kernel against the Gram matrix of single gradients, for many modules."""

import math

import pytest
import torch
from torch import Tensor, nn

from gramian.bayes import ntk_structure
from gramian.bayes.ntk import METHODS, _vector_cost, ntk, ntk_diagonal
from gramian.bayes.ntk_layers import PAIRINGS, Features, Kronecker, Work
from gramian.bayes.ntk_operator import NTKOperator
from gramian.bayes.ntk_structure import Structure, structure
from gramian.core.jacobian import function, jacobian_gram, scales
from gramian.errors import InputError
from ntk_modules import MODULES, make, rows

LEFT = {
    "twice": {"layer.weight", "layer.bias", "tied.bias", "readout.weight", "readout.bias"},
    "by_hand": {"second"},
    "transposed": {"first.weight", "first.bias"},
    "placed": {"places.weight", "start", *(f"mixer.{n}" for n in ("in_proj_weight", "in_proj_bias"))},
    "queried": {"queries"},
    "prelu": {"1.weight"},
    "weight_norm": {f"0.parametrizations.weight.original{place}" for place in (0, 1)},
    "branching": {"ways.0.weight", "ways.0.bias", "ways.1.weight", "ways.1.bias"},
    "tied_transformer": {"embedding.weight", "positions.weight"},
}
"""Parameters that are used in ways without a structure; `mixer.out_proj` besides."""


def gradients(module: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian (n, O, all parameters), one gradient after the other."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    found = []
    for row in x:
        for value in module(row[None]).flatten():
            parts = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
            pairs = zip(parts, wanted, strict=True)
            found.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(found).unflatten(0, (len(x), -1))


def structure_of(module: nn.Module, x: Tensor) -> Structure:
    f = function(module)
    return structure(f, x, scales(f, None), lambda outputs: Work(len(x) ** 2, len(x), outputs, outputs**2))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODULES)
def test_every_way_gives_the_gram_matrix_of_the_gradients(name: str) -> None:
    module, inputs = make(name), MODULES[name][1]
    x, y = inputs(5, 0), inputs(3, 1)  # as many rows as some modules have positions
    j, k = gradients(module, x), gradients(module, y)
    expected = torch.einsum("nof,mpf->nomp", j, k)
    for method in METHODS:
        assert_same(ntk(module, x, y, method=method), expected)
        assert_same(ntk(module, x, method=method), torch.einsum("nof,mpf->nomp", j, j))
    assert (expected - expected.flip(0)).abs().max() > 1e-3 * expected.abs().max()  # control: rows differ


@pytest.mark.parametrize("name", ["mlp", "positions", "cnn", "recurrent", "padded", "by_hand"])
@pytest.mark.parametrize("memory", [1, 60_000])
def test_outputs_that_meet_and_rows_taken_in_parts(name: str, memory: int) -> None:
    module, inputs = make(name), MODULES[name][1]
    x, y = inputs(5, 0), inputs(3, 1)
    full, square = jacobian_gram(function(module), x, y), jacobian_gram(function(module), x)
    own = torch.stack([square[n, :, n] for n in range(5)])
    for method in METHODS:
        options = {"method": method, "memory": memory}
        assert_same(ntk(module, x, y, **options), full)
        assert_same(ntk(module, x, **options), square)
        diagonal = full.diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        assert_same(ntk(module, x, y, outputs="diagonal", **options), diagonal)
        assert_same(ntk(module, x, y, outputs="trace", **options), diagonal.sum(0))
        assert_same(ntk(module, x, outputs="trace", **options), square.diagonal(dim1=1, dim2=3).sum(-1))
    assert_same(ntk_diagonal(module, x, memory=memory), own)
    assert_same(ntk_diagonal(module, x, outputs="diagonal", memory=memory), own.diagonal(dim1=1, dim2=2))
    traces = own.diagonal(dim1=1, dim2=2).sum(-1)
    assert_same(ntk_diagonal(module, x, outputs="trace", memory=memory), traces)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_left_to_the_jacobian(name: str) -> None:
    found = structure_of(make(name), MODULES[name][1](4, 0))
    left = set() if found.rest is None else set(found.rest.parameters)
    expected = LEFT.get(name, LEFT["placed"] if name == "padded" else set())
    if name == "transformer":  # three numbers a head of shaped attention, and positions once for all rows
        assert all("mixing" in left_over or "positions" in left_over for left_over in left)
        return
    assert {n for n in left if "out_proj" not in n} == expected


def test_the_kernel_of_the_definition_for_one_hidden_layer() -> None:
    """With f = v·φ(W x): Θ(x, y) = φ(Wx)·φ(Wy) + x·y Σ_i v_i² φ'(w_i x) φ'(w_i y)."""
    module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()
    x, y, w, v = rows(5, 4), rows(3, 4, seed=1), module[0].weight.detach(), module[2].weight.detach()[0]
    a, b = (x @ w.T).tanh(), (y @ w.T).tanh()
    expected = a @ b.T + x @ y.T * (((1 - a**2) * v**2) @ (1 - b**2).T)
    assert_same(ntk(module, x, y)[:, 0, :, 0], expected)


@pytest.mark.parametrize("outputs", PAIRINGS)
def test_parts_kept_apart_are_the_jacobian_multiplied_out(outputs: str) -> None:
    a, g, b, h = rows(4, 3, 5), rows(4, 2, 3, 6, seed=1), rows(2, 7, 5, seed=2), rows(2, 2, 7, 6, seed=3)
    j, k = torch.einsum("nosd,nsi->nodi", g, a).flatten(2), torch.einsum("nosd,nsi->nodi", h, b).flatten(2)
    pairing = PAIRINGS[outputs]
    assert_same(Kronecker(a, g).against(Kronecker(b, h), pairing), torch.einsum(pairing.cross, j, k))
    assert_same(Kronecker(a, g).same(pairing), torch.einsum(pairing.same, j, j))


@pytest.mark.parametrize("name", ["positions", "cnn_1d", "recurrent"])
def test_the_cheaper_way_is_only_cheaper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(name), MODULES[name][1](5, 0)
    found = []
    for price in (0, 10**18):
        monkeypatch.setattr(Work, "multiplied_out", lambda self, *sizes, price=price: price)
        flags = {layer.multiplied for layer in structure_of(module, x).layers}
        assert flags == {price == 0} or (price and name == "recurrent")  # whose gains have no other form
        found.append(ntk(module, x, method="structured"))
    assert_same(found[0], found[1])


def test_auto_takes_vectors_when_outputs_are_many() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 500)).double()
    x = rows(2, 3)
    found = structure_of(module, x)
    assert _vector_cost(found, 2, 2) < found.cost
    narrow = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 1)).double()
    found = structure_of(narrow, rows(20, 300))
    assert _vector_cost(found, 20, 20) > found.cost


def test_weights_are_those_of_each_parameter() -> None:
    module = make("cnn")
    x, y = rows(4, 2, 6, 6), rows(3, 2, 6, 6, seed=1)
    f = function(module)
    numbers = {name: 0.1 + place for place, name in enumerate(f.parameters)}
    each = {name: rows(*p.shape, seed=place).square() for place, (name, p) in enumerate(f.parameters.items())}
    mixed = {name: each[name] if place % 3 else numbers[name] for place, name in enumerate(numbers)}
    for weights in (numbers, each, mixed, lambda name, p: 1 / p.numel()):
        expected = jacobian_gram(f, x, y, weights)
        for method in METHODS:
            assert_same(ntk(module, x, y, weights=weights, method=method), expected)
        own = ntk_diagonal(module, x, weights=weights)
        assert_same(own, torch.stack([jacobian_gram(f, x, None, weights)[n, :, n] for n in range(4)]))
    assert (ntk(module, x, y) - expected).abs().max() > 0.1 * expected.abs().max()  # control


def test_variances_of_the_initialisation_make_parametrisations_agree() -> None:
    """f with W ~ N(0, s/fan_in) has the kernel of f with √(s/fan_in) W, W ~ N(0, 1), under these weights."""
    standard, x = make("mlp"), rows(4, 5)
    variance = {name: 2.0 / p.shape[1] if p.ndim == 2 else 0.3 for name, p in standard.named_parameters()}

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList(
                p.detach() / math.sqrt(variance[name]) for name, p in standard.named_parameters()
            )

        def forward(self, x: Tensor) -> Tensor:
            scales = [math.sqrt(value) for value in variance.values()]
            w1, b1, w2, b2, w3, b3 = (p * s for p, s in zip(self.layers, scales, strict=True))
            x = torch.relu(nn.functional.linear(x, w1, b1))
            return nn.functional.linear(torch.tanh(nn.functional.linear(x, w2, b2)), w3, b3)

    scaled = Scaled()
    assert structure_of(scaled, x).rest is None  # multiples of parameters are followed
    assert_same(ntk(standard, x, weights=variance), ntk(scaled, x))
    assert (ntk(standard, x) - ntk(scaled, x)).abs().max() > 1  # control


def test_the_last_layer_alone_and_the_rest() -> None:
    module, x = make("mlp"), rows(6, 5)
    last, rest = (ntk(module, x, parameters=names) for names in (["4"], ["0", "2"]))
    assert_same(last + rest, ntk(module, x))
    hidden = module[:4](x).detach()
    expected = torch.einsum("nm,op->nomp", hidden @ hidden.T + 1, torch.eye(3, dtype=torch.float64))
    assert_same(last, expected)


def test_a_symmetric_positive_matrix_that_orders_follow() -> None:
    module, x = make("residual"), rows(40, 5)
    found = ntk(module, x)
    matrix = found.flatten(2).flatten(0, 1)
    assert_same(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-10 * matrix.diagonal().max()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert_same(ntk(module, x[order]), found[order][:, :, order])


def test_rows_are_told_from_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make("transposed"), rows(3, 3, 4)  # three rows of three positions
    expected = jacobian_gram(function(module), x)
    assert_same(ntk(module, x), expected)
    monkeypatch.setattr(ntk_structure, "_regular", lambda one, two: True)  # control: this is what tells them
    wrong = ntk(module, x, method="structured")
    assert (wrong - expected).abs().max() > 0.01 * expected.abs().max()


def test_float32_single_outputs_and_modules_left_alone() -> None:
    module = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 1), nn.Flatten(0))
    x = rows(6, 5)
    found = ntk(module, x.float())
    assert found.dtype == torch.float32
    assert found.shape == (6, 1, 6, 1)
    assert not found.requires_grad
    assert all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(found.double(), ntk(module.double(), x), rtol=1e-5, atol=1e-5)


def test_rows_are_taken_in_parts_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make("mlp"), rows(9, 5)
    found, expected, taken = structure_of(module, x), ntk(module, x), []
    assert found.numbers >= sum(layer.numbers for layer in found.layers) > 0
    features = Structure.features

    def counted(known: Structure, part: Tensor) -> list[Features]:
        taken.append(len(part))
        return features(known, part)

    monkeypatch.setattr(Structure, "features", counted)
    assert_same(ntk(module, x, memory=2 * 8 * found.numbers * 4), expected)
    assert taken[:3] == [4, 4, 1]
    taken.clear()
    ntk(module, x[:2], x)
    assert taken == [2, 9]


def test_modules_that_are_no_function_of_a_row() -> None:
    class Centred(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input - input.mean(0))

    x = rows(6, 4)
    for module in (Centred(4, 2).double(), nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)).double()):
        with pytest.raises(InputError, match="whatever rows stand beside"):
            ntk(module, x)
    assert ntk(module.eval(), x).shape == (6, 8, 6, 8)
    with pytest.raises(InputError, match="eval"):
        ntk(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).double(), x)


def test_a_single_row_or_the_same_one_again_does_not_hide_what_rows_do() -> None:
    class Flipped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.flip(0)).flip(0)

    class Centred(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input - input.mean(0))

    y = rows(4, 3, seed=1)
    for x in (rows(1, 3), rows(1, 3).expand(2, 3)):
        expected = torch.eye(2).double().view(1, 2, 1, 2) * (x @ y.T + 1)[:, None, :, None]
        assert_same(ntk(Flipped(3, 2).double(), x, y, method="structured"), expected)
        for kernel in (ntk, NTKOperator):
            with pytest.raises(InputError, match="whatever rows stand beside"):
                kernel(Centred(3, 2).double(), x, y)


def test_bad_input() -> None:
    module, x = make("mlp"), rows(4, 5)
    holed = x.clone()
    holed[2, 1] = math.nan
    for arguments, options, words in (
        ((holed,), {}, "NaN"),
        ((x, holed), {}, "NaN"),
        ((x[:0],), {}, "at least one row"),
        ((x, rows(3, 4)), {}, "do not fit"),
        ((x,), {"outputs": "sum"}, "full, diagonal, trace"),
        ((x,), {"method": "fast"}, "auto, structured, contraction, vector"),
        ((x,), {"memory": 0}, "memory"),
        ((x,), {"parameters": ["readout"]}, "'readout'"),
        ((x,), {"weights": {"0.weight": 1.0}}, "one entry for each"),
    ):
        with pytest.raises(InputError, match=words):
            ntk(module, *arguments, **options)
    with pytest.raises(InputError, match="no trainable parameter"):
        ntk(nn.ReLU(), x)

    class Summed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sum()

    with pytest.raises(InputError, match="a row for each"):
        ntk(Summed(5, 2).double(), x)
