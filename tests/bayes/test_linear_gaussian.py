"""The exact posterior of a linear model against the definition, its samplers, and Hamiltonian chains."""

import math

import pytest
import torch
from torch import Tensor

from gramian.bayes.convergence import effective_size
from gramian.bayes.hmc import HMCConfig, around, sample
from gramian.bayes.linear_gaussian import conjugate_gradients, exact_posterior, sampled_posterior
from gramian.errors import InputError


def rays(side: int) -> Tensor:
    """Give the sums of a square image over its rows, columns and diagonals: three views of a projector."""
    unit = torch.eye(side**2, dtype=torch.float64).view(-1, side, side)
    index = torch.arange(side)
    diagonals = (index[:, None] + index).flatten()
    slanted = torch.zeros(side**2, 2 * side - 1, dtype=torch.float64)
    slanted = slanted.index_add(1, diagonals, unit.flatten(1))
    return torch.cat((unit.sum(1), unit.sum(2), slanted), 1).mT.contiguous()


MATRIX = rays(4)
TRUTH = torch.linspace(-1, 1, 16, dtype=torch.float64).sin()
NOISE = torch.linspace(0.2, 0.8, len(MATRIX), dtype=torch.float64)
DATA = MATRIX @ TRUTH + NOISE.sqrt() * torch.randn(
    len(MATRIX), generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
PRIOR = torch.linspace(0.3, 0.6, 16, dtype=torch.float64)
CENTRE = torch.full((16,), 0.1, dtype=torch.float64)


def smooth() -> Tensor:
    place = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).view(16, 2)
    return torch.exp(-0.5 * torch.cdist(place, place).square()).double() + 0.01 * torch.eye(16)


@pytest.mark.parametrize("rows", [len(MATRIX), 5, 16, 40])
@pytest.mark.parametrize("prior", [0.7, PRIOR, smooth()], ids=["number", "variances", "matrix"])
def test_posterior_is_that_of_the_definition(rows, prior) -> None:
    """Through the data or through the precision, with less or more data than unknowns."""
    matrix, targets = MATRIX.repeat(4, 1)[:rows], DATA.repeat(4)[:rows]
    noise = NOISE.repeat(4)[:rows]
    covariance = prior if isinstance(prior, Tensor) else torch.tensor(prior, dtype=torch.float64)
    covariance = covariance if covariance.ndim == 2 else covariance.expand(16).diag()
    found = exact_posterior(matrix, targets, noise, prior, CENTRE)
    expected = torch.linalg.inv(torch.linalg.inv(covariance) + matrix.mT @ (matrix / noise[:, None]))
    gap = targets - matrix @ CENTRE
    mean = CENTRE + expected @ matrix.mT @ (gap / noise)
    torch.testing.assert_close(found.covariance, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-10)
    law = torch.distributions.MultivariateNormal(
        matrix @ CENTRE, matrix @ covariance @ matrix.mT + noise.diag()
    )
    assert found.log_evidence == pytest.approx(float(law.log_prob(targets)), abs=1e-9)
    assert (found.mean_field_variance <= found.variance + 1e-12).all()
    torch.testing.assert_close(found.mean_field_variance, 1 / torch.linalg.inv(expected).diagonal())
    rays_seen = found.predict(matrix, noise=0.1)
    torch.testing.assert_close(rays_seen.variance, (matrix @ expected @ matrix.mT).diagonal())
    assert torch.equal(found.predict().mean, found.mean)


def test_draws_have_its_moments() -> None:
    posterior = exact_posterior(MATRIX, DATA, NOISE, PRIOR)
    draws = posterior.sample(4000, torch.Generator().manual_seed(0))
    score = (draws.mean(0) - posterior.mean) / (posterior.variance / 4000).sqrt()
    assert score.abs().max() < 4
    spread = posterior.variance[:, None] * posterior.variance + posterior.covariance**2
    score = (draws.mT.cov() - posterior.covariance) / (spread / 4000).sqrt()
    assert score.abs().max() < 4.5
    assert ((draws.mT.cov() - posterior.variance.diag()) / (spread / 4000).sqrt()).abs().max() > 4.5


def forward(x: Tensor) -> Tensor:
    return (x.flatten(1) @ MATRIX.mT)[:, None]


def adjoint(y: Tensor) -> Tensor:
    return (y[:, 0] @ MATRIX).view(-1, 4, 4)


