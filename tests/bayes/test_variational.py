"""Bayes by backprop against linear models, whose best mean-field Gaussian is known in closed form."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.bayes.flat import Flat, gaussian_prior
from gramian.bayes.linear_gaussian import GaussianPosterior, exact_posterior
from gramian.bayes.members import seeded
from gramian.bayes.variational import (
    Variational,
    VariationalConfig,
    _descended,
    fit_variational,
    inverse_softplus,
)
from gramian.core.jacobian import function
from gramian.errors import DivergedError, InputError

NOISE, PRIOR = 0.5, 2.0
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=GENERATOR, dtype=torch.float64) @ torch.tensor(
    [[1.0, 0.7, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64
)
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + NOISE**0.5 * torch.randn(
    12, 1, generator=GENERATOR, dtype=torch.float64
)
QUICK = VariationalConfig(steps=400, learning_rate=0.05, draws=3)


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False).double()


def likelihood(net) -> Tensor:
    return -0.5 * (net(X) - Y).square().sum() / NOISE


def exact(noise: float = NOISE, prior: float = PRIOR) -> GaussianPosterior:
    return exact_posterior(X, Y[:, 0], noise, prior**2)


@pytest.fixture(scope="module")
def fitted() -> Variational:
    return fit_variational(network(), likelihood, PRIOR, QUICK)


def close(found: Variational, truth: GaussianPosterior, variance: Tensor) -> bool:
    near = (found.std["weight"][0] / variance.sqrt()).log().abs() < 0.12
    return bool((near & ((found.mean["weight"][0] - truth.mean).abs() < 0.2 * variance.sqrt())).all())


def test_optimum_of_a_linear_model(fitted) -> None:
    """The mean of the posterior and 1/diag(precision), which are not the marginal variances."""
    truth = exact()
    assert close(fitted, truth, truth.mean_field_variance)
    assert not close(fitted, truth, truth.variance)
    assert fitted.finished
    assert len(fitted.losses) == QUICK.steps
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(fitted.mean["weight"], fitted.std["weight"]),
        torch.distributions.Normal(0.0, PRIOR),
    ).sum()
    assert fitted.kl == pytest.approx(float(expected), rel=1e-9)


def test_a_kl_weight_is_a_temperature() -> None:
    """λ KL − E ln p is λ times the objective of a likelihood p^{1/λ}."""
    found = fit_variational(network(), likelihood, PRIOR, dataclasses.replace(QUICK, kl_weight=0.25))
    truth = exact(NOISE * 0.25)
    assert close(found, truth, truth.mean_field_variance)
    assert not close(found, exact(), exact().mean_field_variance)


def test_bound_and_evidence(fitted) -> None:
    """λ KL − E ln p(y | θ) is at least −ln p(y), and above it by the KL from q to the posterior."""
    truth = exact()
    tail = fitted.losses[-200:] + 0.5 * len(X) * math.log(2 * math.pi * NOISE)
    law = torch.distributions.MultivariateNormal(truth.mean, truth.covariance)
    q = torch.distributions.MultivariateNormal(
        fitted.mean["weight"][0], fitted.std["weight"][0].square().diag()
    )
    gap = float(torch.distributions.kl_divergence(q, law))
    error = 4 * float(tail.std()) / 200**0.5
    assert float(tail.mean()) == pytest.approx(gap - truth.log_evidence, abs=error)
    assert float(tail.mean()) != pytest.approx(-truth.log_evidence, abs=error)


def gradients(weight: float, draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give values and gradients of the objective by mean and rho, at some Gaussians."""
    module = network()
    f = function(module)
    mean = torch.tensor([0.3, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    rho = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    config = VariationalConfig(draws=draws, kl_weight=weight)
    law, flat = gaussian_prior(f, PRIOR), Flat.of(f.parameters)
    with seeded(3, torch.device("cpu")):
        _descended(f, flat, law, lambda net: 0 * likelihood(net), mean, rho, config)
    only = (mean.grad, rho.grad)
    mean.grad = rho.grad = None
    with seeded(3, torch.device("cpu")):
        _descended(f, flat, law, likelihood, mean, rho, config)
    assert only[0] is not None
    assert only[1] is not None
    assert mean.grad is not None
    assert rho.grad is not None
    return only[0], only[1], mean.grad, rho.grad


def test_gradients_of_the_bound() -> None:
    """∂KL/∂μ = μ/s², ∂KL/∂σ = σ/s² − 1/σ; of the likelihood Aᵀ(Aμ − y)/σ_y² and σ (AᵀA)_ii/σ_y²."""
    mean = torch.tensor([0.3, -0.4, 1.0], dtype=torch.float64)
    rho = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    std, slope = torch.nn.functional.softplus(rho), torch.sigmoid(rho)
    of_mean, of_rho, whole_mean, whole_rho = gradients(0.7, 800)
    torch.testing.assert_close(of_mean, 0.7 * mean / PRIOR**2)
    torch.testing.assert_close(of_rho, 0.7 * (std / PRIOR**2 - 1 / std) * slope)
    matrix = X.mT @ X / NOISE
    expected = matrix @ mean - X.mT @ Y[:, 0] / NOISE
    error = (matrix.square() @ std.square() / 800).sqrt()
    assert ((whole_mean - of_mean - expected).abs() < 4 * error).all()
    variance = expected.square() + matrix.square() @ std.square() + (matrix.diagonal() * std).square()
    error = (variance / 800).sqrt() * slope
    expected = std * matrix.diagonal() * slope
    assert ((whole_rho - of_rho - expected).abs() < 4 * error).all()
    assert ((whole_rho - of_rho).abs() > 4 * error).any()


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


ROWS = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]


def curve(net) -> Tensor:
    return -0.5 * (net(ROWS) - (3 * ROWS).sin()).square().sum() / 0.01


def test_a_network_learns_and_predicts() -> None:
    module = deep()
    before = {name: p.clone() for name, p in module.named_parameters()}
    told: list[int] = []
    found = fit_variational(
        module,
        curve,
        lambda name, p: 1.0 if p.ndim == 1 else p.shape[1] ** -0.5 * 3,
        VariationalConfig(steps=300, learning_rate=0.05),
        progress=lambda step, loss: told.append(step),
    )
    assert told == list(range(1, 301))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    prediction = found.predict(ROWS, samples=50, noise=0.01)
    assert prediction.samples is not None
    assert prediction.samples.shape == (50, 20, 1)
    assert (prediction.mean - (3 * ROWS).sin()).square().mean() < 0.05
    assert (prediction.variance > 0).all()
    far = found.predict(3 * ROWS[-1:], samples=50).variance
    assert far.item() > prediction.variance.mean().item()
    assert torch.equal(prediction.mean, found.predict(ROWS, samples=50).mean)
    assert not torch.equal(prediction.mean, found.predict(ROWS, samples=50, seed=1).mean)


def test_it_starts_at_the_weights_of_the_module() -> None:
    module = deep()
    config = VariationalConfig(steps=1, learning_rate=1e-9, initial_std=0.05)
    found = fit_variational(module, curve, 2.0, config)
    for name, p in module.named_parameters():
        torch.testing.assert_close(found.mean[name], p.detach(), rtol=0, atol=1e-8)
        torch.testing.assert_close(found.std[name], torch.full_like(p, 0.1), rtol=1e-6, atol=0)
    values = torch.tensor([1e-6, 0.3, 40.0], dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(values)), values)


