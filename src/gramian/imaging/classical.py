"""The classical methods by name, and the choice of their settings on images that are not the user's."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.filtered import fbp
from gramian.imaging.iterative import cgls, em, sart, sirt
from gramian.imaging.quality import psnr
from gramian.imaging.variation import fista_tv, pdhg_tv

Method = Callable[..., Tensor]
"""A function (projector, sinogram, **settings) -> image of sinograms (*batch, views, detectors)."""
Pairs = tuple[Float[Tensor, "images views detectors"], Float[Tensor, "images n n"]]
"""Sinograms and the images they belong to."""
Score = Callable[[Tensor, Tensor], Tensor]
"""A function (images, truths) -> a number each; the larger, the better."""

METHODS: dict[str, Method] = {
    "fbp": fbp,
    "sirt": sirt,
    "sart": sart,
    "cgls": cgls,
    "em": em,
    "fista_tv": fista_tv,
    "anisotropic_tv": partial(fista_tv, isotropic=False),
    "pdhg_tv": pdhg_tv,
}
"""All classical methods; FISTA with either total variation."""


@dataclass(frozen=True)
class Choice:
    """The settings with the best mean score, and the scores of all that were tried."""

    settings: Mapping[str, Any]
    score: float
    tried: tuple[tuple[Mapping[str, Any], float], ...]


def tuned(
    method: Method,
    settings: Iterable[Mapping[str, Any]],
    projector: Any,
    pairs: Pairs,
    score: Score = psnr,
) -> Choice:
    """Return those of some settings whose reconstructions of validation images score best in the mean.

        argmax_s mean_i score(method(A, y_i; s), x_i)

    Shapes: pairs (images, views, detectors), (images, n, n).
    Raises: InputError without settings, and when none has a finite score.
    Holds: exactly; of equal scores the first.
    """
    sinograms, truths = pairs
    tried = []
    for setting in settings:
        images = method(projector, sinograms, **setting)
        tried.append((dict(setting), float(score(images, truths).mean())))
    return _best(tried)


def stopped(
    method: Method,
    projector: Any,
    pairs: Pairs,
    most: int,
    score: Score = psnr,
    patience: int | None = None,
    **setting: Any,
) -> Choice:
    """Return the number of iterations at which a method's reconstructions of validation images score best.

        argmax_k mean_i score(x_i after k iterations, x_i),  k = 1 … most

    One run is enough for all numbers of iterations. With `patience` it ends when so many iterations in a row
    were no better than the best.

    Shapes: pairs (images, views, detectors), (images, n, n).
    Raises: InputError for no iteration, and when no score is finite.
    Holds: exactly; of equal scores the first.
    """
    sinograms, truths = pairs
    tried: list[tuple[Mapping[str, Any], float]] = []
    best = [0, -math.inf]

    def watch(step: int, images: Tensor) -> bool:
        value = float(score(images, truths).mean())
        tried.append(({**setting, "iterations": step}, value))
        if value > best[1]:
            best[:] = step, value
        return patience is not None and step - best[0] >= patience

    with torch.no_grad():
        method(projector, sinograms, iterations=most, callback=watch, **setting)
    return _best(tried)


def _best(tried: list[tuple[Mapping[str, Any], float]]) -> Choice:
    finite = [one for one in tried if not math.isnan(one[1])]
    if not finite:
        raise InputError("there has to be at least one setting with a score that is a number")
    settings, score = max(finite, key=lambda one: one[1])
    return Choice(settings, score, tuple(tried))