def perturbed(draws: int, adjoint=adjoint, **change):
    return sampled_posterior(
        forward,
        adjoint,
        DATA[None],
        NOISE[None],
        PRIOR.view(4, 4),
        CENTRE.view(4, 4),
        draws=draws,
        generator=torch.Generator().manual_seed(2),
        **{"tolerance": 1e-10, **change},
    )


def test_perturbing_and_solving_draws_from_it_without_a_matrix() -> None:
    exact = exact_posterior(MATRIX, DATA, NOISE, PRIOR, CENTRE)
    found = perturbed(3000)
    torch.testing.assert_close(found.mean.flatten(), exact.mean, rtol=0, atol=1e-8)
    ratio = (found.variance.flatten() / exact.variance - 1) / math.sqrt(2 / 3000)
    assert ratio.abs().max() < 4
    assert ((found.variance.flatten() / PRIOR - 1) / math.sqrt(2 / 3000)).abs().max() > 4
    assert found.samples is not None
    assert found.samples.shape == (3000, 4, 4)
    draws = found.samples.flatten(1)
    spread = exact.variance[:, None] * exact.variance + exact.covariance**2
    assert ((draws.mT.cov() - exact.covariance) / (spread / 3000).sqrt()).abs().max() < 4.5


def test_conjugate_gradients_solve_every_side() -> None:
    right = torch.stack((DATA @ MATRIX, torch.zeros(16).double(), TRUTH))
    matrix = MATRIX.mT @ MATRIX + torch.eye(16)
    found = conjugate_gradients(lambda x: x @ matrix, right, 1e-12)
    torch.testing.assert_close(found @ matrix, right, rtol=0, atol=1e-10)


def test_hamiltonian_chains_recover_it() -> None:
    """On the views of a small projector: mean and variance within Monte-Carlo error, of every pixel."""
    exact = exact_posterior(MATRIX, DATA, NOISE, PRIOR, CENTRE)

    def density(x: Tensor) -> Tensor:
        misfit = (MATRIX @ x.flatten() - DATA).square() / NOISE
        return -0.5 * misfit.sum() - 0.5 * ((x.flatten() - CENTRE).square() / PRIOR).sum()

    start = around(exact.mean.view(4, 4), 4, 0.1)
    config = HMCConfig(method="hmc", warmup=60, samples=150, leapfrogs=6, vectorised=False)
    chains = sample(density, start, config)
    assert chains.samples.shape == (4, 150, 4, 4)
    assert chains.r_hat.max() < 1.1
    gap = chains.draws - exact.mean
    score = gap.mean((0, 1)) / (exact.variance / effective_size(gap)).sqrt()
    assert score.abs().max() < 4
    square = gap.square()
    score = (square.mean((0, 1)) - exact.variance) / (exact.variance * (2 / effective_size(square)).sqrt())
    assert score.abs().max() < 4
    other = exact_posterior(MATRIX, DATA, NOISE / 4, PRIOR, CENTRE)  # taken for other noise, it is another
    wrong = (square.mean((0, 1)) - other.variance) / (other.variance * (2 / effective_size(square)).sqrt())
    assert wrong.abs().max() > 4


def test_input_that_cannot_be_used() -> None:
    for matrix, targets in ((MATRIX, DATA[:3]), (DATA, DATA), (MATRIX[:0], DATA[:0])):
        with pytest.raises(InputError, match="one target a row"):
            exact_posterior(matrix, targets, 1.0, 1.0)
    with pytest.raises(InputError, match="the matrix has to be finite"):
        exact_posterior(MATRIX * torch.nan, DATA, 1.0, 1.0)
    with pytest.raises(InputError, match="the noise variance has to be above 0"):
        exact_posterior(MATRIX, DATA, 0.0, 1.0)
    with pytest.raises(InputError, match="the prior covariance has to be one number"):
        exact_posterior(MATRIX, DATA, 1.0, PRIOR[:3])
    with pytest.raises(InputError, match="positive definite, 16 × 16"):
        exact_posterior(MATRIX, DATA, 1.0, -torch.eye(16))
    with pytest.raises(InputError, match="at least 0"):
        exact_posterior(MATRIX, DATA, 1.0, 1.0).sample(-1, torch.Generator())
    with pytest.raises(InputError, match="at least 2 draws"):
        perturbed(1)
    with pytest.raises(InputError, match="relative residual"):
        perturbed(2, iterations=2)
    with pytest.raises(InputError, match="adjoints"):
        perturbed(2, adjoint=lambda y: -adjoint(y))
    with pytest.raises(InputError, match="the maps have to take"):
        perturbed(2, adjoint=lambda y: adjoint(y)[:, :3])
