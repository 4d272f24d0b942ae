"""Filtered back-projection: the analytic inverse of a projection, for parallel and fan beams."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.geometry import Beam, FanBeam, ParallelBeam
from gramian.imaging.iterative import FREE, Box, checked, clamped

WEDGE = 3.0
"""A gap between angles beyond so many times the median is a missing wedge, nobody's share."""

WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "ramp": torch.ones_like,
    "shepp-logan": lambda w: torch.sinc(w / 2),
    "cosine": lambda w: torch.cos(math.pi / 2 * w),
    "hamming": lambda w: 0.54 + 0.46 * torch.cos(math.pi * w),
    "hann": lambda w: 0.5 + 0.5 * torch.cos(math.pi * w),
}
"""Windows on the ramp by name, of the frequency in units of the highest (w from 0 to 1)."""


def fbp(
    projector: Any,
    sinogram: Float[Tensor, "*batch views detectors"],
    filter: str = "ramp",
    *,
    cutoff: float = 1.0,
    box: Box = FREE,
) -> Float[Tensor, "*batch rows columns"]:
    """Reconstruct by filtered back-projection.

        parallel  f(x) = Σ_v Δθ_v (p_v ∗ h)(s_v(x))
        fan, flat  f(x) = ½ Σ_v Δθ_v (R/d_v(x))² ((p_v cos γ) ∗ h)(s_v(x))
        fan, curved  f(x) = ½ Σ_v Δθ_v r_v(x)⁻² ((p_v R cos γ) ∗ (γ/sin γ)² h)(γ_v(x))

    R is the source's distance from the centre, r_v that from x, and d_v the part of it along the central ray.

    h is the ramp of a band-limited signal, made in space so that its mean is right, times a window; the
    windows are those of `WINDOWS`, and `cutoff` is the share of the frequencies that they are stretched to.
    Values between detectors are interpolated linearly. Δθ_v is half the distance of the two neighbours; views
    of a parallel beam that are a half turn apart share it.

    Shapes: (*batch, views, detectors) -> (*batch, rows, columns).
    Raises: InputError for a projector without a geometry, an unknown filter, a cutoff outside (0, 1], a fan
        beam that is no even full turn, and a sinogram that is not finite or not of the geometry.
    Holds: as views and detectors → ∞, for objects that every view sees whole.
    Source: Kak, Slaney 1988, doi 10.1137/1.9780898719277, chapter 3.
    """
    geometry = getattr(projector, "geometry", projector)
    if not isinstance(geometry, ParallelBeam | FanBeam):
        raise InputError("filtered back-projection needs a projector with a ParallelBeam or FanBeam geometry")
    checked(sinogram, 0, box)
    measured = len(geometry.theta), geometry.detectors
    if sinogram.shape[-2:] != measured:
        raise InputError(
            f"a sinogram of this geometry is (…, {measured[0]}, {measured[1]}), not {tuple(sinogram.shape)}"
        )
    shares = _shares(geometry).to(sinogram)
    data = sinogram.flatten(0, -3) if sinogram.ndim > 2 else sinogram[None]
    data = data / getattr(projector, "scale", 1.0)
    weighted = shares[:, None] * _filtered(geometry, data, filter, cutoff)
    image = _back_projected(geometry, weighted)
    return clamped(image.reshape(*sinogram.shape[:-2], *image.shape[-2:]), box)


