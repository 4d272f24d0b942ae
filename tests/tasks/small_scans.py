"""A small phantom and its scan by the projector that inverts it, for tests of what is fitted to scans."""

from functools import cache
from pathlib import Path

import torch
from rich.console import Console

from gramian.imaging.geometry import ParallelBeam, evenly, padded
from gramian.imaging.phantoms import raster, shepp_logan
from gramian.imaging.radon import Projector
from gramian.tasks.field_fits import Fit, Fitted, Job, Network, fit
from gramian.tasks.observed_views import Observed, observe
from gramian.tasks.scans import Scan

QUIET = Console(quiet=True)
NETWORK = Network(width=16, depth=1, levels=3, features=2, entries=2**9)
"""A field that is fitted in a moment."""


@cache
def phantom_scan(side: int = 16, views: int = 20, peak: float = 1.0, share: float = 0.02) -> Scan:
    """Return a scan of the head phantom with noise of a share of its root mean square."""
    beam = ParallelBeam(evenly(views), side, padded(side))
    truth = peak * raster(shepp_logan(float(side)), side).float()
    exact = Projector(beam).A(truth)
    std = share * float(exact.square().mean().sqrt())
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    return Scan("phantom", beam, exact + std * noise, std, f"Gaussian, {share:g}", peak, "", truth, None, ())


@cache
def seen(held_out: float = 0.2, **more: float) -> Observed:
    """Return the scan with some of its views unseen."""
    return observe(phantom_scan(**more), held_out=held_out)


def settings(steps: int = 40, **more: object) -> Fit:
    """Return settings of a fit on the CPU."""
    return Fit(steps=steps, device="cpu", **more)  # type: ignore[arg-type]


def fitted_in(folder: Path, job: Job, observed: Observed | None = None) -> Fitted:
    """Fit without a word."""
    return fit(job, observed or seen(), folder, QUIET)
