"""Members that are solved for: draws from the posterior of their own kernel, by every way of solving."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from ensemble_oracles import OTHER, PRIOR, X, Y, delta, drawn, network, own_targets
from gramian.bayes import linearised
from gramian.bayes.ensemble import fit_ensemble
from gramian.bayes.members import EnsembleConfig
from gramian.bayes.ntk import ntk
from gramian.core.conditioning import condition
from gramian.core.jacobian import function, jacobian
from gramian.errors import InputError

CONFIG = EnsembleConfig(method="ntkgp_lin", members=600, prior=PRIOR, noise_variance=0.1)
EVERY = torch.cat([X, OTHER])
TRAIN = len(X)


def auxiliary() -> nn.Module:
    return drawn(CONFIG, network, "auxiliary", 0)


def posterior() -> tuple[Tensor, Tensor]:
    kernel = ntk(auxiliary(), EVERY, outputs="trace", weights=PRIOR)
    inside, cross, test = kernel[:TRAIN, :TRAIN], kernel[TRAIN:, :TRAIN], kernel[TRAIN:, TRAIN:]
    return condition(inside, cross, test, Y[:, 0], CONFIG.noise_variance)


def test_linear_members_are_draws_from_the_posterior_of_their_kernel() -> None:
    mean, covariance = posterior()
    found = fit_ensemble(network, X, Y, CONFIG, auxiliary=auxiliary()).functions(OTHER)[..., 0]
    std = covariance.diagonal().sqrt()
    assert bool(((found.mean(0) - mean).abs() < 4 * std / math.sqrt(len(found))).all())
    error = std[:, None] * std * math.sqrt(2 / len(found))
    assert bool(((found.T.cov() - covariance).abs() < 4.5 * error).all())


def test_members_that_share_their_targets_spread_too_little() -> None:
    """Control: at the training inputs the posterior's variance is largely that of the targets' noise."""
    settings = dataclasses.replace(CONFIG, noise_variance=1.0)
    kernel = ntk(auxiliary(), X, outputs="trace", weights=PRIOR)
    _, variance = condition(kernel, kernel, kernel.diagonal(), Y[:, 0], 1.0)
    for noisy, low, high in ((True, 0.85, 1.2), (False, 0.1, 0.7)):
        asked = dataclasses.replace(settings, noisy_targets=noisy)
        found = fit_ensemble(network, X, Y, asked, auxiliary=auxiliary()).functions(X)[..., 0].var(0)
        assert low < float((found / variance).mean()) < high


@pytest.mark.parametrize("method", ["ntkgp_param", "rp_param", "rp_fn", "ntkgp_fn"])
def test_linearised_members_have_their_closed_form(method: str) -> None:
    """f̃ = g + A(ỹ − g_X), g = f_0 + δ + J(a − θ_0), A = Θ_*X (Θ_XX + σ²I)⁻¹, at the member's own start."""
    config = dataclasses.replace(CONFIG, method=method, members=3, solver="exact")
    found = fit_ensemble(network, X, Y, config).functions(OTHER)[..., 0]
    for m in range(3):
        start = drawn(config, network, "start", m)
        whole = jacobian(function(start), EVERY)
        flat = torch.cat([whole[name].flatten(1) for name in PRIOR], 1)
        scale = torch.cat([torch.full_like(p[0, 0].flatten(), PRIOR[name]) for name, p in whole.items()])
        away = torch.cat([p.detach().flatten() for p in start.parameters()])
        with torch.no_grad():
            at_anchor = start(EVERY)[:, 0] + delta(config, network, m, EVERY)[:, 0]
        if method.endswith("fn"):
            at_anchor = at_anchor - flat @ away
        kernel = flat * scale @ flat.T
        inside = kernel[:TRAIN, :TRAIN] + config.noise_variance * torch.eye(TRAIN).double()
        lacking = own_targets(config, m)[:, 0] - at_anchor[:TRAIN]
        expected = at_anchor[TRAIN:] + kernel[TRAIN:, :TRAIN] @ torch.linalg.solve(inside, lacking)
        torch.testing.assert_close(found[m], expected, rtol=0, atol=1e-9)


def test_products_alone_solve_as_the_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, members=3)
    for shared in (None, auxiliary()):
        dense = fit_ensemble(network, X, Y, config, auxiliary=shared).functions(OTHER)
        with monkeypatch.context() as changed:
            changed.setattr(linearised, "DENSE", 3)
            alone = fit_ensemble(network, X, Y, config, auxiliary=shared).functions(OTHER)
        torch.testing.assert_close(alone, dense, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_linear_members_that_are_trained_reach_the_same_minimum() -> None:
    config = dataclasses.replace(CONFIG, members=2, steps=8000, learning_rate=0.05)
    solved = fit_ensemble(network, X, Y, config).functions(OTHER)
    asked = dataclasses.replace(config, solver="gradient", tolerance=1e-9)
    stepped = fit_ensemble(network, X, Y, asked).functions(OTHER)
    torch.testing.assert_close(stepped, solved, rtol=0, atol=1e-3)
    short = fit_ensemble(network, X, Y, dataclasses.replace(asked, steps=20)).functions(OTHER)
    assert (short - solved).abs().max() > 0.05  # control: without convergence it is another function


def test_duplicate_rows_without_noise_rest_on_the_jitter_and_float32_is_named() -> None:
    twice = torch.cat([X, X])
    config = dataclasses.replace(CONFIG, method="deep_ensemble", members=2, solver="exact")
    found = fit_ensemble(network, twice, torch.cat([Y, Y]), config).functions(X)
    torch.testing.assert_close(found, Y.expand(2, -1, -1), rtol=0, atol=1e-3)
    with pytest.raises(InputError, match=r"not positive definite in torch\.float32"):
        fit_ensemble(network, twice.float(), torch.cat([Y, Y]).float(), config)
