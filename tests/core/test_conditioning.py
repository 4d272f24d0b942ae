import math
from pathlib import Path

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from gramian.core.conditioning import condition, information_gain, log_evidence
from gramian.errors import InputError
from reference import cases, load

F64 = torch.float64
NOISE = 0.1


def problem(n: int = 12, m: int = 5, k: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train, cross and test kernel, and targets of k columns."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n + m, 3, generator=generator, dtype=F64)
    kernel = (-torch.cdist(x, x).square() / 2).exp()
    return kernel[:n, :n], kernel[n:, :n], kernel[n:, n:], torch.randn(n, k, generator=generator, dtype=F64)


def test_posterior_equals_the_dense_inverse() -> None:
    train, cross, test, targets = problem()
    inverse = torch.linalg.inv(train + NOISE * torch.eye(12, dtype=F64))
    mean, covariance = condition(train, cross, test, targets, NOISE)
    torch.testing.assert_close(mean, cross @ inverse @ targets, rtol=1e-11, atol=1e-12)
    expected = test - cross @ inverse @ cross.T
    torch.testing.assert_close(covariance, expected, rtol=1e-11, atol=1e-12)
    single, variance = condition(train, cross, test.diagonal(), targets[:, 0], NOISE)
    torch.testing.assert_close(single, mean[:, 0], rtol=1e-14, atol=0)
    torch.testing.assert_close(variance, expected.diagonal(), rtol=1e-11, atol=1e-12)
    other, _ = condition(train, cross, test, targets, NOISE + 1e-6)
    assert not torch.allclose(other, mean, rtol=1e-9)  # control: the noise counts


def test_posterior_and_evidence_equal_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    x, new = torch.randn(15, 2, generator=generator), torch.randn(6, 2, generator=generator)
    y = x[:, 0].sin() + x[:, 1]
    theirs = GaussianProcessRegressor(RBF(1.0), alpha=NOISE, optimizer=None).fit(x.double(), y.double())
    everything = torch.cat((x, new)).double()
    kernel = (-torch.cdist(everything, everything).square() / 2).exp()
    mean, covariance = condition(kernel[:15, :15], kernel[15:, :15], kernel[15:, 15:], y.double(), NOISE)
    expected = [torch.as_tensor(part) for part in theirs.predict(new.double().numpy(), return_cov=True)]
    torch.testing.assert_close(mean, expected[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(covariance, expected[1], rtol=1e-9, atol=1e-10)
    evidence = log_evidence(kernel[:15, :15], y.double(), NOISE)
    assert float(evidence) == pytest.approx(theirs.log_marginal_likelihood_value_, rel=1e-10)


def test_evidence_and_information_gain_equal_their_distributions() -> None:
    train, _, _, targets = problem()
    eye = torch.eye(12, dtype=F64)
    prior = MultivariateNormal(torch.zeros(12, dtype=F64), train)
    marginal = MultivariateNormal(torch.zeros(12, dtype=F64), train + NOISE * eye)
    evidence = log_evidence(train, targets, NOISE)
    torch.testing.assert_close(evidence, marginal.log_prob(targets.T), rtol=1e-11, atol=0)
    mean, covariance = condition(train, train, train, targets, NOISE)
    posteriors = [MultivariateNormal(mean[:, i], (covariance + covariance.T) / 2) for i in range(2)]
    expected = torch.stack([kl_divergence(posterior, prior) for posterior in posteriors])
    gained = information_gain(train, targets, NOISE)
    torch.testing.assert_close(gained, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(information_gain(train, targets[:, 0], NOISE), gained[0])
    assert not torch.allclose(gained, information_gain(train, 1.001 * targets, NOISE), rtol=1e-6)  # control


def test_information_gain_of_one_point() -> None:
    one, y = torch.ones(1, 1, dtype=F64), torch.tensor([1.5], dtype=F64)
    truth = 0.5 * (math.log(1 + 1 / NOISE) - 1 / (1 + NOISE) + (1.5 / (1 + NOISE)) ** 2)
    assert float(information_gain(one, y, NOISE)) == pytest.approx(truth, rel=1e-12)


def test_the_evidence_is_differentiable_in_the_noise() -> None:
    train, _, _, targets = problem()
    noise = torch.tensor(NOISE, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: log_evidence(train, targets, s), noise)


def test_single_precision_is_computed_in_double() -> None:
    train, cross, test, targets = (part.float() for part in problem())
    mean, covariance = condition(train, cross, test, targets, NOISE)
    assert mean.dtype == covariance.dtype == F64


def test_the_jitter_is_a_share_of_the_mean_variance() -> None:
    train, cross, test, targets = problem()
    train, cross, test = 4 * train, 4 * cross, 4 * test
    with_jitter = condition(train, cross, test, targets, NOISE, jitter=1e-3)
    with_noise = condition(train, cross, test, targets, NOISE + 4e-3)
    for got, expected in zip(with_jitter, with_noise, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_duplicates_without_noise_need_the_jitter() -> None:
    train, targets = torch.ones(3, 3, dtype=F64), torch.ones(3, dtype=F64)
    mean, variance = condition(train, train, train.diagonal(), targets, 0.0, jitter=1e-10)
    torch.testing.assert_close(mean, targets, rtol=1e-9, atol=0)
    assert variance.min() >= 0
    with pytest.raises(InputError, match="smallest eigenvalue"):
        condition(train, train, train.diagonal(), targets, 0.0)


def test_bad_input_is_named() -> None:
    train, cross, test, targets = problem()
    indefinite = train - 2 * torch.eye(12, dtype=F64)
    smallest = f"{float(torch.linalg.eigvalsh(indefinite)[0]) + NOISE:.3g}"
    with pytest.raises(InputError, match=f"smallest eigenvalue is {smallest}"):
        condition(indefinite, cross, test, targets, NOISE)
    for noise in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="noise variance has to be a finite number of at least 0"):
            log_evidence(train, targets, noise)
    with pytest.raises(InputError, match="jitter"):
        log_evidence(train, targets, NOISE, jitter=-1.0)
    with pytest.raises(InputError, match="targets has to be finite"):
        log_evidence(train, targets * torch.nan, NOISE)
    with pytest.raises(InputError, match="train kernel has to be finite"):
        log_evidence(train * torch.inf, targets, NOISE)
    with pytest.raises(InputError, match="cross kernel has to be finite"):
        condition(train, cross * torch.nan, test, targets, NOISE)
    skew = train.clone()
    skew[0, 1] += 0.1
    with pytest.raises(InputError, match=r"symmetric, but its halves differ by 0\.1"):
        log_evidence(skew, targets, NOISE)
    with pytest.raises(InputError, match="infinitely far"):
        information_gain(train, targets, 0.0)


POSTERIORS = [case for case in cases("ntk") if case.id == "absent" or case.id.startswith("gp_posterior")]


@pytest.mark.parity
@pytest.mark.parametrize("path", POSTERIORS)
def test_posterior_equals_reference(path: Path) -> None:
    case = load(path)
    arrays, noise = case.arrays, case.spec["config"]["noise_variance"]
    for kernel, name in (("nngp", "nngp"), ("ntk", "ntkgp")):
        grams = [arrays[f"{kernel}_{part}"] for part in ("train_train", "test_train", "test_test_diag")]
        mean, variance = condition(*grams, arrays["y_train"].squeeze(-1), noise)
        torch.testing.assert_close(mean, arrays[f"{name}_mean"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close((variance + noise).sqrt(), arrays[f"{name}_std"], rtol=1e-6, atol=1e-8)
        off, _ = condition(*grams, arrays["y_train"].squeeze(-1), 1.01 * noise)
        assert not torch.allclose(off, arrays[f"{name}_mean"], rtol=1e-6, atol=1e-8)  # control
