"""Hamiltonian samplers against Gaussians, whose every moment is known, and against spoiled versions."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.bayes import trajectory
from gramian.bayes.adaptation import DualAveraging, Variances, windows
from gramian.bayes.chains import Chains
from gramian.bayes.convergence import effective_size
from gramian.bayes.flat import log_posterior
from gramian.bayes.hmc import HMCConfig, around, sample
from gramian.bayes.trajectory import Asking, Motion, Point, leapfrog
from gramian.errors import InputError

COVARIANCE = torch.tensor([[1.0, 1.2], [1.2, 4.0]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)
MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
QUICK = HMCConfig(warmup=50, samples=150, leapfrogs=4, vectorised=False)


def gaussian(x: Tensor) -> Tensor:
    return -0.5 * (x - MEAN) @ PRECISION @ (x - MEAN)


def starts(chains: int = 4, seed: int = 0) -> Tensor:
    noise = torch.randn(chains, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MEAN + noise @ torch.linalg.cholesky(COVARIANCE).mT


def scores(draws: Tensor, covariance: Tensor = COVARIANCE, mean: Tensor = MEAN) -> Tensor:
    """Give (estimate − truth)/(Monte-Carlo error) of all first and second moments of a Gaussian."""
    gap = draws - mean
    rows, columns = torch.triu_indices(len(mean), len(mean))
    products, moments = gap[..., rows] * gap[..., columns], covariance[rows, columns]
    spread = covariance.diagonal()[rows] * covariance.diagonal()[columns] + moments.square()
    first = gap.mean((0, 1)) / (covariance.diagonal() / effective_size(gap)).sqrt()
    second = (products.mean((0, 1)) - moments) / (spread / effective_size(products)).sqrt()
    return torch.cat((first, second))


def follow(asking: Asking, density: Callable[[Tensor], Tensor]):
    """Answer one chain's coroutine."""
    try:
        position = next(asking)
        while True:
            position = asking.send(valued(density, position))
    except StopIteration as end:
        return end.value


def valued(density: Callable[[Tensor], Tensor], position: Tensor) -> tuple[float, Tensor]:
    leaf = position.clone().requires_grad_()
    value = density(leaf)
    return float(value.detach()), torch.autograd.grad(value, leaf)[0]


def point(position: list[float], momentum: list[float], density: Callable[[Tensor], Tensor]) -> Point:
    here = torch.tensor(position, dtype=torch.float64)
    return Point(here, torch.tensor(momentum, dtype=torch.float64), *valued(density, here))


def wrong_half_step(start: Point, step: float, inverse_mass: Tensor) -> Asking[Point]:
    half = start.momentum + 0.5 * step * start.gradient
    position = start.position + step * inverse_mass * half
    log_density, gradient = yield position
    return Point(position, half - 0.5 * step * gradient, log_density, gradient)


def quartic(x: Tensor) -> Tensor:
    return -(x**4).sum() / 4 - 0.5 * (x[0] - x[1]) ** 2


def driven(start: Point, step: float, count: int, integrator=leapfrog) -> Point:
    for _ in range(count):
        start = follow(integrator(start, step, torch.tensor([1.0, 0.5], dtype=torch.float64)), quartic)
    return start


def energy(at: Point) -> float:
    motion = Motion(1.0, torch.tensor([1.0, 0.5], dtype=torch.float64), torch.Generator())
    return motion.energy(at)


def energy_slope(integrator) -> float:
    begin, steps = point([0.7, -0.4], [0.5, 1.1], quartic), [0.1, 0.05, 0.025, 0.0125]
    errors = [abs(energy(driven(begin, s, round(1 / s), integrator)) - energy(begin)) for s in steps]
    return (math.log(errors[0]) - math.log(errors[-1])) / math.log(8)


def test_energy_error_falls_with_the_square_of_the_step() -> None:
    assert energy_slope(leapfrog) == pytest.approx(2, abs=0.1)
    assert energy_slope(wrong_half_step) < 1


