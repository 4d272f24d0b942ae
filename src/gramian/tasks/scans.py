"""What is reconstructed: a scan that is simulated, of a phantom or an image, or one that was measured.

The matrix that inverts a simulated scan never made it. Phantoms and ellipses have sinograms in closed form,
of which a detector sees the mean over its width, and their truth is the mean of each pixel. Images are
projected in their own pixels by the `area` model, strips as wide as a detector; a reconstruction uses the
`linear` one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.dicom import WATER, CTSlice, attenuation, hounsfield
from gramian.imaging.geometry import LARGEST, Beam
from gramian.imaging.iterative import NON_NEGATIVE, sirt
from gramian.imaging.noise import GaussianNoise, PoissonNoise
from gramian.imaging.phantoms import Ellipse, random_ellipses, raster, shepp_logan, sinogram
from gramian.imaging.radon import Projector
from gramian.tasks.scan_beams import Scanner, affordable, told_of_coverage, told_of_views
from gramian.tasks.scan_files import (
    EXAMPLE,
    MADE,
    MOST,
    SMALLEST,
    UNITS,
    in_radians,
    kind_of,
    located,
    read_angles,
    read_dicom,
    read_image,
    read_sinogram,
)

BEAMS = ("parallel", "fan")
SIDE = 128
"""Pixels a side of a phantom when none are asked for."""
COUNT, REACH = 12, 0.45
"""Random ellipses, and the radius of the disc that holds them as a share of the side."""
LENGTHS = (1e-6, 1e6)
LIMITS: dict[str, tuple[float, float]] = {
    "views": (1, MOST),
    "size": (SMALLEST, 4096),
    "detectors": (SMALLEST, MOST),
    "noise_db": (-20, 120),
    "photons": (1, 1e12),
    "noise_std": (1e-18, 1e12),
    "pixel_mm": LENGTHS,
    "spacing_mm": LENGTHS,
    "offset_mm": (-1e6, 1e6),
    "source_mm": (1e-6, 1e9),
    "detector_mm": (0, 1e9),
    "seed": (0, 2**53),
}
"""From where to where settings may go."""
SIMULATED = ("views", "detectors", "noise_db", "photons")
MEASURED = ("angle_unit", "noise_std")
FAN = ("source_mm", "detector_mm", "curved")
RAYS = 4
"""Rays to a detector in the sinograms of ellipses."""
QUIET = 1e-4
"""Noise of a measured sinogram is taken to be at least this share of its root mean square, which is 80 dB."""
PEAK_SIDE, PEAK_VIEWS, PEAK_STEPS, PEAK_SHARE, PEAK_FACTOR = 128, 180, 60, 0.999, 1.5
"""The peak: factor × quantile of a reconstruction by so many steps from at most so many pixels and views."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A sinogram and all that is known about it.

    Shapes: sinogram (views, detectors), float32, in the image's unit × mm; truth (n, n), float32.
    """

    name: str
    """What was scanned, in words."""
    geometry: Beam
    sinogram: Float[Tensor, "views detectors"]
    noise_std: Float[Tensor, "views detectors"] | float
    """Standard deviation of each measurement's noise; a number where it is one for all."""
    noise: str
    """The noise in words."""
    peak: float
    """Greatest value that is expected of the image, in its unit: 1 for phantoms, and for images without a
    unit whose own is from .5 to 1; of others estimated from the sinogram alone."""
    unit: str
    """1/mm for attenuation; nothing for numbers without a unit."""
    truth: Float[Tensor, "n n"] | None
    slice: CTSlice | None
    """What results are written like as DICOM, of the reconstruction's size."""
    warnings: tuple[str, ...]
    """What a user has to know, a sentence each."""

    def projector(
        self,
        views: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ) -> Projector:
        """Return the map of images to the sinogram, or to some of its views, in float32.

        Raises: InputError for no views and numbers beyond them.
        """
        beam, count = self.geometry, len(self.geometry.angles)
        if views is not None:
            if not len(views) or not all(0 <= view < count for view in views):
                raise InputError(f"some of the views 0 to {count - 1} are needed, got {list(views)}")
            beam = replace(beam, angles=[beam.angles[view] for view in views])
        return Projector(beam, device=device, cache=cache)

    def to_hounsfield(self, image: Float[Tensor, "*at"]) -> Float[Tensor, "*at"] | None:
        """Return an image in Hounsfield units, or None where its values are no attenuation per mm."""
        return hounsfield(image) if self.unit else None


