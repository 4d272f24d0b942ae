"""What members start from: δ by its definition, and the law of f̃ before any data."""

import dataclasses
import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from ensemble_oracles import OTHER, PRIOR, SPREADS, X, Y, delta, network
from gramian.bayes import members
from gramian.bayes.ensemble import EnsembleConfig, fit_ensemble
from gramian.bayes.job import Job, prepared
from gramian.bayes.linearised import linear_parts
from gramian.bayes.members import RECIPES, Source, estimated_prior, noisy, readout_of, recipe
from gramian.bayes.ntk import ntk
from gramian.core.jacobian import function, jvp
from gramian.errors import InputError
from gramian.nn.mlp import mlp, prior_variances
from ntk_modules import MODULES, make, rows

COUNT = 1500
"""Members whose moments are compared."""

CONFIG = EnsembleConfig(members=4, noise_variance=0.1)
POINTS = rows(3, 2, seed=7)


@lru_cache
def job(members: int = 4, make=network, **settings) -> Job:
    config = EnsembleConfig(members=members, prior=prior_variances(make()), noise_variance=0.1, **settings)
    return prepared(make, X, Y, config, "squared_error", (0, 1), None)


@pytest.mark.parametrize(("method", "exact"), list(SPREADS))
def test_delta_is_its_definition(method: str, exact: bool) -> None:
    config = dataclasses.replace(CONFIG, method=method, exact=exact)
    started = job(method=method, exact=exact)
    found = started.drawn.offset(started.stack, OTHER, 2)
    for m in range(4):
        expected = delta(config, network, m, OTHER)
        own = found[m if len(found) > 1 else 0].to(X)
        torch.testing.assert_close(own.expand(5, 1), expected, rtol=0, atol=1e-10)


def at_start(started: Job, x: Tensor = POINTS) -> Tensor:
    """f̃ of every member before training, one output."""
    linear = started.recipe.linear
    own = linear_parts(started.primal, started.start, None, linear)
    return (own(started.stack, x, 999) + started.drawn.offset(started.stack, x, 999))[..., 0]


def at_anchor(started: Job, x: Tensor = POINTS) -> Tensor:
    """What a linearised member predicts where its regulariser is zero: it stays there away from all data."""
    own = linear_parts(started.primal, started.start, started.drawn.anchor, started.recipe.linear)
    return (own(started.stack, x, 999) + started.drawn.offset(started.stack, x, 999))[..., 0]


def mean_kernels(count: int = 200) -> tuple[Tensor, Tensor]:
    """The mean over draws of Θ^{≤L} and of K, the part of the last layer."""
    source = Source(network, 99, X.device, X.dtype)
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for number in range(count):
        module = source.module("kernels", number)
        for last, terms in found.items():
            names = [name for name in PRIOR if name.startswith("4.") == last]
            weights = {name: PRIOR[name] for name in names}
            terms.append(ntk(module, POINTS, outputs="trace", weights=weights, parameters=names))
    return torch.stack(found[False]).mean(0), torch.stack(found[True]).mean(0)


@pytest.fixture(scope="module")
def kernels() -> tuple[Tensor, Tensor]:
    return mean_kernels()


def distance(values: Tensor, expected: Tensor) -> float:
    """How many standard errors E fᵀ C⁻¹ f / dim is from 1, where C is the expected second moment."""
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(expected), values.T, upper=False)
    sizes = whitened.square().mean(0)
    error = sizes.std() / math.sqrt(len(sizes)) + 0.01  # the expected one is a mean over 200 networks
    return abs(float((sizes.mean() - 1) / error))


def agree(values: Tensor, expected: Tensor) -> bool:
    """Whether every second moment is within four standard errors."""
    products = values[:, :, None] * values[:, None]
    error = products.std(0) / math.sqrt(len(values)) + 0.02 * expected.abs()
    every = bool(((products.mean(0) - expected).abs() < 4 * error).all())
    return every and distance(values, expected) < 4


@pytest.mark.parametrize(
    ("method", "exact", "body", "last"),
    [
        ("deep_ensemble", False, 0, 1),
        ("rp_param", False, 0, 1),
        ("ntkgp_param", False, 1, 1),
        ("ntkgp_lin", False, 1, 1),
        ("rp_fn", False, 0, 2),
        ("ntkgp_fn", False, 2, 2),
    ],
)
def test_the_prior_at_the_start(kernels, method: str, exact: bool, body: int, last: int) -> None:
    """Cov f̃ = body Θ^{≤L} + last K, at every width in the mean over networks."""
    values = at_start(job(members=COUNT, method=method, exact=exact))
    assert agree(values, body * kernels[0] + last * kernels[1])
    others = {(0, 1), (1, 1), (0, 2), (2, 2)} - {(body, last)}
    assert all(distance(values, one * kernels[0] + two * kernels[1]) > 5 for one, two in others)  # control


