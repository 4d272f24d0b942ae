import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from gramian.core.predictive import Predictive
from gramian.errors import InputError

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture(members: int = 7, batch: tuple[int, ...] = (5, 2), own_noise: bool = True) -> Predictive:
    noise = normal(members, *batch, seed=1).exp() if own_noise else normal(*batch, seed=1).exp()
    return Predictive.from_samples(3 * normal(members, *batch), noise)


def oracle(prediction: Predictive) -> MixtureSameFamily:
    means, stds = (part.movedim(0, -1) for part in prediction.components)
    return MixtureSameFamily(Categorical(torch.ones_like(means)), Normal(means, stds))


def test_a_gaussian_equals_its_distribution() -> None:
    mean, variance, y = normal(4, 3), normal(4, 3, seed=1).exp(), normal(4, 3, seed=2)
    prediction = Predictive.gaussian(mean, variance, 0.3)
    theirs = Normal(mean, (variance + 0.3).sqrt())
    torch.testing.assert_close(prediction.std, theirs.stddev, rtol=1e-14, atol=0)
    torch.testing.assert_close(prediction.log_likelihood(y), theirs.log_prob(y), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(prediction.cdf(y), theirs.cdf(y), rtol=1e-12, atol=0)
    torch.testing.assert_close(prediction.survival(y), 1 - theirs.cdf(y), rtol=1e-11, atol=0)
    levels = torch.tensor([[0.01, 0.5], [0.9, 0.999]], dtype=F64)
    expected = torch.stack([theirs.icdf(level) for level in levels.flatten()]).view(2, 2, 4, 3)
    torch.testing.assert_close(prediction.quantile(levels), expected, rtol=1e-11, atol=1e-12)
    lower, upper = prediction.interval(0.95)
    torch.testing.assert_close(upper - lower, 2 * 1.959963984540054 * theirs.stddev, rtol=1e-12, atol=0)
    latent = Predictive.gaussian(mean, variance)
    assert not torch.allclose(
        latent.log_likelihood(y), theirs.log_prob(y), rtol=1e-3
    )  # control: noise counts
    assert bool((latent.aleatoric == 0).all())


@pytest.mark.parametrize("own_noise", [True, False])
def test_samples_equal_their_mixture(own_noise: bool) -> None:
    prediction, y = mixture(own_noise=own_noise), 3 * normal(5, 2, seed=3)
    theirs = oracle(prediction)
    torch.testing.assert_close(prediction.log_likelihood(y), theirs.log_prob(y), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(prediction.cdf(y), theirs.cdf(y), rtol=1e-12, atol=1e-15)
    matched = prediction.moment_matched().log_likelihood(y)
    expected = Normal(prediction.mean, prediction.total.sqrt()).log_prob(y)
    torch.testing.assert_close(matched, expected, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(matched, theirs.log_prob(y), rtol=1e-2)  # control: a mixture is no Gaussian


def test_moments_are_those_of_the_mixture() -> None:
    prediction = mixture()
    whole = dataclasses.replace(
        prediction, variance=Predictive.from_samples(*prediction_parts(prediction), correction=0).variance
    )
    theirs = oracle(prediction)
    torch.testing.assert_close(whole.mean, theirs.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.total, theirs.variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(prediction.variance, 7 / 6 * whole.variance, rtol=1e-12, atol=0)
    assert not torch.allclose(prediction.total, theirs.variance, rtol=1e-2)  # control: the correction counts


def prediction_parts(prediction: Predictive) -> tuple[Tensor, Tensor]:
    assert prediction.samples is not None
    assert prediction.noise is not None
    return prediction.samples, prediction.noise


def test_quantiles_of_a_mixture_equal_a_root_finder() -> None:
    prediction = mixture(batch=(3,))
    means, stds = (part.numpy() for part in prediction.components)

    def excess(y: float, i: int, level: float) -> float:
        return norm.cdf(y, means[:, i], stds[:, i]).mean() - level

    for level in (1e-9, 0.025, 0.3, 0.5, 0.8, 0.975):
        expected = [brentq(excess, -99, 99, (i, level), xtol=1e-13) for i in range(3)]
        found = prediction.quantile(level)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-8, atol=1e-9)
    wide = prediction.moment_matched().quantile(0.975)
    assert not torch.allclose(prediction.quantile(0.975), wide, rtol=1e-2)  # control


def test_quantiles_invert_the_distribution_far_into_both_tails() -> None:
    prediction = mixture()
    for level in (1e-200, 1e-30, 1e-3):
        lower, upper = prediction.quantile(level), prediction.interval(1 - 2 * level)[1]
        torch.testing.assert_close(
            prediction.cdf(lower), torch.full((5, 2), level, dtype=F64), rtol=1e-9, atol=0
        )
        if 1 - 2 * level < 1:
            expected = torch.full((5, 2), level, dtype=F64)
            torch.testing.assert_close(prediction.survival(upper), expected, rtol=1e-9, atol=0)
    lower, upper = prediction.interval(1.0)
    assert bool((lower == -math.inf).all())
    assert bool((upper == math.inf).all())


def test_one_member_is_a_gaussian() -> None:
    sample, noise = normal(1, 4), normal(4, seed=1).exp()
    one = Predictive.from_samples(sample, noise, correction=0)
    gaussian = Predictive.gaussian(sample[0], 0.0, noise)
    torch.testing.assert_close(one.quantile(0.1), gaussian.quantile(0.1), rtol=1e-14, atol=0)
    torch.testing.assert_close(one.total, gaussian.total, rtol=1e-14, atol=0)


@pytest.mark.parametrize("members", [2, 5, 10, 40])
def test_quantiles_of_noiseless_samples_are_order_statistics(members: int) -> None:
    samples = normal(members, 6).mul(4).round() / 4  # ties
    prediction = Predictive.from_samples(samples)
    for level in (0.05, 0.1, 0.2, 0.25, 0.37, 0.5):
        expected = torch.tensor(np.quantile(samples.numpy(), level, axis=0, method="inverted_cdf"))
        torch.testing.assert_close(prediction.quantile(level), expected, rtol=0, atol=0)
        if level == 0.5:
            continue  # the one level that is its own mirror
        mirrored = -Predictive.from_samples(-samples).quantile(level)
        torch.testing.assert_close(prediction.quantile(1 - level), mirrored, rtol=0, atol=0)
    for level in (0.0, 0.3, 0.8, 1.0):
        lower, upper = prediction.interval(level)
        held = ((samples >= lower) & (samples <= upper)).double().mean(0)
        assert bool((held >= level - 1e-12).all())
        assert bool((prediction.cdf(lower) >= (1 - level) / 2 - 1e-12).all())
        assert bool((prediction.survival(upper) >= (1 - level) / 2 - 1e-12).all())
    assert torch.equal(torch.stack(prediction.interval(1.0)), torch.stack((samples.amin(0), samples.amax(0))))


def test_members_without_noise_among_others_are_steps() -> None:
    samples, noise = torch.tensor([0.0, 2.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    prediction = Predictive.from_samples(samples, noise)
    zero = torch.zeros((), dtype=F64)
    assert float(prediction.cdf(zero)) == pytest.approx(0.5 + 0.5 * norm.cdf(-2))
    assert float(prediction.survival(zero)) == pytest.approx(0.5 + 0.5 * norm.cdf(2))
    assert float(prediction.quantile(0.3)) == pytest.approx(0.0, abs=1e-12)  # within the step
    assert float(prediction.quantile(0.6)) == pytest.approx(2 + norm.ppf(0.2), abs=1e-12)


def test_draws_have_the_moments_and_keep_to_a_member() -> None:
    prediction = mixture(batch=(3,))
    exact = oracle(prediction)
    draws = prediction.sample(40_000, torch.Generator().manual_seed(0))
    error = exact.variance.sqrt() / 200
    assert bool(((draws.mean(0) - exact.mean).abs() < 4 * error).all())
    assert bool(((draws.var(0) / exact.variance - 1).abs() < 0.05).all())
    assert bool(
        ((prediction.sample(4000, torch.Generator()).var(0) / 0.8 / exact.variance) > 1.1).all()
    )  # control
    samples = normal(6, 9)
    kept = Predictive.from_samples(samples).sample(50, torch.Generator().manual_seed(0))
    assert bool((kept[:, None] == samples).all(-1).any(1).all())
    again = prediction.sample(5, torch.Generator().manual_seed(0))
    assert torch.equal(again, prediction.sample(5, torch.Generator().manual_seed(0)))
    assert prediction.sample(0, torch.Generator()).shape == (0, 3)


def test_the_likelihood_is_differentiable_and_stable() -> None:
    samples, noise = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).exp().requires_grad_()
    y = normal(3, seed=2)
    assert torch.autograd.gradcheck(
        lambda f, s: Predictive.from_samples(f, s).log_likelihood(y), (samples, noise)
    )
    far = Predictive.from_samples(normal(4, 3), 1e-4).log_likelihood(torch.full((3,), 1e3, dtype=F64))
    assert bool(far.isfinite().all())  # every density underflows


def test_precision_is_kept_but_halves_are_widened() -> None:
    assert mixture().moment_matched().std.dtype == F64
    single = Predictive.from_samples(normal(4, 3).float(), 0.1)
    assert single.log_likelihood(torch.zeros(3)).dtype == torch.float32
    assert single.quantile(0.9).dtype == torch.float32
    assert Predictive.from_samples(normal(4, 3).bfloat16(), 0.1).mean.dtype == F64


def test_order_of_members_and_shape_of_batch_change_nothing() -> None:
    prediction, y = mixture(), normal(5, 2, seed=4)
    samples, noise = prediction_parts(prediction)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    other = Predictive.from_samples(samples[order], noise[order])
    torch.testing.assert_close(prediction.log_likelihood(y), other.log_likelihood(y), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(prediction.quantile(0.2), other.quantile(0.2), rtol=1e-12, atol=1e-13)
    mixed = Predictive.from_samples(samples[order], noise)  # control: noise belongs to its member
    assert not torch.allclose(prediction.log_likelihood(y), mixed.log_likelihood(y), rtol=1e-3)
    single = Predictive.from_samples(samples[:, 2, 1], noise[:, 2, 1])
    torch.testing.assert_close(single.quantile(0.2), prediction.quantile(0.2)[2, 1], rtol=1e-13, atol=0)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixture().mean = torch.zeros(2)  # type: ignore[misc]


def test_bad_input_is_named() -> None:
    mean = normal(3)
    with pytest.raises(InputError, match=r"variance has to be \(3,\) like the mean, not \(2,\)"):
        Predictive(mean, torch.ones(2, dtype=F64))
    with pytest.raises(InputError, match="samples have to be"):
        Predictive(mean, mean.abs(), None, normal(4, 2))
    with pytest.raises(InputError, match="noise has to be"):
        Predictive(mean, mean.abs(), normal(4, 3).abs(), normal(5, 3))
    with pytest.raises(InputError, match=r"noise variance has to be one number or \(3,\)"):
        Predictive.gaussian(mean, 1.0, torch.ones(2))
    with pytest.raises(InputError, match="mean of a prediction has to be finite"):
        Predictive.gaussian(mean * torch.nan, 1.0)
    for variance in (-1e-3, math.nan, math.inf):
        with pytest.raises(InputError, match="variance of a prediction has to be finite and at least 0"):
            Predictive.gaussian(mean, variance)
    with pytest.raises(InputError, match="noise variance of a prediction"):
        Predictive.gaussian(mean, 1.0, -0.1)
    with pytest.raises(InputError, match="at least 2 of them, not 1"):
        Predictive.from_samples(mean[None])
    with pytest.raises(InputError, match="at least 1 of them, not 0"):
        Predictive.from_samples(normal(0, 3), correction=0)
    with pytest.raises(InputError, match="floating point"):
        Predictive.from_samples(torch.ones(4, 3, dtype=torch.int64))
    prediction = Predictive.gaussian(mean, 1.0)
    for method in (prediction.log_likelihood, prediction.cdf, prediction.survival):
        with pytest.raises(InputError, match=r"targets have to be \(3,\) like the mean, not \(3, 1\)"):
            method(mean[:, None])
    for level in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="levels"):
            prediction.quantile(level)
        with pytest.raises(InputError, match="levels"):
            prediction.interval(level)
    with pytest.raises(InputError, match="variance above 0"):
        Predictive.from_samples(normal(4, 3)).log_likelihood(mean)
    with pytest.raises(InputError, match="number of draws"):
        prediction.sample(-1, torch.Generator())
