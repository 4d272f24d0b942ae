"""Laplace posteriors against exact ones of linear models, dense algebra and the definition of a Jacobian."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from gramian.bayes.laplace import LayerPosterior, last_layer_posterior, linearised_posterior
from gramian.bayes.linear_gaussian import GaussianPosterior, exact_posterior
from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.geometry import ParallelBeam, evenly
from gramian.imaging.radon import Projector
from gramian.nn.field import Field, Picture
from gramian.nn.field_encodings import FourierFeatures

DOUBLE = torch.float64
MATRIX = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
NOISE = torch.linspace(0.2, 0.8, 9, dtype=DOUBLE)
ROWS = torch.linspace(-1, 1, 12, dtype=DOUBLE)[:, None]
DATA = MATRIX @ (3 * ROWS[:, 0]).sin() + NOISE.sqrt() * torch.randn(
    9, generator=torch.Generator().manual_seed(1), dtype=DOUBLE
)


def forward(f: Tensor) -> Tensor:
    return f.flatten(1) @ MATRIX.mT


def adjoint(y: Tensor) -> Tensor:
    return (y @ MATRIX)[..., None]


def straight() -> nn.Module:
    """A network that is linear in its parameters: of cubic polynomials."""
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


POWERS = torch.cat((ROWS, ROWS**2, ROWS**3), 1)


def curved() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()


CURVED = ["0", "2"]
STRAIGHT = {"module": straight(), "inputs": (POWERS,)}
WAVY = {"module": curved(), "inputs": (ROWS,)}


def stds(name: str, value: Tensor) -> Tensor:
    return torch.linspace(0.3, 0.9, value.numel(), dtype=DOUBLE).view(value.shape)


def layer(network: dict, prior=stds, noise=NOISE, map_=forward, targets=DATA, **more) -> LayerPosterior:
    return last_layer_posterior(
        network["module"], map_, targets, noise, prior, inputs=network["inputs"], **more
    )


def drawn(network: dict, draws=1000, prior=stds, noise=NOISE, maps=(forward, adjoint), **more) -> Predictive:
    return linearised_posterior(
        network["module"],
        *maps,
        DATA,
        noise,
        prior,
        draws=draws,
        inputs=network["inputs"],
        **{"generator": torch.Generator().manual_seed(2), "tolerance": 1e-10, **more},
    )


def dense(network: dict, names: list[str] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give f(θ*), J by its definition, θ* and s, of the parameters within some modules."""
    module = network["module"]
    chosen = {
        name: p.detach()
        for name, p in module.named_parameters()
        if names is None or name.split(".")[0] in names
    }

    def call(*values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(chosen, values, strict=True)), network["inputs"])

    parts = torch.autograd.functional.jacobian(call, tuple(chosen.values()))
    assert isinstance(parts, tuple)
    jacobian = torch.cat([part.flatten(2).flatten(0, 1) for part in parts], 1)
    theta = torch.cat([p.flatten() for p in chosen.values()])
    std = torch.cat([stds(name, p).flatten() for name, p in chosen.items()])
    return call(*chosen.values()).detach(), jacobian, theta, std


def linear_model(network: dict, names: list[str] | None = None) -> tuple[GaussianPosterior, Tensor, Tensor]:
    """Give the posterior of θ by the oracle, J and f(θ*) − J θ*: what the linear model takes off the data."""
    outputs, jacobian, theta, std = dense(network, names)
    constant = outputs[:, 0] - jacobian @ theta
    oracle = exact_posterior(MATRIX @ jacobian, DATA - MATRIX @ constant, NOISE, std.square())
    return oracle, jacobian, constant