def test_a_tangent_without_the_readout_at_zero_is_noticed(kernels, monkeypatch) -> None:
    """Control: the whole θ̃ as the tangent has Θ + K."""
    monkeypatch.setitem(RECIPES, "ntkgp_param", dataclasses.replace(RECIPES["ntkgp_param"], readout=1.0))
    values = at_start(job(members=COUNT))
    assert distance(values, kernels[0] + kernels[1]) > 5
    assert agree(values, kernels[0] + 2 * kernels[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ntkgp_fn", "rp_fn"])
def test_function_space_members_over_disperse_unless_corrected(kernels, method: str) -> None:
    """Far from data a member is what it is at its anchor: that has to have covariance Θ, or K."""
    expected = kernels[1] + (kernels[0] if method == "ntkgp_fn" else 0)
    assert agree(at_anchor(job(members=COUNT, method=method, exact=True)), expected)
    published = at_anchor(job(members=COUNT, method=method))
    assert distance(published, expected) > 8
    assert (published.var(0) / expected.diagonal()).min() > 1.2


@pytest.mark.slow
def test_of_relu_without_biases_the_excess_is_known() -> None:
    """J^{≤L} θ^{≤L} = L f_0: published RP-fn has K + L² K."""

    def plain() -> nn.Module:
        return network(activation="relu", bias_std=0.0)

    published = at_anchor(job(members=COUNT, make=plain, method="rp_fn"))
    exact = at_anchor(job(members=COUNT, make=plain, method="rp_fn", exact=True))
    torch.testing.assert_close(published.var(0), 5 * exact.var(0), rtol=0.25, atol=0)


@pytest.mark.slow
def test_kernels_of_wide_members_agree_like_one_over_width() -> None:
    """The variance of Θ(x, x) over members falls like 1/width: the prior of f̃ becomes Gaussian."""
    widths = torch.tensor([16.0, 32.0, 64.0, 128.0])
    spreads = []
    for width in widths.int().tolist():
        source = Source(lambda: network(widths=(width, width)), 5, X.device, X.dtype)  # noqa: B023
        modules = [source.module("kernels", number) for number in range(120)]
        weights = prior_variances(modules[0])
        kernels = torch.stack([ntk(module, POINTS[:1], weights=weights).flatten() for module in modules])
        spreads.append((kernels.var(0) / kernels.mean(0).square()).mean())
    slope = torch.linalg.lstsq(
        torch.stack([widths.log(), torch.ones(4)], 1), torch.stack(spreads).log().float()[:, None]
    ).solution[0]
    assert -1.35 < float(slope) < -0.65


def test_the_prior_is_estimated_from_draws() -> None:
    source = Source(lambda: mlp(2, 1, widths=(20, 30)), 0, X.device, X.dtype)
    template = function(source.module("start", 0))
    found, expected = estimated_prior(source, template), prior_variances(template.module)
    for name, value in found.items():
        assert float(value) == pytest.approx(expected[name], rel=0.1 if value.numel() > 1 else 0.4)
    assert float(found["2.weight"]) != pytest.approx(expected["0.weight"], rel=0.5)
    again = estimated_prior(source, template)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_targets_have_noise_of_the_member_alone() -> None:
    variance = torch.tensor([[0.25], [4.0]], dtype=torch.float64).expand(2, 1)
    found = noisy(torch.ones(2, 1, dtype=torch.float64), variance, 3, range(4000))
    assert found.shape == (4000, 2, 1)
    torch.testing.assert_close(found.mean(0), torch.ones(2, 1).double(), rtol=0, atol=0.12)
    torch.testing.assert_close(found.var(0), variance, rtol=0.08, atol=0)
    correlation = torch.corrcoef(found[..., 0].T)
    assert abs(float(correlation[0, 1])) < 0.06
    some = noisy(torch.ones(2, 1, dtype=torch.float64), variance, 3, [7, 2])
    assert torch.equal(some, found[[7, 2]])


@pytest.mark.parametrize("name", ["mlp", "residual", "cnn", "recurrent"])
def test_the_readout_is_the_last_module_with_parameters(name: str) -> None:
    module, inputs = make(name).eval(), MODULES[name][1](4, 0)
    f = function(module)
    names = readout_of(f, inputs, None)
    tangent = {n: p if n in names else torch.zeros_like(p) for n, p in f.parameters.items()}
    torch.testing.assert_close(jvp(f, inputs, tangent), module(inputs).flatten(1), rtol=0, atol=1e-10)
    holder = names[0].rpartition(".")[0]
    assert readout_of(f, inputs, holder) == readout_of(f, inputs, names) == names


def test_a_readout_that_is_not_linear_is_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1), nn.Softplus()).double()
    with pytest.raises(InputError, match="not linear in 2"):
        readout_of(function(module), X, None)
    tied = make("twice")
    with pytest.raises(InputError, match="not linear in readout"):
        readout_of(function(tied), rows(4, 4), None)
    # where δ does not treat the last layer apart, none is asked for
    squashed = fit_ensemble(
        lambda: nn.Sequential(nn.Linear(2, 1), nn.Softplus()), X, Y,
        EnsembleConfig(method="rp_fn", members=2, steps=2),
    )  # fmt: skip
    assert (squashed.trained.networks[0]["0.weight"] != 0).all()


def test_recipes() -> None:
    assert recipe("rp_param", True) is recipe("rp_param", False)
    assert recipe("ntkgp_fn", True) != recipe("ntkgp_fn", False)
    assert members.seed_of(0, "start", 1) != members.seed_of(1, "start", 0)
    with pytest.raises(InputError, match="unknown method"):
        recipe("laplace", False)