def _filtered(geometry: Beam, data: Tensor, filter: str, cutoff: float) -> Tensor:
    """Return the filtered views of every sinogram, (batch, views, detectors)."""
    if filter not in WINDOWS:
        raise InputError(f"there is no filter {filter!r}; there are {', '.join(WINDOWS)}")
    if not 0 < cutoff <= 1:
        raise InputError(
            f"the cutoff has to lie above 0 and at most at 1, the highest frequency, not {cutoff}"
        )
    spacing, place = geometry.spacing_mm, torch.zeros((), dtype=torch.float64)
    length = 2 ** math.ceil(math.log2(2 * geometry.detectors))
    lag = torch.fft.fftfreq(length, 1 / length, dtype=torch.float64)
    if isinstance(geometry, FanBeam):
        along = geometry.offsets / geometry.length_mm
        fan = along if geometry.curved else torch.atan(along)
        data = data * (fan.cos() * (geometry.source_mm if geometry.curved else 1)).to(data)
        spacing /= geometry.length_mm if geometry.curved else geometry.length_mm / geometry.source_mm
        width = (geometry.detectors - 1) * spacing
        place = (lag * spacing).clamp(-width, width) if geometry.curved else place
    ramp = torch.where(lag % 2 == 1, -1 / (math.pi * lag * spacing).square(), 0.0)
    ramp[0] = 1 / (4 * spacing**2)
    ramp = ramp * torch.sinc(place / math.pi) ** -2
    frequency = torch.fft.rfftfreq(length, 0.5, dtype=torch.float64) / cutoff
    window = torch.where(frequency <= 1 + 1e-12, WINDOWS[filter](frequency), 0.0)
    response = (torch.fft.rfft(ramp).real * window * spacing).to(data)
    return torch.fft.irfft(torch.fft.rfft(data, length) * response, length)[..., : geometry.detectors]


def _back_projected(geometry: Beam, filtered: Tensor) -> Tensor:
    """Sum over views what is found where a pixel is seen, (batch, rows, columns)."""
    x, y = (at.to(filtered) for at in geometry.pixels())
    centre = (geometry.detectors - 1) / 2 - geometry.offset_mm / geometry.spacing_mm
    image = filtered.new_zeros(len(filtered), x.numel())
    for view, angle in enumerate(geometry.theta.tolist()):
        place = (geometry.footprint(x, y, angle)[0] / geometry.spacing_mm + centre).flatten()
        low = place.floor()
        share, seen = place - low, (place >= 0) & (place <= geometry.detectors - 1)
        low = low.long().clamp(0, geometry.detectors - 1)
        high = (low + 1).clamp(max=geometry.detectors - 1)
        near = _nearness(geometry, x, y, angle).flatten() * seen
        row = filtered[:, view]
        image += torch.lerp(row[:, low], row[:, high], share) * near
    return image.view(len(filtered), *x.shape)


def _nearness(geometry: Beam, x: Tensor, y: Tensor, angle: float) -> Tensor:
    """Return how much a view counts in a pixel: more where it is nearer to the source of a fan."""
    if not isinstance(geometry, FanBeam):
        return torch.ones_like(x)
    x, y = x - geometry.centre_mm[0], y - geometry.centre_mm[1]
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = geometry.source_mm + y * cos - x * sin, x * cos + y * sin
    if geometry.curved:
        return 1 / (along.square() + across.square())
    return (geometry.source_mm / along).square()


def _shares(geometry: Beam) -> Tensor:
    """Return the arc that each view stands for, half of it in a fan, which sees every ray twice."""
    arc = 2 * math.pi if isinstance(geometry, FanBeam) else math.pi
    angles, order = (geometry.theta % arc).sort()
    if len(angles) == 1:
        return torch.full((1,), arc, dtype=torch.float64)
    gaps = torch.cat((angles.diff(), angles[:1] + arc - angles[-1:]))
    if isinstance(geometry, FanBeam):
        if (gaps - arc / len(gaps)).abs().max() > 1e-3 * arc / len(gaps):
            raise InputError(
                "filtered back-projection of a fan beam needs angles that divide a full turn evenly; "
                "an iterative method takes any"
            )
        return torch.full_like(angles, arc / len(gaps) / 2)
    gaps = torch.where(gaps > WEDGE * gaps[gaps > 1e-9].median(), gaps[gaps > 1e-9].median(), gaps)
    shares = torch.empty_like(angles)
    shares[order] = (gaps + gaps.roll(1)) / 2
    return shares