@pytest.mark.parametrize(
    ("network", "names"),
    [(STRAIGHT, None), (WAVY, CURVED), (WAVY, ["2"]), (WAVY, ["0"])],
    ids=["linear", "all", "last", "first"],
)
def test_few_parameters_have_the_posterior_of_the_oracle(network, names) -> None:
    """With more data than parameters and fewer: moments, evidence and the mean of the linear model."""
    oracle, jacobian, constant = linear_model(network, names)
    found = layer(network, names=names)
    law = found.predict(0, torch.Generator(), recentred=True)
    expected = oracle.predict(jacobian)
    torch.testing.assert_close(law.mean[:, 0], constant + expected.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(law.variance[:, 0], expected.variance, rtol=0, atol=1e-8)
    assert found.log_evidence == pytest.approx(oracle.log_evidence, abs=1e-8)
    assert found.predict(0, torch.Generator()).samples is None


def test_a_last_layer_is_found_and_its_jacobian_is_the_definitions() -> None:
    outputs, jacobian, theta, std = dense(WAVY, ["2"])
    found = layer(WAVY)
    assert list(found.f.parameters) == ["2.weight", "2.bias"]
    torch.testing.assert_close(found.jacobian[..., 0].mT, jacobian * std, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.offset, -theta / std)
    law = found.predict(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(law.mean, outputs)
    assert law.samples is not None
    assert law.samples.shape == (3, 12, 1)
    frozen = curved().requires_grad_(False)
    frozen[0].requires_grad_(True)
    assert list(layer({"module": frozen, "inputs": (ROWS,)}).f.parameters) == ["0.weight", "0.bias"]


def test_draws_have_the_moments() -> None:
    """Of parameters and of outputs; a draw of outputs is J times a draw of parameters."""
    oracle, jacobian, _ = linear_model(WAVY, ["2"])
    posterior, count = layer(WAVY), 2000
    draws = posterior.sample(count, torch.Generator().manual_seed(0), recentred=True)
    vectors = torch.cat([part.flatten(1) for part in draws.values()], 1)
    assert ((vectors.mean(0) - oracle.mean) / (oracle.variance / count).sqrt()).abs().max() < 4
    spread = oracle.variance[:, None] * oracle.variance + oracle.covariance**2
    assert ((vectors.mT.cov() - oracle.covariance) / (spread / count).sqrt()).abs().max() < 4.5
    assert ((vectors.mT.cov() - oracle.variance.diag()) / (spread / count).sqrt()).abs().max() > 4.5
    law = posterior.predict(count, torch.Generator().manual_seed(0), recentred=True)
    assert law.samples is not None
    expected = (vectors - oracle.mean) @ jacobian.mT
    torch.testing.assert_close((law.samples - law.mean)[..., 0], expected, rtol=0, atol=1e-8)


def near(variance: Tensor, expected: Tensor, draws: int) -> bool:
    """Say whether variances over draws are within Monte-Carlo error of the truth."""
    return bool(((variance / expected - 1) / math.sqrt(2 / draws)).abs().max() < 4)


@pytest.mark.parametrize("network", [STRAIGHT, WAVY], ids=["linear", "curved"])
def test_all_parameters_without_a_jacobian(network) -> None:
    """The dense formula, within Monte-Carlo error; neither the prior's variance nor that of other noise."""
    outputs, jacobian, _, std = dense(network)
    precision = (1 / std.square()).diag() + (MATRIX @ jacobian).mT @ ((MATRIX @ jacobian) / NOISE[:, None])
    expected = (jacobian @ torch.linalg.inv(precision) @ jacobian.mT).diagonal()
    law = drawn(network)
    assert torch.equal(law.mean, outputs)
    assert near(law.variance[:, 0], expected, 1000)
    assert not near(law.variance[:, 0], (jacobian.square() @ std.square()), 1000)
    assert not near(drawn(network, noise=4 * NOISE).variance[:, 0], expected, 1000)
    oracle, _, constant = linear_model(network)
    centred = drawn(network, draws=2, recentred=True)
    torch.testing.assert_close(centred.mean[:, 0], constant + jacobian @ oracle.mean, rtol=0, atol=1e-7)
    exact = layer(network, names=None if network is STRAIGHT else CURVED).predict(0, torch.Generator())
    torch.testing.assert_close(exact.variance[:, 0], expected, rtol=0, atol=1e-10)


def test_few_parameters_leave_no_more_doubt_than_all() -> None:
    """Parameters that are held are a part of the prior's doubt that is left out."""
    every = layer(WAVY, names=CURVED).predict(0, torch.Generator()).variance
    for names in (["2"], ["0"], ["2.bias"]):
        assert (layer(WAVY, names=names).predict(0, torch.Generator()).variance <= every + 1e-14).all()


def test_the_spread_knows_neither_data_nor_prior_mean() -> None:
    moved = {"0.weight": torch.ones(4, 1), "0.bias": torch.ones(4)}
    moved |= {"2.weight": torch.ones(1, 4), "2.bias": torch.ones(1)}
    moved = {name: value.double() for name, value in moved.items()}
    one, other = drawn(WAVY, draws=5), drawn(WAVY, draws=5, prior_mean=moved)
    assert one.samples is not None
    assert other.samples is not None
    assert torch.equal(one.samples, other.samples)
    assert not torch.allclose(drawn(WAVY, draws=2, prior_mean=moved, recentred=True).mean, one.mean)
    found = layer(WAVY, names=CURVED, prior_mean=moved).predict(0, torch.Generator(), recentred=True)
    torch.testing.assert_close(
        found.mean, drawn(WAVY, draws=2, prior_mean=moved, recentred=True).mean, rtol=0, atol=1e-7
    )


def test_at_the_mode_the_linear_model_agrees_with_the_network() -> None:
    """Where the gradient of the log posterior vanishes, the linear model's mean is f(θ*); elsewhere not."""
    module = curved()
    optimiser = torch.optim.LBFGS(module.parameters(), 1, 300, 400, 1e-13, 1e-15, 50, "strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        misfit = ((forward(module(ROWS)[None])[0] - DATA).square() / NOISE).sum()
        prior = sum((p / stds(name, p)).square().sum() for name, p in module.named_parameters())
        value = 0.5 * (misfit + prior)
        value.backward()
        return value

    optimiser.step(loss)
    generator = torch.Generator()
    fitted = layer({"module": module, "inputs": (ROWS,)}, names=CURVED)
    mean = fitted.predict(0, generator).mean
    torch.testing.assert_close(fitted.predict(0, generator, recentred=True).mean, mean, rtol=0, atol=1e-5)
    start = layer(WAVY, names=CURVED)
    gap = start.predict(0, generator, recentred=True).mean - start.predict(0, generator).mean
    assert gap.abs().max() > 0.01


def test_limits_of_prior_and_noise() -> None:
    """No doubt for a prior without any; the prior's own doubt for data that say nothing."""
    _, jacobian, _, std = dense(WAVY, ["2"])
    prior = jacobian.square() @ std.square()
    generator = torch.Generator()
    assert layer(WAVY, prior=1e-9).predict(0, generator).variance.max() < 1e-17
    vague = layer(WAVY, noise=1e14).predict(0, generator).variance[:, 0]
    torch.testing.assert_close(vague, prior, rtol=1e-10, atol=0)
    assert (layer(WAVY).predict(0, generator).variance[:, 0] < prior).all()
    _, jacobian, _, std = dense(WAVY)
    assert near(drawn(WAVY, noise=1e14).variance[:, 0], jacobian.square() @ std.square(), 1000)
    assert drawn(WAVY, draws=5, prior=1e-9).variance.max() < 1e-16


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3))
def test_a_scale_is_another_prior(power: float) -> None:
    """Evidence and moments at c are those of a posterior made with prior standard deviations c s."""
    scale = 10**power
    scaled = layer(WAVY).scaled(scale)
    made = layer(WAVY, prior=lambda name, p: scale * stds(name, p))
    assert scaled.log_evidence == pytest.approx(made.log_evidence, abs=1e-7)
    one, other = (p.predict(2, torch.Generator(), recentred=True) for p in (scaled, made))
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-6, atol=0)


