import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from gramian.core import calibration
from gramian.core.predictive import Predictive
from gramian.errors import InputError

F64 = torch.float64
N = 20_000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture(members: int = 4, batch: tuple[int, ...] = (3,)) -> Predictive:
    return Predictive.from_samples(2 * normal(members, *batch), normal(members, *batch, seed=1).exp())


def test_likelihood_of_a_known_gaussian() -> None:
    mean, y = normal(50), normal(50, seed=1)
    expected = -norm.logpdf(y.numpy(), mean.numpy(), 0.5).mean()
    found = calibration.negative_log_likelihood(Predictive.gaussian(mean, 0.2, 0.05), y)
    assert float(found) == pytest.approx(expected, rel=1e-13)
    wide = calibration.negative_log_likelihood(Predictive.gaussian(mean, 0.2, 0.5), y)
    assert float(wide) != pytest.approx(expected, rel=1e-3)  # control


def test_crps_equals_its_integral() -> None:
    prediction, y = mixture(), torch.tensor([-1.0, 0.3, 2.0], dtype=F64)
    means, stds = (part.numpy() for part in prediction.components)
    for i, target in enumerate(y.tolist()):

        def gap(t: float, i: int = i, target: float = target) -> float:
            return (norm.cdf(t, means[:, i], stds[:, i]).mean() - (t >= target)) ** 2

        expected = quad(gap, -40, target, limit=400)[0] + quad(gap, target, 40, limit=400)[0]
        assert float(calibration.crps(prediction, y)[i]) == pytest.approx(expected, rel=1e-7)


def test_crps_of_a_gaussian_and_of_a_point() -> None:
    mean, y, std = normal(9), normal(9, seed=1), 0.7
    z = (y - mean) / std
    density, below = (torch.as_tensor(part(z.numpy())) for part in (norm.pdf, norm.cdf))
    expected = std * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))
    found = calibration.crps(Predictive.gaussian(mean, std**2), y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    point = calibration.crps(Predictive.gaussian(mean, 0.0), y)
    torch.testing.assert_close(point, (y - mean).abs(), rtol=1e-14, atol=0)


def test_crps_of_samples_equals_a_double_loop() -> None:
    samples, y = normal(6, 4), normal(4, seed=1)
    samples[3] = samples[0]
    found = calibration.crps(Predictive.from_samples(samples), y)
    for i in range(4):
        column = samples[:, i].tolist()
        apart = sum(abs(a - b) for a in column for b in column) / 72
        expected = sum(abs(a - float(y[i])) for a in column) / 6 - apart
        assert float(found[i]) == pytest.approx(expected, rel=1e-12)


def test_the_truth_has_the_best_scores() -> None:
    y = normal(N)
    spreads = (0.25, 0.7, 1.0, 1.4, 4.0)
    predictions = [Predictive.gaussian(torch.zeros(N, dtype=F64), spread**2) for spread in spreads]
    for score in (calibration.negative_log_likelihood, lambda p, y: calibration.crps(p, y).mean()):
        scores = [float(score(prediction, y)) for prediction in predictions]
        assert min(scores) == scores[2]
        assert scores[0] > scores[1]
        assert scores[4] > scores[3]


@pytest.mark.parametrize("own_samples", [False, True])
def test_coverage_is_the_share_within_the_intervals(own_samples: bool) -> None:
    prediction = mixture(5, (40, 3)) if own_samples else Predictive.gaussian(normal(40, 3), 0.5, 0.2)
    y = 2 * normal(40, 3, seed=7)
    levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=F64)
    inside = []
    for level in levels.tolist():
        lower, upper = prediction.interval(level)
        inside.append(float(((lower <= y) & (y <= upper)).double().mean()))
    assert calibration.coverage(prediction, y, levels).tolist() == pytest.approx(inside, abs=1e-12)
    assert inside[-1] == 1
    assert 0 < inside[2] < 1


