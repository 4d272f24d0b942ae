"""Phantoms: their images, and sinograms in closed form against known formulas and numerical integrals."""

import math

import pytest
import torch

from gramian.errors import InputError
from gramian.imaging.geometry import FanBeam, ParallelBeam, evenly
from gramian.imaging.phantoms import (
    Ellipse,
    disc,
    perturbed_shepp_logan,
    random_ellipses,
    raster,
    shepp_logan,
    sinogram,
)

FAN = FanBeam(evenly(7, 2 * math.pi), 32, 40, source_mm=90.0, detector_mm=30.0, spacing_mm=1.5)
BEAMS = {"parallel": ParallelBeam(evenly(7), 32, 46), "fan": FAN}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_disc_formula() -> None:
    beam = ParallelBeam(evenly(7), 32, 46)
    found = sinogram(disc(9.0, 0.5, x_mm=3.0, y_mm=-2.0), beam)
    from_centre = beam.offsets - (3.0 * beam.theta.cos() - 2.0 * beam.theta.sin())[:, None]
    expected = 2 * 0.5 * (81 - from_centre.square()).clamp(min=0).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (sinogram(disc(9.0, 0.5, x_mm=3.0, y_mm=2.0), beam) - expected).abs().max() > 0.1  # control: y up


@pytest.mark.parametrize("beam", BEAMS.values(), ids=BEAMS)
def test_chords_are_integrals(beam: ParallelBeam | FanBeam) -> None:
    """Against the share of fine steps along each ray that lie in the ellipse."""
    ellipse = Ellipse(4.0, -3.0, 8.0, 3.0, 0.7, 2.0)
    points, directions = beam.rays()
    middle = points - (points * directions).sum(-1, keepdim=True) * directions
    steps = (torch.arange(4000, dtype=torch.float64) - 1999.5) * 0.01
    x, y = (middle[..., None, :] + steps[:, None] * directions[..., None, :]).unbind(-1)
    cos, sin = math.cos(0.7), math.sin(0.7)
    u, v = (x - 4) * cos + (y + 3) * sin, (y + 3) * cos - (x - 4) * sin
    counted = 2.0 * 0.01 * ((u / 8) ** 2 + (v / 3) ** 2 <= 1).double().sum(-1)
    torch.testing.assert_close(sinogram([ellipse], beam), counted, rtol=0, atol=0.041)
    turned = Ellipse(4.0, -3.0, 8.0, 3.0, -0.7, 2.0)  # control: turned the other way
    assert (sinogram([turned], beam) - counted).abs().max() > 1


def test_chords_do_not_cancel_far_away() -> None:
    far = FanBeam([0.3], 2, 9, source_mm=1e8, detector_mm=0.0, spacing_mm=0.05)
    near = ParallelBeam([0.3], 2, 9, spacing_mm=0.05)
    ellipse = [Ellipse(0.0, 0.0, 1.0, 0.2, 0.3)]
    torch.testing.assert_close(sinogram(ellipse, far), sinogram(ellipse, near), rtol=1e-6, atol=1e-6)


def test_raster_converges_to_the_area() -> None:
    ellipse = Ellipse(1.3, -2.1, 9.0, 4.0, 0.5, 3.0)
    errors = []
    for samples in (1, 4, 16, 64):
        image = raster([ellipse], 32, samples=samples)
        errors.append(abs(float(image.sum()) - 3 * math.pi * 36))
    assert errors[3] < 0.05
    assert errors[0] > 5 * errors[3]  # control
    assert image.max() == 3
    assert image.min() == 0


def test_raster_samples_every_pixel_alike() -> None:
    """Against a plain evaluation of all samples of all pixels."""
    ellipses = random_ellipses(5, 7.0, seeded())
    fine = torch.arange(16 * 8, dtype=torch.float64) - 63.5
    y, x = torch.meshgrid(fine / 8, fine / 8, indexing="ij")
    total = torch.zeros_like(x)
    for e in ellipses:
        cos, sin = math.cos(e.angle), math.sin(e.angle)
        u, v = (x - e.x_mm) * cos + (y - e.y_mm) * sin, (y - e.y_mm) * cos - (x - e.x_mm) * sin
        total += e.value * ((u / e.a_mm) ** 2 + (v / e.b_mm) ** 2 <= 1)
    expected = total.unflatten(0, (16, 8)).unflatten(2, (16, 8)).mean((1, 3))
    torch.testing.assert_close(raster(ellipses, 16, samples=8), expected)
    scaled = [Ellipse(2 * e.x_mm, 2 * e.y_mm, 2 * e.a_mm, 2 * e.b_mm, e.angle, e.value) for e in ellipses]
    torch.testing.assert_close(raster(scaled, 16, 2.0, samples=8), expected)


def test_shepp_logan() -> None:
    image = raster(shepp_logan(64.0), 64)
    assert image.min() == pytest.approx(0, abs=1e-12)
    assert image.max() == pytest.approx(1)
    assert image[32, 32] == pytest.approx(0.2)
    assert image[10, 32] == pytest.approx(0.2)
    assert image[21, 32] == pytest.approx(0.3)  # the large ellipse above the middle: y is down
    assert image[43, 32] == pytest.approx(0.2)
    left, right = image[:, :32].flip(1), image[:, 32:]
    assert (left - right).abs().max() > 0.1  # the two dark ellipses differ


def test_perturbed_shepp_logan() -> None:
    assert perturbed_shepp_logan(64.0, seeded(), spread=0.0) == shepp_logan(64.0)
    generator = seeded()
    first, second = (perturbed_shepp_logan(64.0, generator) for _ in range(2))
    assert first == perturbed_shepp_logan(64.0, seeded())
    assert first != second
    moved = torch.tensor(
        [a.value - b.value for a, b in zip(first + second, 2 * shepp_logan(64.0), strict=True)]
    )
    assert 0.02 < moved.std() < 0.09
    with pytest.raises(InputError, match="spread is 0 or more"):
        perturbed_shepp_logan(64.0, seeded(), spread=-1)


def test_random_ellipses() -> None:
    ellipses = random_ellipses(200, 10.0, seeded())
    assert ellipses == random_ellipses(200, 10.0, seeded())
    assert ellipses != random_ellipses(200, 10.0, seeded(1))
    assert max(math.hypot(e.x_mm, e.y_mm) + max(e.a_mm, e.b_mm) for e in ellipses) <= 10
    assert random_ellipses(0, 10.0, seeded()) == []
    for count, radius, largest in ((-1, 1.0, 0.4), (1, 0.0, 0.4), (1, 1.0, 1.5)):
        with pytest.raises(InputError, match="ellipses take a count from 0"):
            random_ellipses(count, radius, seeded(), largest=largest)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="semi-axes have to be positive, got 0 and 1 mm"):
        Ellipse(0, 0, 0, 1)
    with pytest.raises(InputError, match="finite numbers"):
        Ellipse(math.nan, 0, 1, 1)
    with pytest.raises(InputError, match="at least one pixel and one sample"):
        raster([], 0)
