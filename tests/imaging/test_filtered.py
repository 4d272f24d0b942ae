"""Filtered back-projection of a disc's own line integrals approaches the disc, for every beam and window."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.filtered import WINDOWS, fbp
from gramian.imaging.geometry import Beam, FanBeam, ParallelBeam, evenly

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(geometry: Beam, centre: tuple[float, float], radius: float) -> tuple[Tensor, Tensor]:
    """A disc of value 1 as an image, and its line integrals 2 √(a² − h²) at distances h from the rays."""
    points, directions = geometry.rays()
    apart = torch.tensor(centre, dtype=F64) - points
    h = apart[..., 0] * directions[..., 1] - apart[..., 1] * directions[..., 0]
    sinogram = 2 * (radius**2 - h.square()).clamp(min=0).sqrt()
    fine = (torch.arange(5, dtype=F64) - 2) / 5 * geometry.pixel_mm
    x, y = geometry.pixels()
    x, y = x[..., None, None] + fine, y[..., None, None] + fine[:, None]
    inside = (x - centre[0]).square() + (y - centre[1]).square() <= radius**2
    return inside.to(F64).mean((-2, -1)), sinogram


def parallel(size: int, views: int) -> ParallelBeam:
    """A square of 20 mm; detectors half as wide as pixels."""
    pixel = 20 / size
    return ParallelBeam(evenly(views), size, 3 * size, pixel_mm=pixel, spacing_mm=pixel / 2, offset_mm=0.1)


def fan(size: int, views: int, curved: bool) -> FanBeam:
    pixel = 20 / size
    angles = evenly(views, 2 * math.pi)
    distances = {"source_mm": 60.0, "detector_mm": 30.0, "curved": curved}
    return FanBeam(angles, size, 3 * size, pixel_mm=pixel, spacing_mm=0.8 * pixel, **distances)


BEAMS: dict[str, Callable[[int, int], Beam]] = {
    "parallel": parallel,
    "flat fan": lambda size, views: fan(size, 2 * views, False),
    "curved fan": lambda size, views: fan(size, 2 * views, True),
    "off centre": lambda size, views: replace(parallel(size, views), centre_mm=(0.7, -0.4)),
    "scan of a full turn": lambda size, views: replace(
        parallel(size, views), angles=evenly(2 * views, 2 * math.pi)
    ),
}


def error(image: Tensor, truth: Tensor) -> float:
    return float((image - truth).norm() / truth.norm())


@pytest.mark.parametrize("beam", BEAMS)
def test_fbp_of_a_disc_approaches_the_disc(beam: str) -> None:
    errors, means = [], []
    for size, views in ((24, 60), (48, 120), (96, 240)):
        geometry = BEAMS[beam](size, views)
        truth, sinogram = disc(geometry, (2.5, -1.5), 5.0)
        image = fbp(geometry, sinogram)
        errors.append(error(image, truth))
        means.append(float(image[truth == 1].mean()))
    assert errors[0] > 1.2 * errors[2]
    assert errors[2] < 0.05, errors
    assert means[2] == pytest.approx(1, abs=0.005)  # the ramp's value at frequency 0
    wrong = replace(geometry, angles=[-a for a in geometry.angles])  # control: the angles' sign
    assert error(fbp(wrong, sinogram), truth) > 5 * errors[2]


def test_windows_fall_and_smooth() -> None:
    """Shepp–Logan, cosine, Hamming and Hann damp in this order; the mean of an image stays."""
    assert all(float(window(torch.zeros(1, dtype=F64))) == pytest.approx(1) for window in WINDOWS.values())
    geometry = parallel(48, 60)
    truth, sinogram = disc(geometry, (0.0, 1.0), 6.0)
    noise = 0.5 * torch.randn(sinogram.shape, generator=generator(), dtype=F64)
    order = ("ramp", "shepp-logan", "cosine", "hamming", "hann")
    powers = [float(fbp(geometry, noise, name).square().mean()) for name in order]
    assert sorted(powers[:3], reverse=True) == powers[:3]
    assert powers[2] > powers[4]
    half = float(fbp(geometry, noise, "hann", cutoff=0.5).square().mean())
    assert half < 0.5 * powers[4]
    for name in order:
        assert float(fbp(geometry, sinogram, name)[truth == 1].mean()) == pytest.approx(1, abs=0.02)


def test_fbp_is_linear_batched_and_boxed() -> None:
    geometry = parallel(16, 30)
    y = torch.randn(2, 3, 30, 48, generator=generator(), dtype=F64)
    images = fbp(geometry, y)
    torch.testing.assert_close(images[1, 2], fbp(geometry, y[1, 2]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fbp(geometry, 2 * y[0, 0] + y[0, 1]), 2 * images[0, 0] + images[0, 1])
    assert float(fbp(geometry, y, box=(0.0, 0.1)).amin()) == 0
    assert float(images.amin()) < 0  # control
    assert fbp(geometry, y.float()).dtype == torch.float32
    scaled = type("Scaled", (), {"geometry": geometry, "scale": 0.25})()
    torch.testing.assert_close(fbp(scaled, 0.25 * y), images)


def test_uneven_angles_have_uneven_shares() -> None:
    """Views that crowd on one side count less each; views measured twice count half."""
    even, size = evenly(120), 48
    crowded = [a for v, a in enumerate(even) if v < 60 or v % 2 == 0] + [even[10]]
    geometry = ParallelBeam(crowded, size, 72)
    truth, sinogram = disc(geometry, (4.0, -6.0), 12.0)
    image = fbp(geometry, sinogram)
    assert float(image[truth == 1].mean()) == pytest.approx(1, abs=0.01)
    full = ParallelBeam(even, size, 72)
    assert error(image, truth) < 1.2 * error(fbp(full, disc(full, (4.0, -6.0), 12.0)[1]), truth)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda g, y: fbp(object(), y), "needs a projector with"),
        (lambda g, y: fbp(g, y, "box"), "there is no filter"),
        (lambda g, y: fbp(g, y, cutoff=0.0), "cutoff"),
        (lambda g, y: fbp(g, y[:, 1:]), "of this geometry"),
        (lambda g, y: fbp(g, y * math.nan), "NaN"),
        (lambda g, y: fbp(g, y.long()), "floating-point"),
        (lambda g, y: fbp(g, y, box=(1.0, 0.0)), "above the greatest"),
        (lambda g, y: fbp(fan(8, 20, True), torch.ones(19, 24)), "of this geometry"),
        (lambda g, y: fbp(replace(fan(8, 20, True), angles=evenly(20)), torch.ones(20, 24)), "full turn"),
    ],
)
def test_bad_input_of_fbp(make: Callable[..., object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(parallel(8, 10), torch.ones(10, 24))
