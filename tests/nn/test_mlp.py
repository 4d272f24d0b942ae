"""The MLP against closed forms of its law, and one parametrisation against the other."""

import math

import pytest
import torch
from torch import Tensor, nn

from gramian.bayes.ntk import ntk
from gramian.core.jacobian import function, jacobian_gram, jvp
from gramian.errors import InputError
from gramian.nn.mlp import NTKLinear, StandardLinear, mlp, prior_variances
from ntk_modules import rows


def network(parametrisation: str, seed: int = 0, **options) -> nn.Sequential:
    settings = {"widths": (9, 7), "activation": "erf", "weight_std": 1.3, "bias_std": 0.2, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(3, 2, parametrisation=parametrisation, **settings).double()


def same_function() -> tuple[nn.Sequential, nn.Sequential]:
    """A network in both parametrisations."""
    standard, scaled = network("standard"), network("ntk", 1)
    with torch.no_grad():
        for one, other in zip(standard, scaled, strict=True):
            if isinstance(one, StandardLinear) and isinstance(other, NTKLinear):
                other.weight.copy_(one.weight * math.sqrt(one.in_features) / 1.3)
                other.bias.copy_(one.bias / 0.2)
    return standard, scaled


def test_both_parametrisations_are_one_function_with_one_kernel() -> None:
    standard, scaled = same_function()
    x = rows(5, 3)
    torch.testing.assert_close(standard(x), scaled(x), rtol=0, atol=1e-13)
    one, other = (ntk(module, x, weights=prior_variances(module)) for module in (standard, scaled))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other, jacobian_gram(function(scaled), x), rtol=1e-10, atol=1e-12)
    plain = ntk(standard, x)  # control: without Λ it is another kernel
    assert plain.diagonal().sum() > 2 * one.diagonal().sum()


@pytest.mark.parametrize("parametrisation", ["standard", "ntk"])
@pytest.mark.parametrize("activation", ["erf", "relu", "gelu", "tanh"])
def test_the_readout_is_linear(parametrisation: str, activation: str) -> None:
    module, x = network(parametrisation, activation=activation), rows(4, 3)
    f = function(module)
    last = {n: p if n.startswith("4.") else torch.zeros_like(p) for n, p in f.parameters.items()}
    torch.testing.assert_close(jvp(f, x, last), module(x), rtol=0, atol=1e-12)
    first = {n: p if n.startswith("0.") else torch.zeros_like(p) for n, p in f.parameters.items()}
    assert (jvp(f, x, first) - module(x)).abs().max() > 0.01  # control: no other layer is


def test_of_relu_without_biases_every_layer_is() -> None:
    module, x = network("ntk", activation="relu", bias_std=0.0), rows(4, 3)
    f = function(module)
    assert list(f.parameters) == ["0.weight", "2.weight", "4.weight"]
    for name in f.parameters:
        tangent = {n: p if n == name else torch.zeros_like(p) for n, p in f.parameters.items()}
        torch.testing.assert_close(jvp(f, x, tangent), module(x), rtol=0, atol=1e-12)


def test_the_kernel_is_the_sum_of_body_and_readout() -> None:
    module, x = network("standard"), rows(4, 3)
    known = prior_variances(module)
    parts = [
        ntk(module, x, weights={n: known[n] for n in names}, parameters=names)
        for names in ([n for n in known if n[0] != "4"], ["4.weight", "4.bias"])
    ]
    torch.testing.assert_close(sum(parts), ntk(module, x, weights=known), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parametrisation", ["standard", "ntk"])
def test_its_second_moments_are_the_closed_form(parametrisation: str) -> None:
    """With one hidden layer E f(x) f(y) is the kernel of the infinitely wide network at every width."""
    x, draws = rows(3, 3), 4000
    torch.manual_seed(0)
    values = []
    with torch.no_grad():
        for _ in range(draws):
            module = mlp(3, 1, widths=(5,), activation="erf", bias_std=0.3, parametrisation=parametrisation)
            values.append(module.double()(x)[:, 0])
    found = torch.stack(values)
    products = found[:, :, None] * found[:, None]
    error = products.std(0) / math.sqrt(draws)
    assert ((products.mean(0) - erf_kernel(x, 1.5, 0.3)) / error).abs().max() < 4
    assert ((products.mean(0) - erf_kernel(x, 1.3, 0.3)) / error).abs().max() > 6  # control


def erf_kernel(x: Tensor, weight_std: float, bias_std: float) -> Tensor:
    first = weight_std**2 * x @ x.T / x.shape[1] + bias_std**2
    size = 1 + 2 * first.diagonal()
    hidden = 2 / math.pi * torch.asin(2 * first / (size[:, None] * size).sqrt())
    return weight_std**2 * hidden + bias_std**2


def test_it_draws_from_the_global_generator() -> None:
    assert torch.equal(network("ntk", 3)[0].weight, network("ntk", 3)[0].weight)
    assert not torch.equal(network("ntk", 3)[0].weight, network("ntk", 4)[0].weight)


def test_without_hidden_layers_it_is_affine() -> None:
    module = mlp(3, 2, widths=())
    assert [type(part) for part in module] == [StandardLinear]
    assert prior_variances(module) == pytest.approx({"0.weight": 1.5**2 / 3, "0.bias": 0.05**2})


def test_bad_input() -> None:
    for call, words in (
        (lambda: mlp(3, 1, parametrisation="mup"), "unknown parametrisation 'mup'"),
        (lambda: mlp(3, 1, activation="cube"), "unknown activation"),
        (lambda: mlp(0, 1), "positive numbers of features"),
        (lambda: mlp(3, 1, widths=(4, 0)), "positive numbers of features"),
        (lambda: mlp(3, 1, weight_std=0.0), "positive standard deviation"),
        (lambda: mlp(3, 1, bias_std=-0.1), "at least 0"),
        (lambda: mlp(3, 1, dropout=1.0), "rate of dropout"),
        (lambda: prior_variances(nn.Sequential(nn.Linear(2, 3))), "prior of 0.weight"),
    ):
        with pytest.raises(InputError, match=words):
            call()
