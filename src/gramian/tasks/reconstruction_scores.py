"""How near reconstructions are to the truth, where it is known, and whether their samples know how far."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.quality import (
    WINDOW,
    Calibration,
    calibration,
    gaussian_nll,
    psnr,
    sample_crps,
    snr,
    ssim,
    truth_tuned_calibration,
)

LEVEL = 0.95
"""Of the intervals whose width is told."""


@dataclass(frozen=True)
class ImageScores:
    """An image beside the truth."""

    psnr: float
    snr: float
    ssim: float
    """NaN of images below 11 pixels."""


@dataclass(frozen=True, eq=False)
class DoubtScores:
    """Samples of an image beside the truth.

    Calibration is that of all pixels, and of those where the truth or a sample is above 0: pixels that are 0
    in the truth and in all samples are foretold perfectly, and would hide what the others get wrong.
    """

    nll: float
    """Published negative log likelihood of a Gaussian of the samples' mean and variance, in nats a pixel."""
    crps: float
    everywhere: Calibration
    inside: Calibration
    truth_tuned: float
    """The published calibration error, whose margin is fitted on the truth."""
    width: float
    """Mean width of 95 % intervals, inside."""

    @property
    def error(self) -> float:
        """Return the honest calibration error inside, that a perfect sampler brings to 0."""
        return self.inside.randomised_error


def image_scores(image: Float[Tensor, "n n"], truth: Float[Tensor, "n n"]) -> ImageScores:
    """Return the scores of an image in units of the truth's peak."""
    alike = float(ssim(image, truth)) if min(truth.shape) >= WINDOW else math.nan
    return ImageScores(float(psnr(image, truth)), float(snr(image, truth)), alike)


def doubt_scores(prediction: Predictive, truth: Float[Tensor, "n n"]) -> DoubtScores:
    """Return the scores of samples; prediction and truth in units of the truth's peak.

    Raises: InputError for a prediction without samples.
    """
    if prediction.samples is None:
        raise InputError("error bars are scored by samples, and this prediction has none")
    somewhere = (prediction.samples.amax(0) > 0) | (truth > 0)
    inside = calibration(prediction, truth, where=somewhere)
    return DoubtScores(
        nll=float(gaussian_nll(prediction.mean, prediction.variance, truth)),
        crps=float(sample_crps(prediction.samples, truth).mean()),
        everywhere=calibration(prediction, truth),
        inside=inside,
        truth_tuned=truth_tuned_calibration(prediction.samples, truth).error,
        width=float(inside.width[-1]),
    )


def peak_of(truth: Float[Tensor, "n n"]) -> float:
    """Return the peak that scores take: 1 where an image reaches from ½ to 1, else its largest value."""
    largest = float(torch.as_tensor(truth).max())
    return 1.0 if 0.5 <= largest <= 1 else largest
