"""Classical reconstructions of a scan, with settings that views left out choose and no ground truth."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.classical import METHODS, stopped
from gramian.imaging.iterative import NON_NEGATIVE
from gramian.imaging.unseen_views import pixel_energy
from gramian.imaging.variation import UNIT
from gramian.tasks.observed_views import Observed, Rays

VARIATIONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Weights of total variation on trial, in nats for each unit of images in units of their peak."""
MIDDLE = 3
"""Place of the weight that is tried first, and taken where there is nothing to choose by."""
SHARE = 0.85
"""Weight of total variation with all views as a share of the best one where some are left out, chosen on
validation slices of CT."""
SEEK, FINAL = 125, 200
"""Iterations of methods with total variation while the weight is sought, half as many from the image of a
weight near it, and then."""
TOGETHER = 2**17
"""Pixels of images that are reconstructed together while the weight is sought: what a core's cache holds."""
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
VARIED = ("fista_tv", "anisotropic_tv", "pdhg_tv")
"""Methods with total variation."""


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


@dataclass(frozen=True)
class LeftOut:
    """What a method with total variation says of a scan whose views it leaves out in turn."""

    name: str
    """Of the method."""
    variation: float
    """The weight with which it predicts them best, in nats, times `SHARE`; to three digits, so that machines
    which round differently agree."""
    seconds: float
    """That it took."""


def together(size: int) -> int:
    """Return how many images of a side are reconstructed together."""
    return max(1, TOGETHER // size**2)


def leave_out(
    observed: Observed, name: str = "fista_tv", progress: Callable[[int], None] | None = None
) -> LeftOut | None:
    """Reconstruct a scan without each of its views, by several weights of total variation.

        β = .85 argmin Σ |ω| |F(y − A x_β)|²  over views y and images x_β of the others

    As many views at a time are left out as are unseen. From the middle of the weights on trial neighbours are
    tried for as long as the energy of errors at pixels falls; a parabola through the three least in log
    weight is least at the best. The unseen views alone say little of a weight: what they cross may be smooth
    or not.

    Args:
        observed: the scan; its unseen views are the first to be left out.
        name: of the method.
        progress: told how many reconstructions there were.

    Returns: None where no view is unseen.
    Raises: InputError for a method without total variation, and as the methods.
    """
    if name not in VARIED:
        raise InputError(f"{name!r} has no total variation to weigh; choose one of {', '.join(VARIED)}")
    if observed.unseen is None:
        return None
    began, rays = time.perf_counter(), observed.all
    parts = observed.left_out()[..., None].split(together(observed.size))
    variance, images, done = float(rays.std.square().mean()), dict[int, Tensor](), 0

    def residuals(nats: float) -> Tensor:
        nonlocal done
        found = torch.zeros_like(rays.sinogram)
        for number, left in enumerate(parts):
            start, given = images.get(number), rays.sinogram.expand(len(left), *rays.sinogram.shape)
            steps, kept = SEEK if start is None else SEEK // 2, (~left).to(given)
            chosen = {"precision": kept, "start": start, **FIXED[name]}
            images[number] = METHODS[name](rays.projector, given, nats * variance, steps, **chosen)
            found += ((rays.projector.A(images[number]) - rays.sinogram) * left).sum(0)
            done += len(left)
            if progress is not None:
                progress(done)
        return found

    with torch.no_grad():
        best, energies = MIDDLE, dict[int, float]()
        while True:
            for place in {best - 1, best, best + 1} & set(range(len(VARIATIONS))) - set(energies):
                energies[place] = float(pixel_energy(residuals(VARIATIONS[place]).double()).sum())
            best, last = min(energies, key=energies.__getitem__), best
            if best == last:
                break
    tried = sorted(energies)
    variation = vertex([VARIATIONS[place] for place in tried], [energies[place] for place in tried])
    return LeftOut(name, float(f"{SHARE * variation:.3g}"), time.perf_counter() - began)


def reconstruct(name: str, observed: Observed, known: LeftOut | None = None) -> Classical:
    """Reconstruct all views by a method, with the settings that predict unseen views best.

    The number of iterations is chosen by the kept views' reconstructions as `Rays.pixel_misfit` judges them,
    the weight of total variation by `leave_out`, unless what it says of this method is known. Without unseen
    views iterations end where the residuals are nearest the noise, and the weight is in the middle of those
    on trial.

    Raises: InputError for a method that does not exist, and as the methods.
    """
    check_classical((name,))
    known = known if known is not None and known.name == name else None
    began = time.perf_counter() - (known.seconds if known else 0.0)
    fixed, rays = FIXED.get(name, {}), observed.all
    with torch.no_grad():
        chosen = _chosen(name, observed, known)
        image = METHODS[name](rays.projector, rays.sinogram, **fixed, **chosen)
        seconds, misfit = time.perf_counter() - began, None
        if observed.unseen is not None:
            with suppress(InputError):  # filtered back-projection of a fan needs views without gaps
                kept = METHODS[name](observed.kept.projector, observed.kept.sinogram, **fixed, **chosen)
                misfit = float(observed.unseen.misfit(kept))
    return Classical(name, image, _said(chosen, rays), seconds, misfit)


def _chosen(name: str, observed: Observed, known: LeftOut | None) -> dict[str, Any]:
    if name in MOST:
        return {"iterations": _iterations(name, observed)}
    if name not in VARIED:
        return {}
    left = known or leave_out(observed, name)
    nats = VARIATIONS[MIDDLE] if left is None else left.variation
    return {"weight": nats * float(observed.all.std.square().mean()), "iterations": FINAL}


def vertex(places: Sequence[float], values: Sequence[float]) -> float:
    """Return where a parabola through the least value and its neighbours is least, in log place.

        p r^{(v₋ − v₊)/(2(v₋ − 2v + v₊))},  p the place of the least value v, r the ratio of places

    Holds: exactly for parabolas in log place; at either end it is that place.
    """
    least = min(range(len(values)), key=values.__getitem__)
    if not 0 < least < len(values) - 1:
        return places[least]
    before, here, after = values[least - 1 : least + 2]
    bend = before - 2 * here + after
    step = (before - after) / (2 * bend) if bend > 0 else 0.0
    return places[least] * (places[least + 1] / places[least]) ** step


def _iterations(name: str, observed: Observed) -> int:
    kept, unseen = observed.kept, observed.unseen
    judge = kept if unseen is None else unseen
    pairs = kept.sinogram[None], judge.sinogram[None]

    def score(images: Tensor, _: Tensor) -> Tensor:
        return -judge.pixel_misfit(images) if unseen is not None else -(judge.misfit(images) - 1).abs()

    best = stopped(METHODS[name], kept.projector, pairs, MOST[name], score, PATIENCE, **FIXED.get(name, {}))
    return int(best.settings["iterations"])


def _said(chosen: dict[str, Any], rays: Rays) -> dict[str, Any]:
    """Return settings for readers: the weight of total variation in nats."""
    variance = float(rays.std.square().mean())
    return {n: v / variance if n == "weight" else v for n, v in chosen.items()}
