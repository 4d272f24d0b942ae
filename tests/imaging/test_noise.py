"""Noise has the level, the mean and the likelihood that it states."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm, poisson
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.noise import GaussianNoise, PoissonNoise
from reference import cases, load

F64 = torch.float64


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projections(*shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=draws(7), dtype=F64)


@pytest.mark.parametrize("decibel", [0.0, 20.0, 40.0, -6.0])
def test_noise_has_the_stated_ratio(decibel: float) -> None:
    sinogram = projections(300, 200)
    noise = GaussianNoise.at_snr(sinogram, decibel)
    rms = float(sinogram.square().mean().sqrt())
    assert noise.std == pytest.approx(rms * 10 ** (-decibel / 20), rel=1e-12)
    residual = noise.sample(sinogram, draws()) - sinogram
    count, variance = residual.numel(), float(residual.square().mean()) / noise.std**2
    assert abs(float(residual.mean())) * math.sqrt(count) < 4 * noise.std
    z = (variance - 1) * math.sqrt(count / 2)
    assert abs(z) < 4
    wrong = float(residual.square().mean()) / GaussianNoise.at_snr(sinogram, decibel + 0.5).std ** 2
    assert abs(wrong - 1) * math.sqrt(count / 2) > 4  # control: half a decibel is noticed


def test_the_level_is_that_of_all_measurements() -> None:
    """The spread around the mean is not what is asked for."""
    sinogram = torch.full((10, 10), 3.0)
    assert GaussianNoise.at_snr(sinogram, 40).std == pytest.approx(0.03)
    assert GaussianNoise.at_snr(2 * sinogram, 40).std == pytest.approx(0.06)


def test_draws_are_of_their_generator() -> None:
    sinogram, noise = projections(4, 5).float(), PoissonNoise(1e3)
    for one in (GaussianNoise(0.1), noise):
        same = [one.sample(sinogram, draws(1)) for _ in range(2)]
        assert torch.equal(*same)
        assert same[0].dtype == torch.float32
        assert not torch.equal(same[0], one.sample(sinogram, draws(2)))


def test_gaussian_likelihood() -> None:
    exact, noise = projections(3, 4), GaussianNoise(0.2)
    measured = noise.sample(exact, draws())
    expected = torch.from_numpy(norm.logpdf(measured.numpy(), exact.numpy(), 0.2))
    torch.testing.assert_close(noise.log_likelihood(measured, exact), expected, rtol=1e-12, atol=1e-12)
    shifted = noise.log_likelihood(measured, exact + 0.5)
    assert float(shifted.sum()) < float(expected.sum())  # control


def test_counts_are_poisson() -> None:
    line, noise = torch.full((200_000,), 1.3, dtype=F64), PoissonNoise(30.0)
    counts = noise.counts(line, draws())
    rate = 30 * math.exp(-1.3)
    assert torch.equal(counts, counts.round())
    assert abs(float(counts.mean()) - rate) * math.sqrt(len(line) / rate) < 4
    found = np.bincount(counts.long().numpy(), minlength=40)[:25] / len(line)
    expected = poisson.pmf(np.arange(25), rate)
    assert np.abs((found - expected) / np.sqrt(expected / len(line))).max() < 4.5
    wrong = poisson.pmf(np.arange(25), 1.03 * rate)  # control
    assert np.abs((found - wrong) / np.sqrt(wrong / len(line))).max() > 4.5


def test_poisson_likelihood() -> None:
    line, noise = projections(40), PoissonNoise(5.0)
    counts = noise.counts(line, draws())
    assert bool((counts == 0).any())
    rates = noise.expected(line)
    expected = torch.from_numpy(poisson.logpmf(counts.numpy(), rates.numpy()))
    torch.testing.assert_close(noise.log_likelihood(counts, line), expected, rtol=1e-12, atol=1e-12)
    x = line.clone().requires_grad_()
    noise.log_likelihood(counts, x).sum().backward()
    torch.testing.assert_close(x.grad, rates - counts, rtol=1e-12, atol=1e-12)


def test_counts_of_zero_have_a_line_integral() -> None:
    noise = PoissonNoise(100.0)
    counts = torch.tensor([0.0, 1.0, 100.0])
    expected = torch.tensor([math.log(1000), math.log(100), 0.0])
    torch.testing.assert_close(noise.line_integrals(counts), expected)
    torch.testing.assert_close(noise.transmission(counts), torch.tensor([0.0, 0.01, 1.0]))
    opaque = torch.full((50,), 30.0)
    assert bool(noise.sample(opaque, draws()).isfinite().all())
    assert not (-noise.transmission(noise.counts(opaque, draws())).log()).isfinite().any()  # control


def test_variance_of_measured_line_integrals() -> None:
    """The relative error of the approximation falls like the inverse of the counts."""
    errors = []
    for photons in (30.0, 300.0):
        noise, line = PoissonNoise(photons), torch.full((400_000,), 0.5, dtype=F64)
        found = float(noise.sample(line, draws()).var())
        errors.append(abs(found / float(noise.log_variance(line)[0]) - 1))
    assert errors[1] < 0.02
    assert errors[0] > 3 * errors[1]


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("tomography"))
def test_level_equals_the_reference(path: Path) -> None:
    case = load(path)
    if "noise_std" not in case.spec.get("scalars", {}):
        pytest.skip("no noise in this case")
    clean = case.arrays["sinogram_truth"]
    decibel = case.spec["config"]["snr_db"]
    assert GaussianNoise.at_snr(clean, decibel).std == pytest.approx(
        case.spec["scalars"]["noise_std"], rel=1e-9
    )
    assert GaussianNoise.at_snr(clean - clean.mean(), decibel).std != pytest.approx(
        case.spec["scalars"]["noise_std"], rel=1e-3
    )  # control


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GaussianNoise(-1.0), "at least 0"),
        (lambda: GaussianNoise(math.nan), "at least 0"),
        (lambda: GaussianNoise.at_snr(torch.zeros(0), 40), "finite numbers"),
        (lambda: GaussianNoise.at_snr(torch.tensor([math.nan]), 40), "finite numbers"),
        (lambda: GaussianNoise.at_snr(torch.ones(3), math.inf), "decibels"),
        (lambda: GaussianNoise(0.0).log_likelihood(torch.ones(1), torch.ones(1)), "no density"),
        (lambda: PoissonNoise(0.0), "photons"),
        (lambda: PoissonNoise(1.0, 0.0), "no photon"),
        (lambda: PoissonNoise(1.0).counts(torch.tensor([math.nan]), draws()), "finite line integrals"),
        (lambda: PoissonNoise(1.0).line_integrals(torch.tensor([-1.0])), "at least 0"),
    ],
)
def test_bad_input(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]