@dataclass(frozen=True, kw_only=True)
class Source(Scanner):
    """What is scanned, and how."""

    scan: Annotated[str, tyro.conf.Positional] = "phantom"
    """phantom (Shepp–Logan), ellipses, example (the CT slice that comes with pydicom), a .dcm file or a
    square image in .npy to be projected, or a sinogram in .npy (views, detectors) with --angles."""
    angles: Path | None = None
    """.npy or text file of the angles of a sinogram's views, which makes the .npy a sinogram."""
    angle_unit: str = "auto"
    """degrees, radians, or auto: what they can only be."""
    views: int = 60
    """Views of what is simulated, evenly over half a turn, or a whole one of a fan beam."""
    size: int | None = None
    """Side of the reconstruction in pixels. 128 for phantoms, an image's own side, and for a sinogram the
    largest square that all views see, or the square around what they see where the object reaches farther."""
    noise_db: float = 40.0
    """Signal-to-noise ratio of Gaussian noise that is added to what is simulated."""
    photons: float | None = None
    """Photons a ray without an object, for Poisson noise instead; the greatest value of an image without a
    unit then attenuates as water does."""
    noise_std: float | None = None
    """Standard deviation of the noise of a sinogram that was measured; estimated when not given."""
    seed: int = 0
    """Seed of ellipses and noise."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for name, known in (("beam", BEAMS), ("angle_unit", UNITS)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} has to be from {low:,g} to {high:,g}, got {value:g}")
        if self.beam != "fan":
            self._without(FAN, "is for --beam fan")
        if self.photons is not None:
            self._without(("noise_db",), "is for Gaussian noise, give it or photons")
        if self.angles is None:
            self._without(MEASURED, "is for a sinogram with --angles")
            return
        if self.scan in (*MADE, EXAMPLE):
            raise InputError(f"angles are for a sinogram in .npy, not for {self.scan}")
        self._without(SIMULATED, "is for what is simulated, not for a sinogram with --angles")
        if self.beam == "fan" and (self.source_mm is None or self.detector_mm is None):
            raise InputError(
                "a sinogram of a fan beam needs source_mm and detector_mm (0 where spacing_mm is the width "
                "at the rotation centre)"
            )

    def load(self, cache: Path | None = None) -> Scan:
        """Return the scan; what is simulated is the same for equal settings.

        Raises: MissingExtraError for DICOM without pydicom; InputError for settings and files that cannot be
            used, and scans that would take more than 8 GiB, before they are allocated.
        """
        self.check()
        kind = kind_of(self.scan)
        if kind in ("dicom", EXAMPLE):
            self._without(("angles",), "is for a sinogram in .npy, not for DICOM")
            self._without(("pixel_mm",), "is in the DICOM file: leave it out")
            return self._of_slice(read_dicom(self.scan), cache)
        if kind in MADE:
            return self._of_ellipses(kind)
        path = located(self.scan)
        if self.angles is not None:
            return self._of_sinogram(path, self.angles, cache)
        return self._of_image(read_image(path), self.pixel_mm or 1.0, path.name, cache)

    def _without(self, names: Sequence[str], reason: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise InputError(f"{name} {reason}")

    def _of_ellipses(self, kind: str) -> Scan:
        draws = torch.Generator().manual_seed(self.seed)
        size, pixel_mm = self.size or SIDE, self.pixel_mm or 1.0
        beam = self.simulated(self.views, size, pixel_mm)
        affordable(beam)
        side = size * pixel_mm
        parts = shepp_logan(side) if kind == "phantom" else random_ellipses(COUNT, REACH * side, draws)
        truth = raster(parts, size, pixel_mm)
        top = float(truth.max()) if kind == "ellipses" else 1.0
        parts = [replace(part, value=part.value / top) for part in parts]
        name = "Shepp–Logan phantom" if kind == "phantom" else f"{COUNT} random ellipses"
        return self._scan(name, beam, _seen(parts, beam), truth / top, draws, peak=1.0)

    def _of_slice(self, given: CTSlice, cache: Path | None) -> Scan:
        name = "CT slice that comes with pydicom" if self.scan == EXAMPLE else located(self.scan).name
        image = attenuation(given.hounsfield.double())
        if not image.any():
            raise InputError(f"{name} is air everywhere: there is nothing to reconstruct")
        found = self._of_image(image, given.pixel_mm, name, cache, unit="1/mm")
        assert found.truth is not None
        return replace(found, slice=_coarser(given, found.truth))

    def _of_image(
        self, image: Tensor, pixel_mm: float, name: str, cache: Path | None, unit: str = ""
    ) -> Scan:
        side = len(image)
        size = self.size or side
        if side % size:
            near = sorted((n for n in range(SMALLEST, side + 1) if not side % n), key=lambda n: abs(n - size))
            raise InputError(
                f"a size of {size} does not divide the {side} pixels of {name}; the nearest that do are "
                f"{', '.join(map(str, sorted(near[:3])))}"
            )
        if not LENGTHS[0] <= pixel_mm <= LENGTHS[1]:
            raise InputError(
                f"pixels of {name} are {pixel_mm:g} mm wide; {LENGTHS[0]:g} to {LENGTHS[1]:g} are accepted"
            )
        block = side // size
        beam = self.simulated(self.views, size, pixel_mm * block)
        fine = replace(beam, size=side, pixel_mm=pixel_mm)
        affordable(beam, fine)
        truth = image.unflatten(0, (size, block)).unflatten(-1, (size, block)).mean((1, 3))
        exact = Projector(fine, "area")(image.float()).double()
        draws = torch.Generator().manual_seed(self.seed)
        peak = 1.0 if not unit and 0.5 <= float(image.max()) <= 1 else None
        return self._scan(name, beam, exact, truth, draws, peak=peak, unit=unit, cache=cache)

    def _of_sinogram(self, path: Path, file: Path, cache: Path | None) -> Scan:
        angles = read_angles(file)
        values, std = read_sinogram(path, angles, self.noise_std)
        beam, told = self.measured(in_radians(angles, self.angle_unit), values, self.size)
        affordable(beam)
        narrow = float(angles.abs().max())
        if self.angle_unit == "degrees" and narrow <= LARGEST:
            told.append(f"all angles are within {narrow:.3g}° of 0; --angle-unit radians, if they are these")
        least = QUIET * float(values.square().mean().sqrt())
        if self.noise_std is None and std < least:
            std = least
            told.append("hardly any noise is in the sinogram: it is taken to be 80 dB below the signal")
        found = "estimated" if self.noise_std is None else "as given"
        words, measured = f"Gaussian, standard deviation {std:.3g}, {found}", values.float()
        peak = _peak(beam, measured, cache)
        told += told_of_views(beam)
        return Scan(path.name, beam, measured, std, words, peak, "", None, None, tuple(told))

    def _scan(
        self,
        name: str,
        beam: Beam,
        exact: Float[Tensor, "views detectors"],
        truth: Float[Tensor, "n n"],
        draws: torch.Generator,
        *,
        peak: float | None,
        unit: str = "",
        cache: Path | None = None,
    ) -> Scan:
        """Add noise to exact line integrals."""
        if not (exact > 0).any():
            raise InputError(f"no ray meets the object of {name}: offset_mm or the detectors miss it")
        told = [*told_of_coverage(beam, truth), *told_of_views(beam)]
        if self.photons is None:
            noise = GaussianNoise.at_snr(exact, self.noise_db)
            measured, std, words = noise.sample(exact, draws), noise.std, f"Gaussian, {self.noise_db:g} dB"
        else:
            measured, std, dark = _counted(
                exact, self.photons, draws, 1.0 if unit else WATER / float(truth.max())
            )
            words = f"Poisson, {self.photons:g} photons a ray"
            if dark:
                told.append(
                    f"{dark:,} of {exact.numel():,} rays counted no photon: what they tell is a guess"
                )
        measured = measured.float()
        found = _peak(beam, measured, cache) if peak is None else peak
        return Scan(name, beam, measured, std, words, found, unit, truth.float(), None, tuple(told))


def _seen(parts: Sequence[Ellipse], beam: Beam) -> Float[Tensor, "views detectors"]:
    """Return the line integrals of ellipses, the mean of four in each detector's width."""
    places = [beam.offset_mm + (j / RAYS - (RAYS - 1) / 2 / RAYS) * beam.spacing_mm for j in range(RAYS)]
    return torch.stack([sinogram(parts, replace(beam, offset_mm=place)) for place in places]).mean(0)