def test_coverage_of_noiseless_samples_counts_ties() -> None:
    samples = normal(10, 200).mul(2).round() / 2
    y = normal(200, seed=1).mul(2).round() / 2
    prediction = Predictive.from_samples(samples)
    levels = torch.tensor(calibration.LEVELS, dtype=F64)
    inside = []
    for level in levels.tolist():
        lower, upper = prediction.interval(level)
        inside.append(float(((lower <= y) & (y <= upper)).double().mean()))
    assert calibration.coverage(prediction, y).tolist() == pytest.approx(inside, abs=1e-12)
    at_zero = calibration.coverage(
        Predictive.from_samples(torch.zeros(5, 8, dtype=F64)), torch.zeros(8, dtype=F64)
    )
    assert bool((at_zero == 1).all())  # a sure and right prediction is inside its closed interval


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_calibrated_prediction_covers_its_levels_and_others_do_not(dtype: torch.dtype) -> None:
    mean = normal(N, seed=1).to(dtype)
    y = mean + normal(N).to(dtype)
    truth = Predictive.gaussian(mean, 0.6, 0.4)
    levels = torch.tensor(calibration.LEVELS, dtype=dtype)
    error = 4 * (levels * (1 - levels) / N).sqrt()
    assert bool(((calibration.coverage(truth, y) - levels).abs() < error).all())
    assert float(calibration.calibration_error(truth, y)) < 0.01
    for spread in (0.25, 4.0):
        spoiled = Predictive.gaussian(mean, spread)
        expected = torch.as_tensor(2 * norm.cdf(norm.ppf((1 + levels.numpy()) / 2) * spread**0.5) - 1)
        assert bool(((calibration.coverage(spoiled, y) - expected).abs() < 0.02).all())
        wrong = (expected - levels).abs().mean()
        assert float(calibration.calibration_error(spoiled, y)) == pytest.approx(float(wrong), abs=0.01)
        assert wrong > 0.1


def test_few_members_without_noise_cannot_cover() -> None:
    y = normal(N)
    for members in (4, 9):
        prediction = Predictive.from_samples(normal(members, N, seed=members))
        widest = calibration.coverage(prediction, y, torch.tensor([0.999], dtype=F64))
        assert float(widest) == pytest.approx((members - 1) / (members + 1), abs=0.012)


def test_the_transform_of_the_truth_is_uniform() -> None:
    prediction, bins = Predictive.gaussian(torch.zeros(N, dtype=F64), 1.0), 8
    flat = calibration.pit_histogram(prediction, normal(N), bins)
    assert float(flat.sum()) == pytest.approx(1)
    chi_squared = float((flat - 1 / bins).square().sum() * bins * N)
    assert chi_squared < 24.3  # 99.9 % of 7 degrees of freedom
    narrow = calibration.pit_histogram(prediction, 2 * normal(N), bins)
    assert narrow[0] > 1.5 / bins
    assert narrow[-1] > 1.5 / bins
    biased = calibration.pit_histogram(prediction, normal(N) + 1, bins)
    assert biased[-1] > 2 / bins > 2 * biased[0]


def test_the_transform_equals_the_distribution_and_halves_steps() -> None:
    prediction, y = mixture(), normal(3, seed=3)
    torch.testing.assert_close(calibration.pit(prediction, y), prediction.cdf(y), rtol=1e-13, atol=1e-15)
    samples = torch.tensor([[0.0], [1.0], [1.0], [3.0]], dtype=F64)
    at_step = calibration.pit(Predictive.from_samples(samples), torch.tensor([1.0], dtype=F64))
    assert float(at_step) == pytest.approx(0.5)  # ¼ below, ½ at it
    counted = calibration.pit_histogram(prediction, y, 5)
    expected, _ = np.histogram(prediction.cdf(y).numpy(), 5, (0, 1))
    assert (3 * counted).tolist() == pytest.approx(expected.tolist())


def test_sharpness_is_the_mean_width() -> None:
    prediction = Predictive.gaussian(normal(2), torch.tensor([1.0, 4.0], dtype=F64))
    assert float(calibration.sharpness(prediction)) == pytest.approx(2 * 1.5 * norm.ppf(0.975), rel=1e-12)
    assert float(calibration.sharpness(prediction, 0.5)) == pytest.approx(2 * 1.5 * norm.ppf(0.75), rel=1e-12)


def atomic(spread: float, *shape: int, seed: int) -> Tensor:
    """Numbers of which some half are exactly 0 or 1."""
    return (spread * normal(*shape, seed=seed)).clamp(0, 1)


