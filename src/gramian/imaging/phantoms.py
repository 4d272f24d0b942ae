"""Phantoms made of ellipses: their images, and their sinograms in closed form for every geometry.

Coordinates are those of `imaging/geometry.py`: millimetres from the image's centre, y down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.geometry import Beam

SHEPP_LOGAN = (
    # value, semi-axes a and b, centre x and y (up), angle in degrees (anticlockwise); in halves of the side
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0),
    (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0.0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0.0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.1, 0.023, 0.023, 0.0, -0.606, 0.0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
)
"""Shepp, Logan 1974, IEEE Transactions on Nuclear Science 21, 21, with the contrasts of Toft 1996,
"The Radon Transform: Theory and Implementation" (thesis)."""


@dataclass(frozen=True)
class Ellipse:
    """An ellipse of constant value; where several overlap their values add up.

        f(x, y) = value  where  (u/a)² + (v/b)² ≤ 1,   (u, v) = Rᵀ(x − x₀, y − y₀)

    Args:
        x_mm: x₀.
        y_mm: y₀.
        a_mm: semi-axis along (cos angle, sin angle).
        b_mm: the other semi-axis.
        angle: turn R in radians, from x towards y, which is down.
        value: attenuation, per mm if sinograms are to be without a unit.

    Raises: InputError for semi-axes that are not positive, and numbers that are not finite.
    """

    x_mm: float
    y_mm: float
    a_mm: float
    b_mm: float
    angle: float = 0.0
    value: float = 1.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.x_mm, self.y_mm, self.a_mm, self.b_mm, self.angle, self.value))):
            raise InputError("an ellipse takes finite numbers, got one that is not")
        if self.a_mm <= 0 or self.b_mm <= 0:
            raise InputError(f"semi-axes have to be positive, got {self.a_mm:g} and {self.b_mm:g} mm")

    def unit(self, vectors: Float[Tensor, "*at 2"]) -> tuple[Float[Tensor, "*at"], Float[Tensor, "*at"]]:
        """Return vectors in coordinates in which the ellipse is a circle of radius 1."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y = vectors.unbind(-1)
        return (x * cos + y * sin) / self.a_mm, (y * cos - x * sin) / self.b_mm

    def chords(
        self, points: Float[Tensor, "*at 2"], directions: Float[Tensor, "*at 2"]
    ) -> Float[Tensor, "*at"]:
        """Return the lengths in mm that lines have inside the ellipse.

            2√(|w|² − (q × w)²)/|w|²,  q and w a point and the direction in the ellipse's coordinates

        Holds: exactly; the cross product does not cancel for points far away.
        """
        q = self.unit(points - torch.tensor((self.x_mm, self.y_mm), dtype=points.dtype))
        w = self.unit(directions)
        squared = w[0] ** 2 + w[1] ** 2
        inside = squared - (q[0] * w[1] - q[1] * w[0]) ** 2
        return 2 * inside.clamp(min=0).sqrt() / squared


def sinogram(ellipses: Sequence[Ellipse], geometry: Beam) -> Float[Tensor, "views detectors"]:
    """Return the line integrals of ellipses along the rays of a scan, in closed form.

    Σ value · chord

    Holds: exactly, without any pixels: at the middle of each detector.
    """
    points, directions = geometry.rays()
    total = torch.zeros(points.shape[:2], dtype=torch.float64)
    for ellipse in ellipses:
        total += ellipse.value * ellipse.chords(points, directions)
    return total


def raster(
    ellipses: Sequence[Ellipse], size: int, pixel_mm: float = 1.0, *, samples: int = 16
) -> Float[Tensor, "size size"]:
    """Return the image of ellipses: the mean of each pixel over a grid of samples.

    Only pixels that a boundary may cross are sampled.

    Args:
        ellipses: what there is; values add up.
        size: side of the image in pixels.
        pixel_mm: side of a pixel.
        samples: points a side of each pixel.

    Raises: InputError for sizes and samples below 1.
    Holds: exactly inside and outside, with error O(1/samples) of the value at boundaries.
    """
    if size < 1 or samples < 1:
        raise InputError(f"an image takes at least one pixel and one sample, got {size} and {samples}")
    place = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * pixel_mm
    y, x = torch.meshgrid(place, place, indexing="ij")
    centres = torch.stack((x, y), -1)
    inner = ((torch.arange(samples, dtype=torch.float64) + 0.5) / samples - 0.5) * pixel_mm
    grid = torch.cartesian_prod(inner, inner).reshape(-1, 2)
    image = torch.zeros(size, size, dtype=torch.float64)
    for ellipse in ellipses:
        from_centre = centres - torch.tensor((ellipse.x_mm, ellipse.y_mm), dtype=torch.float64)
        radius = torch.hypot(*ellipse.unit(from_centre))
        margin = pixel_mm / math.sqrt(2) / min(ellipse.a_mm, ellipse.b_mm)
        share = (radius <= 1).double()
        crossed = (radius - 1).abs() <= margin
        for part, chosen in zip(
            from_centre[crossed].split(4096), torch.nonzero(crossed).split(4096), strict=True
        ):
            sampled = torch.hypot(*ellipse.unit(part[:, None] + grid)) <= 1
            share[chosen[:, 0], chosen[:, 1]] = sampled.double().mean(1)
        image += ellipse.value * share
    return image


