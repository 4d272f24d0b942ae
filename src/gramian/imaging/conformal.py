"""Bands around predictions that hold a share of what was not fitted, with nothing assumed of their law.

Of views they promise what views can tell; of pixels `image_conformal` does, and needs true images.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.errors import InputError


def conformal_bands(scores: Float[Tensor, " groups *entries"], level: float) -> float:
    """Return how many standard deviations hold a share of the entries of a new group, in expectation.

        t = the ⌈q (n + 1) D⌉-th smallest |score| of n groups of D entries;   |y − A m| ≤ t √(v + σ²)

    With z as (views, detectors) every view is a group, and a new view that was not fitted either is assumed
    to be exchangeable with the held ones. Flattened, every ray is a group of its own: D = 1, the usual split
    conformal quantile. That allows more levels, but rays of one view err together, which breaks its
    assumption.

    Shapes: (groups, *entries) -> (), the unit that of the scores.
    Raises: InputError for a level outside (0, 1) or above n/(n + 1), no scores, NaN, and where no finite t
        will do.
    Holds: E[share of a new group within t] ≥ q over draws of all groups, if they are exchangeable; no promise
        once the scores are given.
    Source: Angelopoulos, Bates, Fisch, Lei, Schuster 2022, arXiv 2208.02814; D = 1: Vovk, Gammerman, Shafer
        2005, doi 10.1007/b106715.
    """
    if scores.ndim == 0 or scores.numel() == 0 or scores.isnan().any():
        raise InputError("conformal bands need scores (groups, …), at least one and none of them NaN")
    if not 0 < level < 1:
        raise InputError(f"the level of conformal bands has to lie between 0 and 1, not {level}")
    groups, total = len(scores), scores.numel()
    rank = math.ceil(level * (groups + 1) * (total // groups) * (1 - 1e-12))
    if rank > total:
        raise InputError(
            f"{groups} groups allow levels up to {groups}/{groups + 1} = {groups / (groups + 1):.3g}, "
            f"not {level}"
        )
    found = float(scores.abs().flatten().kthvalue(rank).values)
    if not math.isfinite(found):
        share = float(scores.isinf().double().mean())
        raise InputError(
            f"no multiple of the standard deviation reaches the level {level}: it is 0 at {share:.3g} of all "
            "entries although they are wrong there"
        )
    return found


def image_conformal(predictions: Sequence[Predictive], truths: Sequence[Tensor], level: float) -> float:
    """Return the multiple of the standard-deviation map that holds a share of a new image's pixels.

        |x − m| ≤ t std,  t by `conformal_bands` of the scores |x − m|/std, every image a group

    This needs true images, reconstructed alike from scans of the same kind. A pixel without spread whose mean
    is right is held by every t.

    Shapes: predictions and truths (rows, columns), all alike -> ().
    Raises: InputError for numbers of predictions and truths that differ or are 0, different shapes, and as
        `conformal_bands`: n images allow levels up to n/(n + 1).
    Holds: E[share of pixels held] ≥ level over draws of all images, if they are exchangeable; no promise for
        any one image, or any one place in it.
    Source: Angelopoulos, Bates, Fisch, Lei, Schuster 2022, arXiv 2208.02814.
    """
    if len(predictions) != len(truths) or not truths:
        raise InputError(
            f"there has to be one true image for every prediction, not {len(truths)} for {len(predictions)}"
        )
    shapes = {tuple(image.shape) for image in (*truths, *(one.mean for one in predictions))}
    if len(shapes) > 1:
        raise InputError(f"images to calibrate with have to be of one shape, not {sorted(shapes)}")
    scores = [_score(one, truth) for one, truth in zip(predictions, truths, strict=True)]
    return conformal_bands(torch.stack(scores), level)


def _score(prediction: Predictive, truth: Tensor) -> Tensor:
    """Give |x − m|/std, 0 where both are 0."""
    error = (truth - prediction.mean).abs()
    return torch.where(error > 0, error / prediction.std, error)
