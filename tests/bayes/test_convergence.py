"""Diagnostics of chains against closed forms and an independent implementation."""

import math

import pytest
import torch
from torch import Tensor

from gramian.bayes.convergence import bulk_size, effective_size, r_hat, tail_size
from gramian.errors import InputError


def autoregressive(phi: float, chains: int, draws: int) -> Tensor:
    noise = torch.randn(chains, draws, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    noise[:, 0] /= math.sqrt(1 - phi**2)
    values = [noise[:, 0]]
    for t in range(1, draws):
        values.append(phi * values[-1] + noise[:, t])
    return torch.stack(values, 1)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.3])
def test_effective_size_of_an_autoregression(phi) -> None:
    draws = autoregressive(phi, 4, 4000)
    truth = 16_000 * (1 - phi) / (1 + phi)
    assert effective_size(draws).item() == pytest.approx(truth, rel=0.25)
    assert bulk_size(draws).item() == pytest.approx(truth, rel=0.25)
    assert r_hat(draws).item() < 1.02


ARVIZ = [
    (r_hat, [1.0331909872396128, 1.0041847327494358, 0.9901009317210301]),
    (bulk_size, [67.21478494659588, 255.6518149511676, 743.1363764158988]),
    (tail_size, [155.19471938012538, 145.73606531124997]),
    (effective_size, [65.08836247672284, 340.1170161750161, 743.1363764158988]),
]


def test_diagnostics_equal_those_of_arviz() -> None:
    """Values of arviz 0.20.0 for this array."""
    t = torch.arange(101, dtype=torch.float64)
    first = (0.31 * t).sin() * (1 + 0.02 * t) + (7.3 * t).sin()
    third = (t * 3.7).sin().round(decimals=1)
    chains = [
        torch.stack((first, (t * t * 0.017).cos() + 0.02 * c, third), -1).roll(17 * c, 0) for c in range(3)
    ]
    draws = torch.stack(chains)
    for found, known in ARVIZ:
        torch.testing.assert_close(
            found(draws[..., : len(known)]), torch.tensor(known, dtype=torch.float64), rtol=1e-9, atol=0
        )


def test_two_scales_around_one_mean_are_noticed() -> None:
    """Only the folded draws show them."""
    scale = torch.tensor([1.0, 1.0, 5.0, 5.0])[:, None]
    assert r_hat(scale * autoregressive(0.0, 4, 400)).item() > 1.1


def test_draws_that_cannot_be_diagnosed() -> None:
    assert r_hat(torch.ones(2, 10)).isnan()
    with pytest.raises(InputError, match="finite"):
        r_hat(torch.full((2, 10), torch.inf))
    with pytest.raises(InputError, match="at least 4 draws"):
        bulk_size(torch.ones(2, 3))