@pytest.mark.parametrize(("integrator", "holds"), [(leapfrog, True), (wrong_half_step, False)])
def test_a_trajectory_leads_back(integrator, holds) -> None:
    begin = point([0.7, -0.4], [0.5, 1.1], quartic)
    back = driven(driven(begin, 0.05, 40, integrator), -0.05, 40, integrator)
    gap = (back.position - begin.position).abs().max() + (back.momentum - begin.momentum).abs().max()
    assert (gap < 1e-10) == holds


@pytest.mark.parametrize("method", ["nuts", "hmc"])
def test_moments_of_a_correlated_gaussian(method) -> None:
    chains = sample(gaussian, starts(), dataclasses.replace(QUICK, method=method))
    assert chains.finished
    assert scores(chains.draws).abs().max() < 4
    assert scores(chains.draws, COVARIANCE * 3).abs().max() > 4
    assert chains.divergences.sum() == 0
    assert 0.7 < chains.acceptance.mean() < 0.98
    assert chains.r_hat.max() < 1.05
    assert (chains.step_sizes > 0.1).all()
    torch.testing.assert_close(chains.log_density[1, 5], gaussian(chains.draws[1, 5]))


FIXED = dataclasses.replace(
    QUICK, method="hmc", warmup=0, samples=300, leapfrogs=1, step_size=1.2, search=False
)


@pytest.mark.parametrize("spoiled", ["nothing", "leapfrog", "accepted"])
def test_a_wrong_integrator_or_acceptance_is_found_out(spoiled, monkeypatch) -> None:
    wrong = {"leapfrog": wrong_half_step, "accepted": lambda error: 1.0}
    if spoiled in wrong:
        monkeypatch.setattr(trajectory, spoiled, wrong[spoiled])
    worst = scores(sample(gaussian, starts(), FIXED).draws).abs().max()
    assert (worst < 4) == (spoiled == "nothing")


def test_a_banana() -> None:
    """x ~ N(0, 1), y | x ~ N(x², 1): the mean of y is 1."""

    def banana(z: Tensor) -> Tensor:
        return -0.5 * z[0] ** 2 - 0.5 * (z[1] - z[0] ** 2) ** 2

    begin = torch.zeros(4, 2, dtype=torch.float64)
    draws = sample(banana, begin, dataclasses.replace(QUICK, method="hmc", leapfrogs=6)).draws
    for values, truth in ((draws[..., 0], 0.0), (draws[..., 1], 1.0), (draws[..., 0] ** 2, 1.0)):
        assert abs(values.mean() - truth) < 4 * (values.var() / effective_size(values)).sqrt()


@pytest.mark.slow
def test_a_funnel() -> None:
    """v ~ N(0, 1), x | v ~ N(0, e^v)."""

    def funnel(z: Tensor) -> Tensor:
        return -0.5 * z[0] ** 2 - 0.5 * z[1] ** 2 * (-z[0]).exp() - 0.5 * z[0]

    begin = torch.zeros(4, 2, dtype=torch.float64)
    draws = sample(funnel, begin, dataclasses.replace(QUICK, method="hmc", leapfrogs=6)).draws[..., 0]
    for values, truth in ((draws, 0.0), (draws**2, 1.0)):
        assert abs(values.mean() - truth) < 4 * (values.var() / effective_size(values)).sqrt()


def test_divergences_are_counted_and_refused() -> None:
    stiff = dataclasses.replace(FIXED, samples=5, step_size=80.0)
    for method in ("hmc", "nuts"):
        chains = sample(gaussian, starts(2), dataclasses.replace(stiff, method=method))
        assert chains.divergences.tolist() == [5, 5]
        assert torch.equal(chains.draws, starts(2)[:, None].expand(2, 5, 2))