def disc(radius_mm: float, value: float = 1.0, *, x_mm: float = 0.0, y_mm: float = 0.0) -> list[Ellipse]:
    """Return a disc, whose parallel sinogram is 2·value·√(radius² − (s − s₀)²), s₀ = x cos θ + y sin θ."""
    return [Ellipse(x_mm, y_mm, radius_mm, radius_mm, 0.0, value)]


def shepp_logan(side_mm: float) -> list[Ellipse]:
    """Return the head phantom of Shepp and Logan in a square, with values from 0 to 1.

    Source: Shepp, Logan 1974; contrasts of Toft 1996.
    """
    return _table(torch.tensor(SHEPP_LOGAN, dtype=torch.float64), side_mm)


def perturbed_shepp_logan(
    side_mm: float, generator: torch.Generator, *, spread: float = 0.05
) -> list[Ellipse]:
    """Return a head phantom of which every number was moved at random.

        parameter + spread·N(0, 1),  lengths in halves of the side, angles in radians

    Semi-axes keep their absolute value, at least a thousandth. Values of the image may leave 0 to 1; the
    published family is clipped to it, which its sinograms in closed form are not.

    Raises: InputError for a negative spread.
    Holds: exactly for `shepp_logan` at spread 0; equal generators give equal phantoms.
    Source: Vasconcelos, He, Singh, Teh 2023, arXiv 2202.10847 (code).
    """
    if not 0 <= spread < math.inf:
        raise InputError(f"a spread is 0 or more and finite, got {spread}")
    table = torch.tensor(SHEPP_LOGAN, dtype=torch.float64)
    noise = spread * torch.randn(table.shape, generator=generator, dtype=torch.float64)
    noise[:, 5] = noise[:, 5].rad2deg()
    table = table + noise
    table[:, 1:3] = table[:, 1:3].abs().clamp(min=1e-3)
    return _table(table, side_mm)


def random_ellipses(
    count: int, radius_mm: float, generator: torch.Generator, *, largest: float = 0.4
) -> list[Ellipse]:
    """Return ellipses that lie inside a disc around the centre.

    Semi-axes are uniform from a quarter of the largest to the largest, centres uniform over the disc in which
    the ellipse still fits, angles uniform, and values uniform from 0.1 to 1.

    Args:
        count: how many.
        radius_mm: radius of the disc.
        generator: source of all draws.
        largest: longest semi-axis, as a share of the radius.

    Raises: InputError for a negative count, a radius that is not positive and a share outside (0, 1].
    Holds: exactly; equal generators give equal phantoms.
    """
    if count < 0 or not 0 < radius_mm < math.inf or not 0 < largest <= 1:
        raise InputError(
            f"ellipses take a count from 0, a positive radius and a largest share in (0, 1], got {count}, "
            f"{radius_mm} and {largest}"
        )
    made = []
    for a, b, place, way, angle, value in torch.rand(
        count, 6, generator=generator, dtype=torch.float64
    ).tolist():
        a, b = (radius_mm * largest * (0.25 + 0.75 * share) for share in (a, b))
        far, way = (radius_mm - max(a, b)) * math.sqrt(place), 2 * math.pi * way
        centre = far * math.cos(way), far * math.sin(way)
        made.append(Ellipse(*centre, a, b, math.pi * angle, 0.1 + 0.9 * value))
    return made


def _table(table: Tensor, side_mm: float) -> list[Ellipse]:
    """Turn rows of `SHEPP_LOGAN`'s form, y up, to ellipses, y down."""
    half = side_mm / 2
    return [
        Ellipse(half * x, -half * y, half * a, half * b, -math.radians(angle), value)
        for value, a, b, x, y, angle in table.tolist()
    ]
