"""Scores of images and of their error bars: a perfect sampler, a narrow one, and pixels that are empty."""

import pytest
import torch
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.quality import psnr, snr, ssim, truth_tuned_calibration
from gramian.tasks.reconstruction_scores import doubt_scores, image_scores, peak_of

SIDE, SAMPLES = 48, 40


def drawn(scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples and a truth: of one law for a scale of 1, with errors of their own in every pixel."""
    draws = torch.Generator().manual_seed(seed)
    mean = 0.3 + 0.4 * torch.rand(SIDE, SIDE, generator=draws)
    noise = 0.05 * torch.randn(SAMPLES + 1, SIDE, SIDE, generator=draws)
    return (mean + scale * noise[1:]).clamp(0.01, 1), (mean + noise[0]).clamp(0.01, 1)


def test_a_perfect_sampler_has_no_error_and_a_narrow_one_has() -> None:
    perfect, narrow, wide = (
        doubt_scores(Predictive.from_samples(drawn(scale)[0]), drawn(scale)[1]) for scale in (1.0, 0.5, 2.0)
    )
    assert perfect.error < 0.02
    assert narrow.error > 0.15
    assert wide.error > 0.1
    assert perfect.crps < min(narrow.crps, wide.crps)
    assert perfect.nll < min(narrow.nll, wide.nll)
    assert narrow.width < perfect.width < wide.width
    assert perfect.width == pytest.approx(4.32 * 0.05, rel=0.05)  # the range of 40 normal draws
    assert perfect.error == perfect.inside.randomised_error


def test_what_is_empty_in_truth_and_samples_hides_nothing() -> None:
    samples, truth = drawn(0.5)
    scored = doubt_scores(Predictive.from_samples(samples), truth)
    around = (SIDE,) * 4
    wide = [torch.nn.functional.pad(each, around) for each in (samples, truth)]
    padded = doubt_scores(Predictive.from_samples(wide[0]), wide[1])
    assert padded.error == pytest.approx(scored.error, abs=0.01)
    assert padded.width == pytest.approx(scored.width, rel=1e-5)
    assert padded.everywhere.randomised_error < 0.5 * padded.error  # what would have been told
    wrong = wide[0].clone()
    wrong[0] += 1e-3  # control: where one sample has something, that is judged
    assert doubt_scores(Predictive.from_samples(wrong), wide[1]).error != pytest.approx(
        padded.error, abs=0.02
    )


def test_the_published_error_is_beside_it_by_its_name() -> None:
    samples, truth = drawn(0.5)
    scored = doubt_scores(Predictive.from_samples(samples), truth)
    assert scored.truth_tuned == truth_tuned_calibration(samples, truth).error
    assert scored.truth_tuned < scored.error


def test_images_have_the_scores_of_their_names() -> None:
    samples, truth = drawn()
    found = image_scores(samples[0], truth)
    for name, score in (("psnr", psnr), ("snr", snr), ("ssim", ssim)):
        assert getattr(found, name) == pytest.approx(float(score(samples[0], truth)))
    assert image_scores(samples.mean(0), truth).psnr > found.psnr


@pytest.mark.parametrize(("largest", "peak"), [(1.0, 1.0), (0.7, 1.0), (0.5, 1.0), (0.02, 0.02), (3.0, 3.0)])
def test_the_peak_is_one_where_that_is_the_scale(largest: float, peak: float) -> None:
    assert peak_of(torch.tensor([[0.0, largest]])) == pytest.approx(peak)


def test_bad_input() -> None:
    samples, truth = drawn()
    with pytest.raises(InputError, match="by samples, and this prediction has none"):
        doubt_scores(Predictive(samples.mean(0), samples.var(0)), truth)
