"""Scores of images and of their samples: closed forms, slow oracles and the reference."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gramian.core.calibration import crps, sharpness
from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.quality import (
    LEVELS,
    attainable_coverage,
    calibration,
    gaussian_nll,
    inside,
    psnr,
    sample_crps,
    snr,
    ssim,
    truth_tuned_calibration,
)
from reference import Case, cases, load

F64 = torch.float64
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def pair(*batch: int) -> tuple[Tensor, Tensor]:
    truth = torch.rand(*batch, 20, 16, generator=torch.Generator().manual_seed(5), dtype=F64)
    return (truth + 0.1 * normal(*batch, 20, 16)).clamp(0, 1), truth


def calibrated(path: Path | None) -> Case:
    case = load(path)  # type: ignore[arg-type]
    if "coverage_no_delta" not in case.arrays:
        pytest.skip("no calibration in this case")
    return case


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("tomography"))
def test_scores_equal_the_reference(path: Path) -> None:
    case = calibrated(path)
    arrays, known = case.arrays, case.spec["scalars"]
    samples, truth = arrays["samples"], arrays["truth"]
    mean, variance = samples.mean(0), samples.var(0)
    assert float(psnr(mean[None], truth[None])) == pytest.approx(known["psnr"], rel=1e-6)
    assert float(snr(mean[None], truth[None])) == pytest.approx(known["snr"], rel=1e-6)
    eps = case.spec["config"]["eps"]
    assert float(gaussian_nll(mean, variance, truth, eps)) == pytest.approx(known["nll"], rel=1e-6)
    biased = gaussian_nll(mean, samples.var(0, correction=0), truth, eps)  # control
    assert float(biased) != pytest.approx(known["nll"], rel=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("path", cases("tomography"))
def test_calibration_equals_the_reference(path: Path) -> None:
    case = calibrated(path)
    arrays, known = case.arrays, case.spec["scalars"]
    samples, truth, levels = arrays["samples"], arrays["truth"], arrays["levels"].tolist()
    assert levels == pytest.approx(LEVELS, abs=1e-12)
    found = truth_tuned_calibration(samples, truth)
    torch.testing.assert_close(found.coverage, arrays["coverage"], **CLOSE)
    assert found.error == pytest.approx(known["ece_val"], abs=1e-6)
    assert found.squared == pytest.approx(known["coverage_mse"], abs=1e-6)
    assert found.margin == pytest.approx(known["ece_best_delta"], rel=1e-9)
    plain = truth_tuned_calibration(samples, truth, [0.0])
    torch.testing.assert_close(plain.coverage, arrays["coverage_no_delta"], **CLOSE)
    assert plain.error > found.error  # control: the margin counts
    # The reference widens the lower end alone in its map of pixels.
    lower_alone = inside(samples, truth, below=found.margin).to(F64)
    by_pixel = (lower_alone - torch.tensor(LEVELS, dtype=F64)[:, None]).abs().mean(0)
    torch.testing.assert_close(by_pixel, arrays["per_pixel_ece_reference"], **CLOSE)


def test_image_scores_are_what_they_say() -> None:
    image, truth = pair(2, 3)
    assert psnr(image, truth).shape == (2, 3)
    one, other = image[1, 2].numpy(), truth[1, 2].numpy()
    error = np.mean((one - other) ** 2)
    assert float(psnr(image, truth)[1, 2]) == pytest.approx(-10 * np.log10(error), rel=1e-12)
    assert float(psnr(image, truth, 2.0)[1, 2]) == pytest.approx(10 * np.log10(4 / error), rel=1e-12)
    ratio = 20 * np.log10(np.linalg.norm(other) / np.linalg.norm(one - other))
    assert float(snr(image, truth)[1, 2]) == pytest.approx(ratio, rel=1e-12)
    power = -10 * truth.square().mean((-2, -1)).log10()
    torch.testing.assert_close(psnr(image, truth) - snr(image, truth), power, rtol=1e-10, atol=1e-10)
    assert float(psnr(truth, truth).amin()) == math.inf


def slow_ssim(x: np.ndarray, y: np.ndarray, peak: float) -> float:
    place = np.arange(11) - 5
    weights = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            vab = (weights * (a - ma) * (b - mb)).sum()
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            values.append((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("peak", [1.0, 2.5])
def test_ssim_equals_a_loop_over_windows(peak: float) -> None:
    image, truth = pair(2)
    found = ssim(image, truth, peak)
    for k in range(2):
        expected = slow_ssim(image[k].numpy(), truth[k].numpy(), peak)
        assert float(found[k]) == pytest.approx(expected, rel=1e-9)
        assert float(ssim(image[k], truth[k], peak)) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2, dtype=F64))
    assert float(ssim(1 - truth, truth).amax()) < float(found.amin())  # control


@pytest.mark.slow  # its import takes seconds
def test_ssim_equals_torchmetrics() -> None:
    """Theirs continues images by reflection; inside the border every window is the same."""
    functional = pytest.importorskip("torchmetrics.functional.image")
    image, truth = pair(2)
    _, theirs = functional.structural_similarity_index_measure(
        image[:, None], truth[:, None], data_range=1.0, reduction="none", return_full_image=True
    )
    inner = theirs[..., 5:-5, 5:-5].mean((-3, -2, -1))
    torch.testing.assert_close(ssim(image, truth), inner, rtol=1e-8, atol=1e-8)


def test_nll_is_least_at_the_true_variance() -> None:
    truth, variance = normal(200_000), torch.tensor(0.5, dtype=F64)
    mean = truth + variance.sqrt() * normal(200_000, seed=1)
    values = [float(gaussian_nll(mean, (k * variance).expand_as(mean), truth)) for k in (0.8, 1.0, 1.25)]
    assert values[1] == min(values)
    assert values[1] == pytest.approx(0.5 * math.log(2 * math.pi * 0.5) + 0.5, abs=0.01)
    exact = gaussian_nll(truth, torch.zeros_like(truth), truth)
    assert float(exact) == pytest.approx(0.5 * math.log(2 * math.pi * 1e-6) + 0.5)


def test_crps_by_sorting_equals_the_general_form() -> None:
    samples, truth = normal(7, 5, 4), normal(5, 4, seed=1)
    expected = crps(Predictive.from_samples(samples), truth)
    torch.testing.assert_close(sample_crps(samples, truth), expected, rtol=1e-12, atol=1e-13)
    shuffled = samples[torch.randperm(7, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(sample_crps(shuffled, truth), expected, rtol=1e-12, atol=1e-13)
    point = sample_crps(samples[:1], truth)
    torch.testing.assert_close(point, (samples[0] - truth).abs(), rtol=1e-12, atol=0)


def test_the_fair_score_does_not_depend_on_the_number_of_samples() -> None:
    truth = normal(100_000, seed=9)
    exact = float(crps(Predictive.gaussian(torch.zeros_like(truth), 1.0), truth).mean())
    for count in (2, 5, 20):
        samples = normal(count, 100_000, seed=count)
        assert float(sample_crps(samples, truth, fair=True).mean()) == pytest.approx(exact, abs=0.01)
        excess = float(sample_crps(samples, truth).mean()) - exact  # control: E|X − X'|/2M
        assert excess == pytest.approx(1 / math.sqrt(math.pi) / count, abs=0.01)


def test_intervals_equal_numpys_quantiles() -> None:
    samples, truth = normal(9, 50), normal(50, seed=1)
    found = inside(samples, truth, [0.0, 0.3, 1.0], below=0.1, above=0.2)
    for level, row in zip([0.0, 0.3, 1.0], found, strict=True):
        lower, upper = np.quantile(samples.numpy(), [0.5 - level / 2, 0.5 + level / 2], axis=0)
        assert np.array_equal(row.numpy(), (truth.numpy() > lower - 0.1) & (truth.numpy() < upper + 0.2))
    flat = torch.zeros(4, 3, dtype=F64)
    assert not inside(flat, flat[0]).any()  # open intervals without width hold nothing
    assert inside(flat, flat[0], closed=True).all()


@pytest.mark.parametrize("members", [1, 2, 5, 10, 49])
def test_a_perfect_sampler_attains_what_is_stated(members: int) -> None:
    pixels = 8_000
    samples, truth = normal(members, pixels, seed=members), normal(pixels, seed=99)
    found = calibration(Predictive.from_samples(samples, correction=0), truth)
    noise = (found.attainable * (1 - found.attainable) / pixels).sqrt()
    assert bool(((found.coverage - found.attainable).abs() <= 4.5 * noise + 1e-12).all())
    assert found.corrected_error < 0.015
    assert found.error >= found.corrected_error
    if members <= 10:
        assert found.error > 0.03  # what is not the sampler's fault
        narrow = calibration(Predictive.from_samples(0.6 * samples, correction=0), truth)  # control
        assert members < 3 or narrow.corrected_error > 0.05


def test_published_error_of_a_perfect_sampler() -> None:
    """Few samples cap the coverage: q (K − 1)/(K + 1)."""
    truth = normal(40_000, seed=1)
    for members, last, error in ((5, 0.646, 0.146), (10, 0.792, 0.080), (50, 0.915, 0.018)):
        found = truth_tuned_calibration(normal(members, 40_000, seed=members), truth, [0.0])
        assert float(found.coverage[-1]) == pytest.approx(last, abs=0.01)
        assert found.error == pytest.approx(error, abs=0.01)
        assert found.error == pytest.approx(0.95 / (members + 1), abs=0.015)


def test_the_tuned_margin_flatters() -> None:
    truth = torch.zeros(2000, dtype=F64)
    truth[:1000] = normal(1000).abs()
    samples = torch.sigmoid(normal(20, 2000, seed=2) - 6) + truth  # never exactly 0
    tuned = truth_tuned_calibration(samples, truth)
    assert tuned.margin > 0
    assert tuned.error < truth_tuned_calibration(samples, truth, [0.0]).error
    given = truth_tuned_calibration(samples, truth, [tuned.margin])
    assert (given.margin, given.error) == (tuned.margin, tuned.error)


def test_calibration_on_the_support() -> None:
    truth = normal(16, 20).clamp(min=0)
    samples = normal(6, 16, 20, seed=1).clamp(min=0)
    prediction = Predictive.from_samples(samples)
    part = calibration(prediction, truth, where=truth > 0)
    chosen = Predictive.from_samples(samples[:, truth > 0])
    torch.testing.assert_close(part.coverage, calibration(chosen, truth[truth > 0]).coverage)
    whole = calibration(prediction, truth)
    assert float(whole.coverage[10]) > float(part.coverage[10]) + 0.1  # ties at 0 are covered for nothing
    for members in (6, 5, 2):
        fewer = Predictive.from_samples(samples[:members])
        widths = [float(sharpness(fewer, q)) for q in LEVELS]
        assert calibration(fewer, truth).width.tolist() == pytest.approx(widths, rel=1e-12)
    assert bool((whole.width.diff() >= 0).all())
    noisy = Predictive.from_samples(samples, torch.full_like(truth, 0.1))
    assert torch.equal(calibration(noisy, truth).attainable, whole.levels)
    kept = calibration(noisy, truth, where=truth > 0)
    assert float(kept.coverage[-1]) > 0.5


def test_the_randomised_error_needs_no_correction() -> None:
    levels, pixels = torch.tensor(LEVELS, dtype=F64), (160, 100)
    doubt = normal(*pixels, seed=8) - 1  # of some pixels it is sure that they are 0, of others not

    def draw(*members: int, spread: float = 1.0, seed: int) -> Tensor:
        return (doubt + spread * normal(*members, *pixels, seed=seed)).clamp(min=0)

    truth = draw(seed=99)
    for members in (5, 20):
        samples = draw(members, seed=members)
        perfect = calibration(Predictive.from_samples(samples), truth)
        assert perfect.randomised_error < 0.01
        assert perfect.error > 0.05  # controls: what zeros and few samples do to the closed form
        assert perfect.corrected_error > 0.05
        for spread in (0.5, 2.0):
            spoiled = Predictive.from_samples(draw(members, spread=spread, seed=members))
            assert calibration(spoiled, truth).randomised_error > 0.03
        alike = torch.cat((samples, truth[None])).amax(0) > 0
        assert calibration(Predictive.from_samples(samples), truth, where=alike).randomised_error < 0.01
        by_truth = calibration(Predictive.from_samples(samples), truth, where=truth > 0)
        assert by_truth.randomised_error > 0.03  # control: chosen by what is to be foretold
    gaussian = calibration(Predictive.gaussian(truth, 1.0), truth + normal(*pixels, seed=3))
    torch.testing.assert_close(gaussian.randomised, gaussian.coverage, rtol=0, atol=1e-12)
    assert torch.equal(gaussian.levels, levels)


def test_order_of_samples_changes_nothing() -> None:
    samples, truth = normal(8, 60), normal(60, seed=1)
    turned = samples.flip(0)
    assert torch.equal(inside(samples, truth), inside(turned, truth))
    assert truth_tuned_calibration(samples, truth).error == truth_tuned_calibration(turned, truth).error


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: psnr(torch.ones(3, 3), torch.ones(3, 4)), "of one shape"),
        (lambda: psnr(torch.ones(3, 3), torch.ones(3, 3), 0.0), "peak"),
        (lambda: ssim(torch.ones(10, 20), torch.ones(10, 20)), "11 pixels"),
        (lambda: gaussian_nll(torch.ones(3), torch.ones(2), torch.ones(3)), "of one shape"),
        (lambda: sample_crps(torch.ones(1, 3), torch.ones(3), fair=True), "at least 2"),
        (lambda: sample_crps(torch.ones(2, 4), torch.ones(3)), "samples have to be"),
        (lambda: inside(torch.ones(2, 3), torch.ones(3), [1.5]), "from 0 to 1"),
        (lambda: inside(torch.ones(2, 0), torch.ones(0)), "not empty"),
        (lambda: truth_tuned_calibration(torch.ones(2, 3), torch.ones(3), []), "at least one margin"),
        (lambda: attainable_coverage(0), "at least one sample"),
        (
            lambda: calibration(Predictive.gaussian(torch.ones(3), 1.0), torch.ones(3), where=torch.ones(2)),
            "chosen pixels",
        ),
        (
            lambda: calibration(
                Predictive.gaussian(torch.ones(3), 1.0), torch.ones(3), where=torch.zeros(3, dtype=torch.bool)
            ),
            "no prediction",
        ),
    ],
)
def test_bad_input(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]