def test_the_scale_of_the_highest_evidence() -> None:
    found = layer(STRAIGHT)
    best = found.evidence_scale()
    top = found.scaled(best).log_evidence
    assert 1e-3 < best < 1e3
    assert all(found.scaled(best * c).log_evidence < top for c in (0.5, 0.99, 1.01, 2))
    assert found.evidence_scale(1e-4, best / 3) == pytest.approx(best / 3, rel=2e-6)
    assert found.evidence_scale(best * 3, 1e4) == pytest.approx(best * 3, rel=2e-6)


def test_draws_through_the_network() -> None:
    """Squashed they stay in the range, linearised they may not; where nothing is squashed both agree."""
    wide = layer(WAVY, prior=30.0, noise=1e4)
    through = wide.predict(200, torch.Generator().manual_seed(0), through=True)
    linear = wide.predict(200, torch.Generator().manual_seed(0))
    assert through.samples is not None
    assert linear.samples is not None
    assert ((through.samples >= 0) & (through.samples <= 1)).all()
    assert ((linear.samples < 0) | (linear.samples > 1)).any()
    torch.testing.assert_close(through.mean, through.samples.mean(0))
    one, other = (
        layer(STRAIGHT).predict(5, torch.Generator().manual_seed(0), through=through).samples
        for through in (True, False)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_draws_are_the_generators_and_nothing_else_is_touched() -> None:
    module = WAVY["module"]
    before = {name: p.clone() for name, p in module.named_parameters()}
    state = torch.get_rng_state()
    for make in (
        lambda seed: drawn(WAVY, draws=3, generator=torch.Generator().manual_seed(seed)),
        lambda seed: layer(WAVY).predict(3, torch.Generator().manual_seed(seed)),
    ):
        assert torch.equal(make(0).samples, make(0).samples)
        assert not torch.equal(make(0).samples, make(1).samples)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert all(p.grad is None for p in module.parameters())


def pictured(draws: int, chunk: int | None = None, **more) -> tuple[Picture, Projector, Tensor, Predictive]:
    picture = Picture(Field(FourierFeatures(6, 4.0, seed=0), 8, 1, seed=0), 8, chunk=chunk)
    projector = Projector(ParallelBeam(evenly(5), 8, 12))
    sinogram = projector.A(picture().detach())
    law = linearised_posterior(
        picture,
        projector.A,
        projector.A_adjoint,
        sinogram,
        0.01,
        0.5,
        draws=draws,
        generator=torch.Generator().manual_seed(0),
        **more,
    )
    return picture, projector, sinogram, law


def test_a_field_behind_a_projector() -> None:
    """In float32: the exact posterior of all its parameters, of which those of the read-out are a part."""
    told: list[int] = []
    picture, projector, sinogram, law = pictured(200, progress=told.append)
    generator = torch.Generator()
    last = last_layer_posterior(picture, projector.A, sinogram, 0.01, 0.5)
    assert list(last.f.parameters) == ["field.readout.weight", "field.readout.bias"]
    every = last_layer_posterior(picture, projector.A, sinogram, 0.01, 0.5, names=["field"])
    exact = every.predict(0, generator).variance
    assert law.variance.dtype == exact.dtype == torch.float32
    assert law.variance.shape == (8, 8)
    assert ((law.variance / exact - 1) / math.sqrt(2 / 200)).abs().max() < 4.5
    assert (last.predict(0, generator).variance <= exact * 1.0001).all()
    assert told == list(range(len(told)))
    assert len(told) > 5


def test_a_picture_in_chunks_is_the_same() -> None:
    """A checkpoint, which repeats what it has not stored, does so with the same parameters."""
    (*_, whole), (picture, projector, sinogram, parts) = pictured(2), pictured(2, chunk=20)
    torch.testing.assert_close(parts.samples, whole.samples, rtol=0, atol=1e-3)
    found = last_layer_posterior(picture, projector.A, sinogram, 0.01, 0.5).predict(0, torch.Generator())
    picture.chunk = None
    expected = last_layer_posterior(picture, projector.A, sinogram, 0.01, 0.5).predict(0, torch.Generator())
    torch.testing.assert_close(found.variance, expected.variance)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.weight.sum()


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(1, 1)

    def forward(self) -> Tensor:
        return torch.ones(2)


def test_one_number_and_parameters_without_effect() -> None:
    """y = a + b + ε with a, b ~ N(0, 2²): the sum has mean 8/9 y and variance 8/9, and evidence N(0, 9)."""
    target = torch.tensor(5.0)
    found = last_layer_posterior(Sum(), lambda f: f, target, 1.0, 2.0, names=["weight", "idle"])
    law = found.predict(4, torch.Generator().manual_seed(0), recentred=True)
    assert float(law.mean) == pytest.approx(8 / 9 * 5, rel=1e-6)
    assert float(law.variance) == pytest.approx(8 / 9, rel=1e-6)
    assert found.log_evidence == pytest.approx(-25 / 18 - 0.5 * math.log(2 * math.pi * 9), rel=1e-6)
    idle = last_layer_posterior(Sum(), lambda f: f, target, 1.0, 1.0, names=["idle"])
    assert float(idle.predict(0, torch.Generator()).variance) == 0
    with pytest.raises(InputError, match="depends on its parameters"):
        last_layer_posterior(Idle(), lambda f: f, torch.ones(2), 1.0, 1.0)


def test_input_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="'3' names no trainable parameter"):
        layer(WAVY, names=["3"])
    with pytest.raises(InputError, match="Tanh has no trainable linear layer"):
        layer({"module": nn.Tanh(), "inputs": (ROWS,)})
    for prior in (0.0, -1.0):
        with pytest.raises(InputError, match=r"standard deviation above 0|not negative"):
            layer(WAVY, prior=prior)
        with pytest.raises(InputError, match=r"standard deviation above 0|not negative"):
            drawn(WAVY, prior=prior)
    with pytest.raises(InputError, match="the prior's mean needs one tensor"):
        layer(WAVY, prior_mean={"2.weight": torch.zeros(1, 4)})
    with pytest.raises(InputError, match="the noise variance has to be above 0"):
        layer(WAVY, noise=0.0)
    with pytest.raises(InputError, match="the noise variance has to be above 0"):
        drawn(WAVY, noise=0.0)
    with pytest.raises(InputError, match=r"outputs \(12, 1\) to \(9,\), but the targets are \(4,\)"):
        layer(WAVY, noise=1.0, targets=DATA[:4])
    with pytest.raises(InputError, match="the targets has to be finite"):
        layer(WAVY, targets=DATA * torch.nan)
    with pytest.raises(InputError, match="what the map returns"):
        layer(WAVY, map_=lambda f: forward(f) / 0)
    wide = {"module": nn.Linear(3, 2000).double(), "inputs": (POWERS,)}
    with pytest.raises(InputError, match="at most 5000 parameters, not 8000"):
        layer(wide)
    dropping = {"module": nn.Sequential(nn.Dropout(0.1), straight()), "inputs": (POWERS,)}
    for run in (partial(layer, dropping), partial(drawn, dropping)):
        with pytest.raises(InputError, match=r"0 draws its masks anew; call module.eval\(\)"):
            run()
    dropping["module"].eval()
    layer(dropping)