@pytest.mark.parametrize("members", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("atoms", [False, True])
def test_ranks_of_a_perfect_sampler_cover_every_level(members: int, atoms: bool) -> None:
    def draw(spread: float, *shape: int, seed: int) -> Tensor:
        return atomic(spread, *shape, seed=seed) if atoms else spread * normal(*shape, seed=seed)

    samples, y = draw(1.0, members, N, seed=members), draw(1.0, N, seed=99)
    levels = torch.tensor(calibration.LEVELS, dtype=F64)
    found = calibration.randomised_coverage(Predictive.from_samples(samples, correction=0), y)
    assert bool(((found - levels).abs() <= 4.5 * (levels * (1 - levels) / N).sqrt()).all())
    if members >= 5:
        for spread, sign in ((0.5, -1), (2.0, 1)):  # controls: too sure, too unsure
            spoiled = Predictive.from_samples(draw(spread, members, N, seed=members))
            gap = calibration.randomised_coverage(spoiled, y) - levels
            assert sign * float(gap.mean()) > 0.025
    closed = calibration.coverage(Predictive.from_samples(samples, correction=0), y)
    assert float((closed - levels).abs().mean()) > 0.005  # control: even a perfect sampler misses these


def test_ranks_are_exact_for_every_order_of_few_numbers() -> None:
    """Exchangeable: each of M + 1 given numbers is the truth once, and the coverage is q to rounding."""
    levels = torch.tensor([0.0, 0.05, 0.3, 0.62, 0.95, 1.0], dtype=F64)
    for values in (
        [1.0, 2.0, 3.0, 4.0],
        [0.0, 0.0, 0.0, 1.0, 1.5],
        [2.0, 2.0],
        [0.0, 1.0, 1.0, 1.0, 2.0, 2.0],
    ):
        rows = torch.tensor([values[:i] + values[i + 1 :] for i in range(len(values))], dtype=F64)
        prediction = Predictive.from_samples(rows.mT, correction=0)
        found = calibration.randomised_coverage(prediction, torch.tensor(values, dtype=F64), levels)
        torch.testing.assert_close(found, levels, rtol=1e-13, atol=1e-15)


def test_ranks_equal_drawn_ranks() -> None:
    samples, y = atomic(1.0, 6, 40, seed=1), atomic(0.7, 40, seed=2)
    lower = (samples < y).sum(0) / 7
    upper = ((samples <= y).sum(0) + 1) / 7
    u = lower + (upper - lower) * torch.rand(20_000, 40, generator=torch.Generator().manual_seed(5))
    drawn = torch.stack([((u - 0.5).abs() <= q / 2).double().mean() for q in calibration.LEVELS])
    prediction = Predictive.from_samples(samples)
    found = calibration.randomised_coverage(prediction, y)
    torch.testing.assert_close(found, drawn, rtol=0, atol=3e-3)
    turned = Predictive.from_samples(samples.flip(0))
    torch.testing.assert_close(calibration.randomised_coverage(turned, y), found, rtol=1e-13, atol=1e-15)
    silent = Predictive.from_samples(torch.zeros(6, 40, dtype=F64))
    same = calibration.randomised_coverage(silent, torch.zeros(40, dtype=F64))
    torch.testing.assert_close(same, torch.tensor(calibration.LEVELS, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_randomised_coverage_of_laws(dtype: torch.dtype) -> None:
    """Without atoms it is the coverage; the law of a mixture with atoms is covered at every level."""
    gaussian, y = Predictive.gaussian(normal(N).to(dtype), 0.5, 0.2), normal(N, seed=3).to(dtype)
    torch.testing.assert_close(
        calibration.randomised_coverage(gaussian, y), calibration.coverage(gaussian, y), rtol=0, atol=1e-4
    )
    members = torch.tensor([0.0, 1.0, 3.0, 3.0], dtype=dtype)[:, None].expand(4, N)
    noise = torch.tensor([0.0, 4.0, 0.0, 0.0], dtype=dtype)[:, None].expand(4, N)
    law = Predictive.from_samples(members, noise)
    generator = torch.Generator().manual_seed(4)
    chosen = torch.randint(4, (1, N), generator=generator)
    epsilon = torch.randn(N, generator=generator, dtype=dtype)
    drawn = members.gather(0, chosen)[0] + noise.gather(0, chosen)[0].sqrt() * epsilon
    levels = torch.tensor(calibration.LEVELS, dtype=dtype)
    bound = 4.5 * (levels * (1 - levels) / N).sqrt()
    assert bool(((calibration.randomised_coverage(law, drawn) - levels).abs() <= bound).all())
    assert float((calibration.coverage(law, drawn) - levels).abs().max()) > 0.1  # control


def test_bad_input_is_named() -> None:
    prediction, y = Predictive.gaussian(normal(3), 1.0), normal(3)
    for score in (
        calibration.negative_log_likelihood,
        calibration.crps,
        calibration.coverage,
        calibration.randomised_coverage,
        calibration.calibration_error,
        calibration.pit,
        calibration.pit_histogram,
    ):
        with pytest.raises(InputError, match=r"targets have to be \(3,\)"):
            score(prediction, y[:, None])
    with pytest.raises(InputError, match="levels"):
        calibration.coverage(prediction, y, torch.tensor([0.5, 1.2]))
    with pytest.raises(InputError, match="levels"):
        calibration.randomised_coverage(prediction, y, torch.tensor([0.5, 1.2]))
    with pytest.raises(InputError, match="levels"):
        calibration.sharpness(prediction, -0.5)
    with pytest.raises(InputError, match="at least 1 bin"):
        calibration.pit_histogram(prediction, y, 0)
    nothing = Predictive.gaussian(normal(0), 1.0)
    for score in (
        calibration.negative_log_likelihood,
        calibration.coverage,
        calibration.randomised_coverage,
        calibration.pit_histogram,
    ):
        with pytest.raises(InputError, match="no prediction to judge"):
            score(nothing, normal(0))
    with pytest.raises(InputError, match="no prediction to judge"):
        calibration.sharpness(nothing)
