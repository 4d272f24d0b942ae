"""Where the rays of a user's scan run, what that costs, and what a user has to know about it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.geometry import Beam, FanBeam, ParallelBeam, evenly
from gramian.imaging.symmetry import fold
from gramian.tasks.scan_files import LARGEST_SIDE, MOST, SMALLEST

FAR = 4.0
"""Distance of a fan's source when none is given, as a multiple of the image's reach."""
ROOM = 2**33
"""Most bytes that a scan and its matrices may take."""
FEW = 20
"""With fewer views a user is told."""
GAP, WIDER = math.pi / 6, 3.0
"""A gap between views beyond this, and so many times the median, is told; in a fan beyond half a turn."""
SEEN, MISSED = 0.05, 0.01
"""Shares of what is measured, at the outermost detectors and beside the image, above which a user is told."""
SAME = 1 + 1e-6


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """Source and detectors, with what is not given left open."""

    beam: str = "parallel"
    """parallel or fan."""
    pixel_mm: float | None = None
    """Side of a pixel: of a phantom or an image in .npy, 1 when not given, or of the reconstruction of a
    sinogram, by default a detector's width at the rotation centre. A DICOM file has its own."""
    spacing_mm: float | None = None
    """Width of a detector: what covers the image when not given, 1 for a sinogram."""
    offset_mm: float = 0.0
    """Shift of the detectors."""
    detectors: int | None = None
    """How many detectors simulate; as many as cover the image when not given."""
    source_mm: float | None = None
    """Distance from a fan's source to the rotation centre; a sinogram of a fan needs it."""
    detector_mm: float | None = None
    """Distance from the rotation centre to a fan's detector, 0 where widths are those at the centre; a
    sinogram of a fan needs it."""
    curved: bool = False
    """Whether a fan's detector is an arc around the source."""

    def simulated(self, views: int, size: int, pixel_mm: float) -> Beam:
        """Return the rays that simulate a scan of an image: all of it is seen unless detectors say otherwise.

        Views divide half a turn, or a whole one of a fan. Detectors are as wide as a pixel's shadow.

        Raises: InputError as the beam, and for more detectors than 20,000.
        """
        reach = size * pixel_mm / math.sqrt(2)
        source = FAR * reach if self.source_mm is None else self.source_mm
        place = source, source if self.detector_mm is None else self.detector_mm
        angles = evenly(views, 2 * math.pi if self.beam == "fan" else math.pi)
        one = self._made(angles, size, pixel_mm, 1, 1.0, *place)
        width = 2 * (shadow_mm(one) + abs(self.offset_mm))
        spacing, detectors = self.spacing_mm, self.detectors
        if spacing is None:
            spacing = width / detectors if detectors else pixel_mm * magnification(one)
        detectors = detectors or math.ceil(width / spacing / SAME)
        if detectors > MOST:
            raise InputError(
                f"the image's shadow of {width:g} mm takes {detectors:,} detectors of {spacing:g} mm; at "
                f"most {MOST:,} are accepted"
            )
        return self._made(angles, size, pixel_mm, detectors, spacing, *place)

    def measured(
        self,
        angles: Float[Tensor, " views"],
        sinogram: Float[Tensor, "views detectors"],
        size: int | None,
    ) -> tuple[Beam, list[str]]:
        """Return the rays of a sinogram, and what its values tell about them, a sentence each.

        Of no stated size, the image is the largest square that every view sees, and where rays beside it see
        something, the square around all that every view sees.

        Raises: InputError as the beam, for detectors that see no image, and sizes beyond 4096.
        """
        spacing, detectors = self.spacing_mm or 1.0, sinogram.shape[1]
        place = self.source_mm or 1.0, self.detector_mm or 0.0
        at_centre = spacing * place[0] / sum(place) if self.beam == "fan" else spacing
        pixel_mm = self.pixel_mm or at_centre
        start = tuple(angles.tolist())
        one = self._made(start, 1, min(pixel_mm, at_centre), detectors, spacing, *place)
        seen = one.coverage().seen_mm / pixel_mm * SAME
        inner, outer = math.floor(seen / math.sqrt(2)), math.floor(seen)
        if outer < SMALLEST or (size or inner) > LARGEST_SIDE:
            raise InputError(
                f"every view sees a disc of {seen * pixel_mm:.4g} mm, in which there are {inner} × {inner} "
                f"pixels of {pixel_mm:g} mm; {SMALLEST} to {LARGEST_SIDE} a side are accepted"
            )
        beam = self._made(start, size or max(inner, SMALLEST), pixel_mm, detectors, spacing, *place)
        beside, told = _beside(beam, sinogram), list(_cut_off(sinogram, spacing))
        around = replace(beam, size=outer) if self._outside(outer * pixel_mm) else beam
        if beside > MISSED and size is None and around.shape > beam.shape:
            told.append(
                f"the object reaches beyond the largest square that all views see, of {inner} pixels, so the "
                f"image has {outer} pixels a side, with corners that not all views see"
            )
            return around, told
        if beside > MISSED:
            told.append(
                f"{beside:.0%} of the signal is on rays beside the image of {beam.shape[0]} pixels, which "
                "makes errors inside; a larger size takes it in"
            )
        return beam, told

    def _outside(self, side_mm: float) -> bool:
        """Tell whether a square turns without meeting a fan's source."""
        return self.beam != "fan" or side_mm < math.sqrt(2) * (self.source_mm or math.inf)

    def _made(
        self,
        angles: tuple[float, ...],
        size: int,
        pixel_mm: float,
        detectors: int,
        spacing: float,
        source_mm: float,
        detector_mm: float,
    ) -> Beam:
        plain = ParallelBeam(
            angles, size, detectors, pixel_mm=pixel_mm, spacing_mm=spacing, offset_mm=self.offset_mm
        )
        if self.beam == "parallel":
            return plain
        fan = {"source_mm": source_mm, "detector_mm": detector_mm, "curved": self.curved}
        return FanBeam(**vars(plain), **fan)


