"""Geometries: their rays, what they see, and what they refuse."""

import math
from dataclasses import replace

import pytest
import torch

from gramian.errors import InputError
from gramian.imaging.geometry import Beam, FanBeam, ParallelBeam, evenly, padded

FAN = FanBeam(evenly(8, 2 * math.pi), 16, 40, source_mm=60.0, detector_mm=30.0, spacing_mm=1.5, offset_mm=0.4)
BEAMS = {
    "parallel": ParallelBeam(evenly(6), (12, 16), 24, offset_mm=0.3, centre_mm=(0.5, -1.0)),
    "flat": replace(FAN, centre_mm=(0.2, 0.1)),
    "curved": replace(FAN, curved=True),
}


@pytest.mark.parametrize("beam", BEAMS.values(), ids=BEAMS)
def test_points_of_a_ray_are_seen_by_its_detector(beam: Beam) -> None:
    points, directions = beam.rays()
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(points.shape[:2], dtype=torch.float64))
    to_middle = ((torch.tensor(beam.centre_mm) - points) * directions).sum(-1, keepdim=True)
    for view, angle in enumerate(beam.theta.tolist()):
        for step in (-5.0, 0.0, 7.0):
            x, y = (points + (to_middle + step) * directions)[view].unbind(-1)
            seen, fan = beam.footprint(x, y, angle)
            torch.testing.assert_close(seen, beam.offsets)
            expected = torch.stack(((fan - angle).sin(), (fan - angle).cos()), -1)
            torch.testing.assert_close(directions[view], expected)
            assert (beam.footprint(x, y, angle + 0.1)[0] - beam.offsets).abs().max() > 1e-3  # control


def test_conventions() -> None:
    """Pixel (i, j) at x = j − (columns − 1)/2, y down; at θ = 0 rays run down, at 90° to the left."""
    beam = ParallelBeam([0.0, math.pi / 2], (2, 3), 4, pixel_mm=2.0, spacing_mm=0.5, offset_mm=1.0)
    x, y = beam.pixels()
    assert x[0].tolist() == [-2, 0, 2]
    assert y[:, 0].tolist() == [-1, 1]
    assert beam.offsets.tolist() == [0.25, 0.75, 1.25, 1.75]
    points, directions = beam.rays()
    torch.testing.assert_close(directions[:, 0], torch.tensor([[0.0, 1], [-1, 0]], dtype=torch.float64))
    torch.testing.assert_close(points[:, 3], torch.tensor([[1.75, 0], [0, 1.75]], dtype=torch.float64))


def test_a_far_source_is_a_parallel_beam() -> None:
    parallel = ParallelBeam(evenly(5), 16, 24, centre_mm=(0.5, 0.0))
    errors = []
    for source in (1e3, 1e4, 1e5):
        for curved in (False, True):
            fan = FanBeam(
                evenly(5), 16, 24, centre_mm=(0.5, 0.0), source_mm=source, detector_mm=0.0, curved=curved
            )
            (points, directions), (p, d) = parallel.rays(), fan.rays()
            along = ((points - p) * d).sum(-1, keepdim=True)
            errors.append(float((p + along * d - points).norm(dim=-1).max() + (d - directions).abs().max()))
    assert errors[0] / errors[2] == pytest.approx(10, rel=0.1)
    assert errors[2] / errors[4] == pytest.approx(10, rel=0.1)


def test_evenly_and_padded() -> None:
    assert evenly(4) == (0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4)
    assert padded(512) == 726
    assert padded(128) == 182
    with pytest.raises(InputError, match="at least one view"):
        evenly(0)


def test_equal_geometries_are_equal() -> None:
    beams = [
        ParallelBeam(given, 8, 9)
        for given in (evenly(3), list(evenly(3)), ParallelBeam(evenly(3), 8, 9).theta)
    ]
    assert len({hash(beam) for beam in beams}) == 1
    assert beams[0] == beams[1] == beams[2] != ParallelBeam(evenly(4), 8, 9)
    assert beams[0].shape == (8, 8)


def test_coverage() -> None:
    wide = ParallelBeam(evenly(3), 512, padded(512), pixel_mm=0.7, spacing_mm=0.7)
    assert not wide.coverage().truncated
    narrow = ParallelBeam(evenly(3), 100, 100, offset_mm=3.0)
    assert narrow.coverage() == pytest.approx((94.0, 100 * math.sqrt(2)))
    assert narrow.coverage().truncated
    small = torch.zeros(100, 100)
    small[48:52, 48:52] = 1
    assert narrow.coverage(small) == pytest.approx((94.0, 4 * math.sqrt(2)))
    assert not narrow.coverage(small).truncated
    assert narrow.coverage(small * 0).object_mm == 0
    for curved in (False, True):
        fan = replace(FAN, curved=curved, offset_mm=0.0)
        edge = replace(fan, detectors=1, offset_mm=30.0).rays()  # a ray through the outer edge
        points, directions = (part[0, 0] for part in edge)
        distance = points[0] * directions[1] - points[1] * directions[0]
        assert fan.coverage().seen_mm == pytest.approx(2 * abs(float(distance)))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="look like degrees, one is 179: radians"):
        ParallelBeam(range(0, 180), 8, 9)
    with pytest.raises(InputError, match="at least one angle"):
        ParallelBeam([], 8, 9)
    with pytest.raises(InputError, match="finite numbers in radians"):
        ParallelBeam([0.0, math.nan], 8, 9)
    ParallelBeam([2 * math.pi], 8, 9)
    for size, detectors, name in (
        (0, 9, "rows"),
        ((8, -1), 9, "columns"),
        (8, 0, "detectors"),
        (8, 9.5, "detectors"),
    ):
        with pytest.raises(InputError, match=f"number of {name} has to be a whole number"):
            ParallelBeam(evenly(3), size, detectors)  # type: ignore[arg-type]
    assert ParallelBeam(evenly(3), torch.tensor(8), torch.tensor(9)) == ParallelBeam(evenly(3), (8, 8), 9)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a size has one side or two"):
        ParallelBeam(evenly(3), (8, 8, 8), 9)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="angles have to be numbers"):
        ParallelBeam(["a"], 8, 9)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"image of this scan is \(8, 8\), got \(8, 9\)"):
        ParallelBeam(evenly(3), 8, 9).coverage(torch.ones(8, 9))
    for name in ("pixel_mm", "spacing_mm"):
        for value in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(InputError, match=f"{name} has to be positive"):
                ParallelBeam(evenly(3), 8, 9, **{name: value})
    with pytest.raises(InputError, match="have to be finite, in mm"):
        ParallelBeam(evenly(3), 8, 9, offset_mm=math.inf)
    with pytest.raises(InputError, match=r"source has to be outside the image, more than 11\.3137 mm"):
        replace(FAN, source_mm=11.0)
    with pytest.raises(InputError, match="detector_mm has to be 0 or more"):
        replace(FAN, detector_mm=-1.0)
    with pytest.raises(InputError, match="curved detector may reach 90°"):
        replace(FAN, curved=True, detectors=400)
