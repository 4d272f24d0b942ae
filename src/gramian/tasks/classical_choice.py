"""Classical reconstructions of a scan, with settings that unseen views choose and no ground truth."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.classical import METHODS, stopped, tuned
from gramian.imaging.iterative import NON_NEGATIVE
from gramian.imaging.variation import UNIT
from gramian.tasks.observed_views import Observed, Rays

VARIATIONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Weights of total variation on trial, in nats for each unit of images in units of their peak."""
SEEK, FINAL = 120, 200
"""Iterations of methods with total variation while the weight is sought, and then."""
MOST = {"sirt": 250, "em": 150, "cgls": 40, "sart": 10}
"""Iterations among which the best number is sought."""
PATIENCE = 10
"""Iterations in a row that may be no better than the best."""
FIXED: dict[str, dict[str, Any]] = {
    "fbp": {"filter": "hann", "box": UNIT},
    "sirt": {"box": NON_NEGATIVE},
    "sart": {"relaxation": 0.5, "box": NON_NEGATIVE},
    "fista_tv": {"box": UNIT},
    "anisotropic_tv": {"box": UNIT},
    "pdhg_tv": {"box": UNIT},
}
"""Settings that nothing chooses; images are in units of their peak."""


@dataclass(frozen=True, eq=False)
class Classical:
    """A reconstruction by a classical method."""

    name: str
    image: Float[Tensor, "n n"]
    settings: Mapping[str, Any]
    """What was chosen."""
    seconds: float
    """Of the choice and the reconstruction."""
    misfit: float | None = None
    """Of unseen views, a ray, by the same reconstruction of the kept ones alone."""


def check_classical(names: tuple[str, ...]) -> None:
    """Raise InputError for a name that is none of the classical methods'."""
    for name in names:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")


def reconstruct(name: str, observed: Observed) -> Classical:
    """Reconstruct all views by a method, with the settings that predict unseen views best.

    The number of iterations, or the weight of total variation, is chosen by the kept views' reconstructions.
    Without unseen views iterations end where the residuals are nearest the noise, and the weight is
    in the middle of those on trial.

    Raises: InputError for a method that does not exist, and as the methods.
    """
    check_classical((name,))
    began = time.perf_counter()
    fixed, rays = FIXED.get(name, {}), observed.all
    with torch.no_grad():
        chosen = _chosen(name, observed)
        image = METHODS[name](rays.projector, rays.sinogram, **fixed, **chosen)
        seconds, misfit = time.perf_counter() - began, None
        if observed.unseen is not None:
            with suppress(InputError):  # filtered back-projection of a fan needs views without gaps
                kept = METHODS[name](observed.kept.projector, observed.kept.sinogram, **fixed, **chosen)
                misfit = float(observed.unseen.misfit(kept))
    return Classical(name, image, _said(chosen, rays), seconds, misfit)


def chosen_variation(observed: Observed) -> float | None:
    """Return the weight with which FISTA-TV predicts the unseen views best, in nats; None without any."""
    if observed.unseen is None:
        return None
    with torch.no_grad():
        return float(_said(_chosen("fista_tv", observed), observed.all)["weight"])


def _chosen(name: str, observed: Observed) -> dict[str, Any]:
    if name in MOST:
        return {"iterations": _iterations(name, observed)}
    if not name.endswith("_tv"):
        return {}
    variance = float(observed.all.std.square().mean())
    weight = VARIATIONS[3] * variance
    if observed.unseen is not None:
        grid = [{"weight": v * variance, "iterations": SEEK, **FIXED[name]} for v in VARIATIONS]
        kept, unseen = observed.kept, observed.unseen
        pairs = kept.sinogram[None], unseen.sinogram[None]
        best = tuned(METHODS[name], grid, kept.projector, pairs, lambda x, _: -unseen.misfit(x))
        weight = best.settings["weight"]
    return {"weight": weight, "iterations": FINAL}


def _iterations(name: str, observed: Observed) -> int:
    kept, unseen = observed.kept, observed.unseen
    judge = kept if unseen is None else unseen
    pairs = kept.sinogram[None], judge.sinogram[None]

    def score(images: Tensor, _: Tensor) -> Tensor:
        misfit = judge.misfit(images)
        return -misfit if unseen is not None else -(misfit - 1).abs()

    best = stopped(METHODS[name], kept.projector, pairs, MOST[name], score, PATIENCE, **FIXED.get(name, {}))
    return int(best.settings["iterations"])


def _said(chosen: dict[str, Any], rays: Rays) -> dict[str, Any]:
    """Return settings for readers: the weight of total variation in nats."""
    variance = float(rays.std.square().mean())
    return {n: v / variance if n == "weight" else v for n, v in chosen.items()}