def _counted(
    exact: Tensor, photons: float, draws: torch.Generator, attenuating: float
) -> tuple[Tensor, Tensor, int]:
    """Return line integrals by counted photons, their standard deviations, and how many rays counted none."""
    noise = PoissonNoise(photons)
    counts = noise.counts(exact * attenuating, draws)
    logarithms = noise.line_integrals(counts)
    std = noise.log_variance(logarithms).sqrt() / attenuating
    return logarithms / attenuating, std.float(), int((counts == 0).sum())


def _peak(beam: Beam, measured: Float[Tensor, "views detectors"], cache: Path | None) -> float:
    """Return the greatest value that an image is expected to have, by the data alone.

        1.5 · Q_{.999} of 60 steps of SIRT that is nowhere negative, on a grid of at most 128 pixels a side

    Raises: InputError where nothing positive explains the data.
    """
    side, count = min(beam.shape[0], PEAK_SIDE), len(beam.angles)
    views, pixel_mm = range(0, count, -(-count // PEAK_VIEWS)), beam.pixel_mm * beam.shape[0] / side
    coarse = replace(beam, angles=[beam.angles[view] for view in views], size=side, pixel_mm=pixel_mm)
    image = sirt(
        Projector(coarse, cache=cache), measured[list(views)], PEAK_STEPS, relaxation=1.5, box=NON_NEGATIVE
    )
    high = float(image.flatten().quantile(PEAK_SHARE)) or float(image.max())
    if not 0 < high < math.inf:
        raise InputError("no image that is nowhere negative explains this sinogram")
    return PEAK_FACTOR * high


def _coarser(given: CTSlice, truth: Float[Tensor, "n n"]) -> CTSlice:
    """Return the slice whose pixels are blocks of the given one's."""
    block = len(given.hounsfield) // len(truth)
    position = given.position
    if position is not None and given.orientation is not None:
        shift, ways = (block - 1) / 2 * given.pixel_mm, given.orientation
        position = tuple(
            at + shift * (row + column) for at, row, column in zip(position, ways[:3], ways[3:], strict=True)
        )
    return replace(given, hounsfield=hounsfield(truth), pixel_mm=block * given.pixel_mm, position=position)