def test_frozen_parameters_stay() -> None:
    module = deep()
    module[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    found = fit_variational(module, curve, 1.0, VariationalConfig(steps=3))
    assert set(found.mean) == {"2.weight", "2.bias"}
    assert found.predict(ROWS, samples=3).mean.shape == (20, 1)


def noisy_curve(net) -> Tensor:
    """A likelihood of some rows, drawn by torch's global random numbers."""
    rows = torch.randperm(20)[:5]
    return -2 * (net(ROWS[rows]) - (3 * ROWS[rows]).sin()).square().sum() / 0.01


def test_seeds_repeat_and_a_stopped_fit_goes_on(tmp_path) -> None:
    config = VariationalConfig(steps=30)
    whole = fit_variational(deep(), noisy_curve, 1.0, config)
    before = torch.random.get_rng_state()
    again = fit_variational(deep_without_seed(), noisy_curve, 1.0, config)
    assert torch.equal(before, torch.random.get_rng_state())
    other = fit_variational(deep(), noisy_curve, 1.0, dataclasses.replace(config, seed=1))
    assert torch.equal(whole.losses, again.losses)
    assert not torch.equal(whole.losses, other.losses)
    for asked in (0, 11):
        calls = iter(range(100))
        part = fit_variational(deep(), noisy_curve, 1.0, config, stop=lambda c=calls, a=asked: next(c) >= a)
        assert not part.finished
        assert len(part.losses) == asked
        save_file(part.state, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
        resumed = fit_variational(deep(), noisy_curve, 1.0, config, resume=state)
        assert resumed.finished
        assert torch.equal(resumed.losses, whole.losses)
        for name, value in whole.state.items():
            assert torch.equal(resumed.state[name], value), name


MODULE = deep()


def deep_without_seed() -> nn.Module:
    return MODULE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps has to be"),
        ({"draws": 0}, "draws has to be"),
        ({"learning_rate": 0.0}, "learning_rate has to be"),
        ({"initial_std": -1.0}, "initial_std has to be"),
        ({"kl_weight": -0.1}, "kl_weight has to be"),
    ],
)
def test_settings_that_cannot_be_used(change, words) -> None:
    with pytest.raises(InputError, match=words):
        fit_variational(deep(), curve, 1.0, VariationalConfig(**change))


def test_what_cannot_be_fitted() -> None:
    config = VariationalConfig(steps=2)
    with pytest.raises(InputError, match="standard deviation above 0"):
        fit_variational(deep(), curve, 0.0, config)
    with pytest.raises(InputError, match="one entry for each"):
        fit_variational(deep(), curve, {"0.weight": 1.0}, config)
    with pytest.raises(InputError, match="one tensor for each trainable"):
        fit_variational(deep(), curve, 1.0, config, prior_mean={})
    with pytest.raises(InputError, match="one number as a tensor"):
        fit_variational(deep(), lambda net: net(ROWS), 1.0, config)
    with pytest.raises(InputError, match="depends on the module"):
        fit_variational(deep(), lambda net: torch.zeros(()), 1.0, config)
    with pytest.raises(DivergedError, match="at step 1"):
        fit_variational(deep(), lambda net: net(ROWS).sum() * torch.inf, 1.0, config)
    found = fit_variational(deep(), curve, 1.0, config)
    with pytest.raises(InputError, match="other settings"):
        fit_variational(deep(), curve, 1.0, VariationalConfig(steps=3), resume=found.state)
    with pytest.raises(InputError, match="of this module"):
        fit_variational(network(), likelihood, 1.0, config, resume=found.state)
    with pytest.raises(InputError, match="at least one draw"):
        found.sample(0)
