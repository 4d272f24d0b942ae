"""The views of a scan: those that an image is fitted to, and those that are kept from it to judge it by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.energy import Energy
from gramian.imaging.radon import Projector
from gramian.imaging.support import support
from gramian.imaging.unseen_views import folds, hold_out, noise_energy, pixel_energy
from gramian.tasks.scans import Scan


@dataclass(frozen=True, eq=False)
class Rays:
    """Measurements of some views, and the map that predicts them from images in units of their peak."""

    projector: Projector
    sinogram: Float[Tensor, "views detectors"]
    std: Float[Tensor, "views detectors"]
    """Standard deviation of the noise."""

    def energy(self, variation: float = 0.0) -> Energy:
        """Return minus the log posterior density of images given these rays."""
        return Energy(self.projector, self.sinogram, self.std, variation)

    def misfit(self, images: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the mean over rays of squared residuals in units of the noise: 1 for the truth."""
        return self.energy().misfit(images) / self.sinogram.numel()

    def pixel_misfit(self, images: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the residuals' `pixel_energy` over that of the noise, 1 in expectation for the truth.

        Over views that were not fitted it grows with the squared error of pixels, where `misfit` weighs what
        is smooth more.
        """
        residuals = self.projector.A(images) - self.sinogram
        return pixel_energy(residuals).sum(-1) / noise_energy(self.std.square()).sum()

    def of_views(self, views: Sequence[int]) -> "Rays":
        """Return some of the views, by their numbers."""
        return Rays(self.projector.subset(views), self.sinogram[list(views)], self.std[list(views)])


@dataclass(frozen=True, eq=False)
class Observed:
    """A scan ready to be reconstructed."""

    scan: Scan
    all: Rays
    kept: Rays
    """What images are fitted to."""
    unseen: Rays | None
    """What they are judged by."""
    kept_views: tuple[int, ...]
    unseen_views: tuple[int, ...]
    inside: Bool[Tensor, "n n"] | None
    """Pixels in which there can be something by the kept views; all when None."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.all.sinogram.device

    @property
    def size(self) -> int:
        """Side of the image in pixels."""
        return self.scan.geometry.shape[0]

    @property
    def whole(self) -> "Observed":
        """The same with all views to fit to and none unseen."""
        return replace(
            self,
            kept=self.all,
            unseen=None,
            kept_views=tuple(range(len(self.all.sinogram))),
            unseen_views=(),
        )

    def left_out(self) -> Bool[Tensor, "sets views"]:
        """Return which views are in which of the sets that share out all of them, the unseen ones first."""
        sets = folds(len(self.all.sinogram), self.unseen_views)
        found = torch.zeros(len(sets), len(self.all.sinogram), dtype=torch.bool, device=self.device)
        for row, views in zip(found, sets, strict=True):
            row[list(views)] = True
        return found

    def coarse(self, block: int, cache: Path | None = None) -> Rays:
        """Return the kept views as rays through an image of larger pixels."""
        if block == 1:
            return self.kept
        geometry = self.scan.geometry
        wide = replace(geometry, size=self.size // block, pixel_mm=geometry.pixel_mm * block)
        projector = Projector(wide, scale=self.scan.peak, device=self.device, cache=cache)
        return Rays(projector.subset(self.kept_views), self.kept.sinogram, self.kept.std)


def observe(
    scan: Scan,
    *,
    held_out: float = 0.0,
    outline: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Observed:
    """Build the projector of a scan and keep a share of its views unseen.

    Raises: InputError for a share that leaves too few views on either side.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"the share of views that are kept unseen is from 0 to below 1, not {held_out:g}")
    projector = Projector(scan.geometry, scale=scan.peak, device=device, cache=cache)
    std = torch.as_tensor(scan.noise_std, dtype=torch.float32).expand_as(scan.sinogram)
    everything = Rays(projector, scan.sinogram.to(device), std.to(device))
    count = len(scan.sinogram)
    kept, unseen = hold_out(count, held_out, seed) if held_out else (tuple(range(count)), ())
    seen = everything.of_views(kept) if unseen else everything
    inside = support(seen.projector.geometry, seen.sinogram, seen.std) if outline else None
    return Observed(
        scan,
        everything,
        seen,
        everything.of_views(unseen) if unseen else None,
        tuple(kept),
        tuple(unseen),
        inside if inside is None or inside.any() else None,
    )