def test_draws_and_maps_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="at least 2 draws, got 1"):
        drawn(WAVY, draws=1)
    with pytest.raises(InputError, match="at least 0, not -1"):
        layer(WAVY).predict(-1, torch.Generator())
    for draws in (0, 1):
        with pytest.raises(InputError, match="at least 2 of them"):
            layer(WAVY).predict(draws, torch.Generator(), through=True)
    for wrong in (
        lambda y: -adjoint(y),
        lambda y: 1.001 * adjoint(y),
        lambda y: torch.cat((adjoint(y)[:, :-1], torch.zeros(len(y), 1, 1)), 1),
        lambda y: adjoint(y) + 0.1,
    ):
        with pytest.raises(InputError, match="each other's adjoints, but"):
            drawn(WAVY, maps=(forward, wrong))
    with pytest.raises(InputError, match=r"the adjoint gives \(12,\), but the outputs are \(12, 1\)"):
        drawn(WAVY, maps=(forward, lambda y: y @ MATRIX))
    with pytest.raises(InputError, match="conjugate gradients"):
        drawn(WAVY, draws=2, iterations=1)
    with pytest.raises(InputError, match="finite and above 0, got 0"):
        layer(WAVY).scaled(0)
    for ends in ((0, 1), (2, 1), (1, math.inf)):
        with pytest.raises(InputError, match="scales run from above 0"):
            layer(WAVY).evidence_scale(*ends)