def test_a_region_without_density_is_never_entered() -> None:
    def half_normal(x: Tensor) -> Tensor:
        return torch.where(x[0] > 0, -0.5 * x[0] ** 2, -torch.inf)

    config = dataclasses.replace(QUICK, method="hmc", warmup=20, samples=100)
    draws = sample(half_normal, torch.ones(4, 1, dtype=torch.float64), config).draws
    assert (draws > 0).all()
    error = (draws.var() / effective_size(draws)).sqrt().item()
    assert draws.mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=4 * error)


def test_temperature_scales_the_covariance() -> None:
    chains = sample(gaussian, starts(), dataclasses.replace(QUICK, method="hmc", temperature=4.0))
    assert scores(chains.draws, 4 * COVARIANCE).abs().max() < 4
    assert scores(chains.draws).abs().max() > 4


def test_chains_have_numbers_of_their_own_and_repeat() -> None:
    config = dataclasses.replace(QUICK, warmup=20, samples=6)
    begin = around(MEAN, 3)
    one, two = (sample(gaussian, begin, config).draws for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    other = sample(gaussian, begin, dataclasses.replace(config, seed=1)).draws
    assert not torch.equal(one, other)
    together = sample(gaussian, begin, dataclasses.replace(config, vectorised=True)).draws
    torch.testing.assert_close(together, one, rtol=0, atol=1e-6)


def test_a_density_that_vmap_cannot_run_goes_chain_by_chain() -> None:
    def branching(x: Tensor) -> Tensor:
        return gaussian(x) if float(x.detach()[0]) > -100 else -gaussian(x)

    config = dataclasses.replace(QUICK, warmup=0, samples=5, vectorised=True)
    plain = sample(gaussian, starts(2), dataclasses.replace(config, vectorised=False))
    assert torch.equal(sample(branching, starts(2), config).draws, plain.draws)


@pytest.mark.parametrize("asked", [40, 400])
def test_stopped_and_resumed_equals_uninterrupted(asked, tmp_path) -> None:
    config = dataclasses.replace(QUICK, warmup=30, samples=20, thinning=2)
    whole = sample(gaussian, starts(2), config)
    calls = iter(range(10**6))
    part = sample(gaussian, starts(2), config, stop=lambda: next(calls) >= asked)
    assert not part.finished
    assert part.draws.shape[1] < 20
    save_file(part.state, tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    resumed = sample(gaussian, starts(2), config, resume=state)
    assert resumed.finished
    assert resumed.state.keys() == whole.state.keys()
    for name, value in whole.state.items():
        assert torch.equal(resumed.state[name], value), name
    longer = sample(gaussian, starts(2), dataclasses.replace(config, samples=25), resume=resumed.state)
    assert longer.draws.shape == (2, 25, 2)
    assert torch.equal(longer.draws[:, :20], whole.draws)


def test_thinning_keeps_every_other_draw_and_progress_is_told() -> None:
    config = dataclasses.replace(QUICK, warmup=10, samples=12)
    told = []
    every = sample(gaussian, starts(2), config, progress=told.append)
    half = sample(gaussian, starts(2), dataclasses.replace(config, samples=6, thinning=2))
    assert torch.equal(every.draws[:, 1::2], half.draws)
    assert [p.done for p in told] == list(range(1, 23))
    assert [p.warming for p in told] == [True] * 10 + [False] * 12
    assert told[-1].log_density == tuple(every.log_density[:, -1].tolist())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


def test_parameters_of_a_module() -> None:
    """A linear module with Gaussian noise has a Gaussian posterior."""
    module, generator = network(), torch.Generator().manual_seed(3)
    x = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    y = x[:, :1] - 0.5 + 0.3 * torch.randn(12, 1, generator=generator, dtype=torch.float64)
    density = log_posterior(module, lambda net: -0.5 * ((net(x) - y) / 0.3).square().sum(), 2.0)
    begin = around({name: p.detach() for name, p in module.named_parameters()}, 4, 0.1)
    config = dataclasses.replace(QUICK, method="hmc", warmup=100, leapfrogs=5, vectorised=True)
    chains = sample(density, begin, config)
    assert {name: tuple(v.shape) for name, v in chains.samples.items()} == {
        "weight": (4, 150, 1, 2),
        "bias": (4, 150, 1),
    }
    rows = torch.cat((x, torch.ones(12, 1, dtype=torch.float64)), 1)
    covariance = torch.linalg.inv(rows.mT @ rows / 0.09 + torch.eye(3) / 4)
    mean = (covariance @ rows.mT @ y / 0.09)[:, 0]
    assert scores(chains.draws, covariance, mean).abs().max() < 4
    assert chains.r_hat["weight"].shape == (1, 2)
    assert (chains.effective_samples.bulk["bias"] > 50).all()
    assert (chains.effective_samples.tail["bias"] > 50).all()
    found = chains.predict(lambda p: x @ p["weight"][0] + p["bias"], noise=0.09)
    error = (found.variance / effective_size(chains.draws).min()).sqrt()
    assert ((found.mean - rows @ mean).abs() < 4 * error).all()
    torch.testing.assert_close(found.variance, (rows @ covariance * rows).sum(1), rtol=0.5, atol=0)
    assert found.samples is not None
    assert found.samples.shape == (600, 12)


def test_chains_stuck_in_two_modes() -> None:
    def modes(x: Tensor) -> Tensor:
        return torch.logaddexp(-0.5 * (x[0] - 8) ** 2, -0.5 * (x[0] + 8) ** 2)

    config = dataclasses.replace(QUICK, method="hmc", warmup=30, samples=60)
    apart = torch.tensor([[8.0], [8.0], [-8.0], [-8.0]], dtype=torch.float64)
    chains = sample(modes, apart, config)
    assert chains.r_hat.item() > 1.5
    assert sample(modes, apart.abs(), config).r_hat.item() < 1.1
    assert chains.effective_samples.bulk.item() < 10


def test_what_the_warm_up_learns() -> None:
    assert windows(500) == (75, (100, 150, 250, 450))
    assert windows(1000) == (75, (100, 150, 250, 450, 950))
    assert windows(100) == (15, (90,))
    assert windows(10) == (10, ())
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = Variances.none(x[0])
    for row in x:
        seen = seen.updated(row)
    torch.testing.assert_close(seen.regularised(), 40 / 45 * x.var(0) + 5 / 45 * 1e-3)
    averaging = DualAveraging.around(1.0)
    for _ in range(500):
        averaging = averaging.updated(math.exp(-averaging.step), 0.8)
    assert averaging.final == pytest.approx(-math.log(0.8), rel=0.05)


def test_the_mass_is_that_of_the_posterior() -> None:
    scale = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    config = dataclasses.replace(QUICK, warmup=100, samples=10, method="hmc", leapfrogs=10)
    chains = sample(lambda x: -0.5 * (x / scale).square().sum(), around(scale, 2), config)
    assert ((chains.inverse_mass.sqrt() / scale).log().abs() < math.log(2)).all()
    plain = sample(
        lambda x: -0.5 * x.square().sum(),
        around(scale[:1], 1),
        dataclasses.replace(config, adapt_mass=False, warmup=30, samples=4),
    )
    assert (plain.inverse_mass == 1).all()


def test_known_variances_let_chains_cross_an_ill_conditioned_density() -> None:
    scale = torch.logspace(-3, 0, 10, dtype=torch.float64)
    config = dataclasses.replace(QUICK, warmup=50, samples=200, adapt_mass=False, max_depth=4, step_size=0.1)

    def density(x: dict[str, Tensor]) -> Tensor:
        return -0.5 * (torch.cat([x["a"], x["b"]]) / scale).square().sum()

    start = around({"a": 0 * scale[:4], "b": 0 * scale[4:]}, 2)
    variances = {"b": scale[4:].square(), "a": scale[:4].square()}
    blind, knowing = (sample(density, start, config, inverse_mass=m) for m in (None, variances))
    torch.testing.assert_close(knowing.inverse_mass, scale.square().expand(2, -1))
    spread = knowing.draws.flatten(0, 1).std(0) / scale
    assert ((spread > 0.8) & (spread < 1.2)).all()
    widest = [float(chains.r_hat["b"].max()) for chains in (knowing, blind)]
    assert widest[0] < 1.1 < 1.5 < widest[1]


@pytest.mark.parametrize(
    ("variances", "words"),
    [
        (torch.ones(3), "one variance for each unknown"),
        ({"x": torch.ones(2)}, "one variance for each unknown"),
        (torch.tensor([1.0, 0.0]), "above 0, not 0"),
        (torch.tensor([1.0, math.nan]), "above 0, not nan"),
    ],
)
def test_variances_that_cannot_be_used(variances, words) -> None:
    with pytest.raises(InputError, match=words):
        sample(lambda x: -x.square().sum(), torch.zeros(2, 2), QUICK, inverse_mass=variances)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "gibbs"}, "choose one of nuts, hmc"),
        ({"samples": 0}, "samples has to be"),
        ({"warmup": -1}, "warmup has to be"),
        ({"thinning": 0}, "thinning has to be"),
        ({"max_depth": 0}, "max_depth has to be"),
        ({"leapfrogs": 0}, "leapfrogs has to be"),
        ({"step_size": 0.0}, "step_size has to be"),
        ({"temperature": math.nan}, "temperature has to be"),
        ({"jitter": 1.0}, "jitter has to be"),
        ({"target_acceptance": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_used(change, words) -> None:
    with pytest.raises(InputError, match=words):
        sample(gaussian, starts(), dataclasses.replace(QUICK, **change))


def test_starts_and_densities_that_cannot_be_used() -> None:
    bad = starts()
    bad[2, 0] = torch.nan
    with pytest.raises(InputError, match="chain 2 starts at nan"):
        sample(gaussian, bad, QUICK)
    with pytest.raises(InputError, match="other derivatives"):
        sample(lambda x: -x.abs().sqrt().sum(), torch.zeros(2, 1), QUICK)
    with pytest.raises(InputError, match="one floating number"):
        sample(lambda x: -x.square(), starts(), QUICK)
    with pytest.raises(InputError, match="differentiable"):
        sample(lambda x: gaussian(x.detach()), starts(), QUICK)
    for unknowns in (torch.ones(3, dtype=torch.int64), {}, torch.zeros(0, 2), torch.tensor(1.0)):
        with pytest.raises(InputError, match=r"unknowns have|start has"):
            sample(gaussian, unknowns, QUICK)
    with pytest.raises(InputError, match="one dtype"):
        sample(gaussian, {"a": torch.ones(2, 1), "b": torch.ones(2, 1).double()}, QUICK)
    with pytest.raises(InputError, match="at least 1 chain"):
        around(MEAN, 0)
    with pytest.raises(InputError, match="standard deviation above 0"):
        log_posterior(network(), lambda net: net(MEAN).sum(), 0.0)


def test_states_that_cannot_be_resumed() -> None:
    config = dataclasses.replace(QUICK, warmup=3, samples=4)
    state = sample(gaussian, starts(2), config).state
    with pytest.raises(InputError, match="other settings"):
        sample(gaussian, starts(2), dataclasses.replace(config, seed=5), resume=state)
    with pytest.raises(InputError, match="start holds"):
        sample(gaussian, starts(3), config, resume=state)
    with pytest.raises(InputError, match="beyond"):
        sample(gaussian, starts(2), dataclasses.replace(config, samples=2), resume=state)
    with pytest.raises(InputError, match="lacks generator"):
        sample(gaussian, starts(2), config, resume={k: v for k, v in state.items() if k != "generator"})


def test_too_few_draws() -> None:
    nothing = sample(gaussian, starts(2), QUICK, stop=lambda: True)
    assert nothing.draws.shape == (2, 0, 2)
    assert isinstance(nothing, Chains)
    with pytest.raises(InputError, match="at least 2 draws"):
        nothing.predict(lambda x: x)
    with pytest.raises(InputError, match="at least 4 draws"):
        _ = nothing.r_hat