def magnification(beam: Beam) -> float:
    """Return how much wider than at the rotation centre things are on the detector."""
    return beam.length_mm / beam.source_mm if isinstance(beam, FanBeam) else 1.0


def shadow_mm(beam: Beam) -> float:
    """Return half the width of what the disc around the image casts on the detector."""
    if not isinstance(beam, FanBeam):
        return beam.reach_mm
    fan = math.asin(beam.reach_mm / beam.source_mm)
    return beam.length_mm * (fan if beam.curved else math.tan(fan))


def affordable(beam: Beam, finer: Beam | None = None) -> None:
    """Refuse a scan that would take too much memory, before any of it is allocated.

        bytes ≈ 100 M + 32 n V′ D′ + (16 V′ (1.3 w + 1) + 64 (1.5 w + 8)) n′²

    M measurements, n pixels a side, V′ views that symmetry leaves, D′ detectors in the image's shadow; the
    last part is for an image of n′ pixels a side, w detectors wide, that is projected.

    Raises: InputError with the numbers beyond 8 GiB.
    """
    needed = _bytes(beam, finer, len(beam.angles))
    if needed > ROOM:
        needed = _bytes(beam, finer, len(fold(beam).geometry.angles))
    if needed > ROOM:
        shown = beam if finer is None else finer
        raise InputError(
            f"{len(beam.angles):,} views by {beam.detectors:,} detectors of {shown.shape[0]} × "
            f"{shown.shape[0]} pixels would take about {needed / 2**30:,.0f} GiB, most of it for the matrix; "
            f"at most {ROOM // 2**30} GiB are accepted: take fewer views or a smaller size"
        )


def _bytes(beam: Beam, finer: Beam | None, held: int) -> float:
    met = min(beam.detectors, 2 * shadow_mm(beam) / beam.spacing_mm + 2)
    total = 100.0 * len(beam.angles) * beam.detectors + 32.0 * beam.shape[0] * held * met
    if finer is not None:
        wide = min(finer.pixel_mm * magnification(finer) / finer.spacing_mm, finer.detectors)
        pixels = float(finer.shape[0]) ** 2
        total += (16 * held * (1.3 * wide + 1) + 64 * (1.5 * wide + 8)) * pixels
    return total


def told_of_views(beam: Beam) -> Iterator[str]:
    """Yield what is to be known about the angles of a scan."""
    count, fan = len(beam.angles), isinstance(beam, FanBeam)
    if count < FEW:
        yield f"{count} views are few: with fewer than {FEW} much of the image is the method's guess"
    turn = 2 * math.pi if fan else math.pi
    angles = (beam.theta % turn).sort().values
    gaps = torch.cat((angles.diff(), angles[:1] + turn - angles[-1:]))
    gaps = gaps[gaps > 1e-9]
    widest = float(gaps.max())
    if widest > (math.pi if fan else GAP) * SAME and (count == 1 or widest > WIDER * float(gaps.median())):
        yield (
            f"no view is from a wedge of {math.degrees(widest):.0f}° of the {math.degrees(turn):.0f}°: edges "
            "along it are not seen"
        )


def told_of_coverage(beam: Beam, truth: Float[Tensor, "n n"]) -> Iterator[str]:
    """Yield what is to be known about detectors that are narrower than the object."""
    seen, whole = beam.coverage(truth)
    if seen * SAME < whole:
        yield (
            f"the detectors are narrower than the object: every view sees a disc of {seen:.4g} mm and the "
            f"object reaches over {whole:.4g} mm, so there will be errors inside as well"
        )


def _beside(beam: Beam, sinogram: Tensor) -> float:
    """Return the share of the signal that is on rays that miss the image."""
    half = beam.shape[0] * beam.pixel_mm / 2
    corner = torch.tensor((-half, half), dtype=torch.float64)
    y, x = (at.flatten() for at in torch.meshgrid(corner, corner, indexing="ij"))
    s, half_wide = beam.offsets, beam.spacing_mm / 2
    total = 0.0
    for values, angle in zip(sinogram, beam.theta.tolist(), strict=True):
        place = beam.footprint(x, y, angle)[0]
        missed = (s < place.min() - half_wide) | (s > place.max() + half_wide)
        total += float(values[missed].sum())
    return total / max(float(sinogram.abs().sum()), 1e-300)


def _cut_off(sinogram: Tensor, spacing: float) -> Iterator[str]:
    """Yield what is to be known where the object reaches beyond the detectors."""
    typical = float(sinogram.abs().max(1).values.mean())
    edge = max(float(sinogram[:, place].mean()) for place in (0, -1))
    if edge > SEEN * typical:
        width = sinogram.shape[1] * spacing
        yield (
            f"the outermost detectors see {edge / typical:.0%} of the greatest values: the object reaches "
            f"beyond the {width:.4g} mm of detectors, so there will be errors inside as well, or these are "
            "intensities and not −ln(I/I₀)"
        )
