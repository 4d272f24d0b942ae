"""Where the rays of a scan run: parallel and fan beams through a pixel image, in millimetres and radians.

The y axis points down. Pixel (i, j) of an image of rows × columns is centred at

    x = (j − (columns − 1)/2)·pixel_mm,   y = (i − (rows − 1)/2)·pixel_mm

and detector k at s = (k − (detectors − 1)/2)·spacing_mm + offset_mm. In the view of angle θ the detectors lie
along e = (cos θ, sin θ), and the central ray runs along d = (−sin θ, cos θ) through the rotation centre c.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from operator import index
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError

LARGEST = 2 * math.pi * 1.01
"""Angles beyond a full turn, and a little, are taken for degrees."""


def evenly(views: int, arc: float = math.pi) -> tuple[float, ...]:
    """Return angles in radians that divide an arc into equal parts, its end left out.

    θ_v = v·arc/views

    Raises: InputError for fewer views than one.
    Holds: exactly.
    """
    if views < 1:
        raise InputError(f"a scan needs at least one view, got {views}")
    return tuple(v * arc / views for v in range(views))


def padded(size: int) -> int:
    """Return the side of a square that holds a square image at any turn; as many detectors see all of it.

    S = N + 2(⌊(√2 N − N)/2⌋ + 1)

    Holds: exactly.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (code).
    """
    return size + 2 * (math.floor((math.sqrt(2) * size - size) / 2) + 1)


class Coverage(NamedTuple):
    """Diameters around the rotation centre: of the disc that every view sees, and of the object."""

    seen_mm: float
    object_mm: float

    @property
    def truncated(self) -> bool:
        """Whether a part of the object is beyond the detectors in some view."""
        return self.seen_mm < self.object_mm


@dataclass(frozen=True)
class Beam(ABC):
    """What parallel and fan beams share: views, pixels and detectors.

    Args:
        angles: θ of every view in radians, as numbers or a tensor; kept as a tuple.
        size: side of a square image in pixels, or (rows, columns); kept as the latter.
        detectors: how many there are.
        pixel_mm: side of a pixel.
        spacing_mm: distance of neighbouring detectors, which is also the width of one.
        offset_mm: shift of all detectors along e.
        centre_mm: (x, y) of the rotation centre c from the image's centre.

    Raises: InputError for no angles, angles that look like degrees, and numbers that are not finite or not
        positive where they have to be.
    """

    angles: Sequence[float] | Tensor
    size: int | tuple[int, int]
    detectors: int
    _: KW_ONLY
    pixel_mm: float = 1.0
    spacing_mm: float = 1.0
    offset_mm: float = 0.0
    centre_mm: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        _set(self, "angles", _angles(self.angles))
        sides = tuple(self.size) if isinstance(self.size, Sequence) else (self.size, self.size)
        if len(sides) != 2 or len(self.centre_mm) != 2:
            raise InputError(
                f"a size has one side or two and a centre x and y, got {sides}, {self.centre_mm}"
            )
        _set(self, "size", (_whole("rows", sides[0]), _whole("columns", sides[1])))
        _set(self, "detectors", _whole("detectors", self.detectors))
        _set(self, "centre_mm", tuple(self.centre_mm))
        for name in ("pixel_mm", "spacing_mm"):
            _positive(name, getattr(self, name))
        if not all(map(math.isfinite, (self.offset_mm, *self.centre_mm))):
            raise InputError(f"offset {self.offset_mm} and centre {self.centre_mm} have to be finite, in mm")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the image."""
        return self.size  # type: ignore[return-value]

    @property
    def theta(self) -> Float[Tensor, " views"]:
        """Angles in radians."""
        return torch.tensor(self.angles, dtype=torch.float64)

    @property
    def offsets(self) -> Float[Tensor, " detectors"]:
        """Position s of every detector in mm."""
        place = torch.arange(self.detectors, dtype=torch.float64) - (self.detectors - 1) / 2
        return place * self.spacing_mm + self.offset_mm

    @property
    def reach_mm(self) -> float:
        """Distance from the rotation centre to the farthest corner of the image."""
        sides = zip(self.centre_mm, reversed(self.shape), strict=True)
        return math.hypot(*(abs(c) + n * self.pixel_mm / 2 for c, n in sides))

    def pixels(self) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
        """Return x and y of the centre of every pixel in mm."""
        rows, columns = (
            (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * self.pixel_mm for n in self.shape
        )
        return tuple(torch.meshgrid(columns, rows, indexing="xy"))  # type: ignore[return-value]

    def coverage(self, image: Tensor | None = None) -> Coverage:
        """Compare what every view sees with the image, or with the part of it that is not zero.

        Shapes: image (rows, columns).
        Raises: InputError for an image of another size.
        Holds: exactly for the corners of the pixels.
        """
        reach = self.reach_mm
        if image is not None:
            if image.shape != self.shape:
                raise InputError(f"the image of this scan is {self.shape}, got {tuple(image.shape)}")
            x, y = ((at - c).abs() for at, c in zip(self.pixels(), self.centre_mm, strict=True))
            corners = torch.hypot(x + self.pixel_mm / 2, y + self.pixel_mm / 2)
            reach = float(corners[image.cpu() != 0].max()) if image.any() else 0.0
        half = self.detectors * self.spacing_mm / 2 - abs(self.offset_mm)
        return Coverage(2 * self._seen(max(half, 0.0)), 2 * reach)

    @abstractmethod
    def rays(self) -> tuple[Float[Tensor, "views detectors 2"], Float[Tensor, "views detectors 2"]]:
        """Return a point (x, y) of every ray in mm, and its direction of length 1."""

    @abstractmethod
    def footprint(
        self, x: Float[Tensor, "*points"], y: Float[Tensor, "*points"], angle: float
    ) -> tuple[Float[Tensor, "*points"], Float[Tensor, "*points"]]:
        """Return where on the detector points are seen in a view, in mm, and their rays' angle to d."""

    @abstractmethod
    def _seen(self, half_mm: float) -> float:
        """Return the radius of the disc seen by detectors that reach half_mm to the narrower side."""

    def _turned(self, x: Tensor, y: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        """Return the coordinates of points along e and d."""
        x, y = x - self.centre_mm[0], y - self.centre_mm[1]
        cos, sin = math.cos(angle), math.sin(angle)
        return x * cos + y * sin, y * cos - x * sin

    def _axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return e and d of every view, (views, 1, 2), and c."""
        cos, sin = self.theta.cos(), self.theta.sin()
        e, d = torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)
        return e[:, None], d[:, None], torch.tensor(self.centre_mm, dtype=torch.float64)


@dataclass(frozen=True)
class ParallelBeam(Beam):
    """Parallel rays: one for each angle θ and detector offset s.

        p(θ, s) = ∫ f(c + s e + t d) dt = ∫ f(s cos θ − t sin θ, s sin θ + t cos θ) dt  for c = 0

    Arguments and errors are those of `Beam`.
    """

    def rays(self) -> tuple[Float[Tensor, "views detectors 2"], Float[Tensor, "views detectors 2"]]:
        """Return c + s e and d."""
        e, d, c = self._axes()
        points = c + self.offsets[:, None] * e
        return points, d.expand_as(points)

    def footprint(
        self, x: Float[Tensor, "*points"], y: Float[Tensor, "*points"], angle: float
    ) -> tuple[Float[Tensor, "*points"], Float[Tensor, "*points"]]:
        """Return s of the rays through points, and zeros."""
        s = self._turned(x, y, angle)[0]
        return s, torch.zeros_like(s)

    def _seen(self, half_mm: float) -> float:
        return half_mm


@dataclass(frozen=True)
class FanBeam(Beam):
    """Rays from a point source, which turns with the detectors around c.

        p(θ, s) = ∫ f(c − source_mm d + t (cos γ d + sin γ e)) dt
        γ = atan(s/L) for a flat detector, s/L for a curved one,  L = source_mm + detector_mm

    A curved detector is an arc around the source. With the source far away this is `ParallelBeam`.

    Args:
        source_mm: distance from the source to the rotation centre.
        detector_mm: distance from the rotation centre to the detector; 0 is a detector at the centre.
        curved: whether the detector is curved.

    Raises: InputError also for a source inside the circle that the image sweeps, and as `Beam`.
    """

    _: KW_ONLY
    source_mm: float
    detector_mm: float
    curved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("source_mm", self.source_mm)
        if not 0 <= self.detector_mm < math.inf:
            raise InputError(f"detector_mm has to be 0 or more and finite, got {self.detector_mm}")
        if self.source_mm <= self.reach_mm:
            raise InputError(
                f"the source has to be outside the image, more than {self.reach_mm:.6g} mm from the rotation "
                f"centre, got {self.source_mm:g} mm"
            )
        if self.curved and (abs(self.offsets) / self.length_mm).max() >= math.pi / 2:
            raise InputError(
                f"a curved detector may reach 90° to either side at most, {self.detectors} of "
                f"{self.spacing_mm:g} mm reach farther"
            )

    @property
    def length_mm(self) -> float:
        """Distance from the source to the detector."""
        return self.source_mm + self.detector_mm

    def rays(self) -> tuple[Float[Tensor, "views detectors 2"], Float[Tensor, "views detectors 2"]]:
        """Return the source and cos γ d + sin γ e."""
        e, d, c = self._axes()
        fan = self._fan(self.offsets)[:, None]
        direction = fan.cos() * d + fan.sin() * e
        return (c - self.source_mm * d).expand_as(direction), direction

    def footprint(
        self, x: Float[Tensor, "*points"], y: Float[Tensor, "*points"], angle: float
    ) -> tuple[Float[Tensor, "*points"], Float[Tensor, "*points"]]:
        """Return s and γ of the rays through points."""
        across, along = self._turned(x, y, angle)
        along = along + self.source_mm
        fan = torch.atan2(across, along)
        return self.length_mm * (fan if self.curved else across / along), fan

    def _fan(self, s: Tensor) -> Tensor:
        """Return γ of positions on the detector."""
        return s / self.length_mm if self.curved else torch.atan(s / self.length_mm)

    def _seen(self, half_mm: float) -> float:
        fan = float(self._fan(torch.tensor(half_mm, dtype=torch.float64)))
        return self.source_mm * math.sin(min(fan, math.pi / 2))


def _set(beam: Beam, name: str, value: object) -> None:
    """Set a field of a frozen dataclass, which only its own construction may."""
    object.__setattr__(beam, name, value)


def _angles(given: Sequence[float] | Tensor) -> tuple[float, ...]:
    try:
        angles = tuple(torch.as_tensor(given, dtype=torch.float64).flatten().tolist())
    except (TypeError, ValueError) as error:
        raise InputError("angles have to be numbers in radians, one a view") from error
    if not angles:
        raise InputError("a scan needs at least one angle, got none")
    if not all(map(math.isfinite, angles)):
        raise InputError("angles have to be finite numbers in radians, got one that is not")
    largest = max(angles, key=abs)
    if abs(largest) > LARGEST:
        raise InputError(
            f"angles look like degrees, one is {largest:g}: radians up to a full turn are accepted"
        )
    return angles


def _whole(name: str, value: SupportsIndex) -> int:
    try:
        number = index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"the number of {name} has to be a whole number from 1, got {value}")
    return number


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} has to be positive and finite, got {value}")
