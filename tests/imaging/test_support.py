"""The pixels in which there may be something: nothing of an object lost, little beside its hull kept."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging import support as outline
from gramian.imaging.geometry import Beam, FanBeam, ParallelBeam, evenly, padded
from gramian.imaging.phantoms import Ellipse, disc, random_ellipses, raster, sinogram
from gramian.imaging.support import support

SIDE = 48
TURN = 2 * math.pi
MOVED = {"centre_mm": (2.0, -1.0), "offset_mm": 1.5}


def parallel(views: int, **more: object) -> ParallelBeam:
    return ParallelBeam(evenly(views), SIDE, padded(SIDE) + 6, **more)  # type: ignore[arg-type]


def fan(views: int, **more: object) -> FanBeam:
    more = {"source_mm": 96.0, "detector_mm": 48.0, "spacing_mm": 1.0, **more}
    return FanBeam(evenly(views, TURN), SIDE, 120, **more)  # type: ignore[arg-type]


BEAMS = {
    "parallel": parallel,
    "parallel, moved": lambda views: parallel(views, **MOVED),
    "fan": fan,
    "curved fan, moved": lambda views: fan(views, curved=True, **MOVED),
}
OBJECTS = {
    "disc": disc(12.0, x_mm=4.0, y_mm=-3.0),
    **{f"ellipses {s}": random_ellipses(6, 19.0, torch.Generator().manual_seed(s)) for s in range(3)},
}


def measured(parts: list[Ellipse], beam: Beam, decibels: float = 40.0, seed: int = 0) -> tuple[Tensor, float]:
    exact = sinogram(parts, beam)
    std = 10 ** (-decibels / 20) * float(exact.square().mean().sqrt())
    draws = torch.Generator().manual_seed(seed)
    return exact + std * torch.randn(exact.shape, generator=draws, dtype=exact.dtype), std


def hull(parts: list[Ellipse], beam: Beam, margin: float) -> Tensor:
    """Pixels in the convex hull of ellipses and so many mm around it, by its support function."""
    x, y = beam.pixels()
    found = torch.ones(beam.shape, dtype=torch.bool)
    for angle in evenly(180, TURN):
        reach = max(
            p.x_mm * math.cos(angle)
            + p.y_mm * math.sin(angle)
            + math.hypot(p.a_mm * math.cos(angle - p.angle), p.b_mm * math.sin(angle - p.angle))
            for p in parts
        )
        found &= x * math.cos(angle) + y * math.sin(angle) <= reach + margin
    return found


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("beam", BEAMS)
def test_nothing_of_an_object_is_lost_and_little_beside_its_hull_is_kept(beam: str, name: str) -> None:
    for views in (12, 60):
        geometry, parts = BEAMS[beam](views), OBJECTS[name]
        for seed in range(3):
            kept = support(geometry, *measured(parts, geometry, seed=seed))
            assert (raster(parts, SIDE)[~kept] == 0).all()
            if views == 60:
                assert not (kept & ~hull(parts, geometry, 5.0)).any()
                assert 0.1 < float(kept.double().mean()) < 0.5


def test_a_convex_object_keeps_all_of_its_inside() -> None:
    parts = [Ellipse(2.0, 1.0, 15.0, 7.0, 0.6)]
    kept = support(parallel(60), *measured(parts, parallel(60)))
    inner = hull(parts, parallel(60), 0.0)
    assert not (inner & ~kept).any()
    assert not (kept & ~hull(parts, parallel(60), 4.0)).any()
    mirrored = support(parallel(60), measured(parts, parallel(60))[0].flip(1), 1e-3)  # control
    assert (inner & ~mirrored).any()


def test_between_two_discs_there_is_nothing() -> None:
    two = disc(5.0, x_mm=-13.0) + disc(5.0, x_mm=13.0)
    geometry = parallel(60)
    kept = support(geometry, *measured(two, geometry))
    assert (raster(two, SIDE)[~kept] == 0).all()
    assert not kept[SIDE // 2, SIDE // 2 - 2 : SIDE // 2 + 2].any()
    assert hull(two, geometry, 0.0)[SIDE // 2, SIDE // 2]


def test_what_no_detector_sees_is_kept() -> None:
    narrow = ParallelBeam(evenly(30), SIDE, 30)
    large = disc(22.0)
    assert support(narrow, *measured(large, narrow)).all()
    small = disc(8.0)
    kept = support(narrow, *measured(small, narrow))
    assert kept[0, 0]  # the corner is in no view
    assert not kept[SIDE // 2, SIDE // 2 - 13]
    assert (raster(small, SIDE)[~kept] == 0).all()


def test_the_neighbours_of_what_is_not_outside_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, parts = parallel(60), OBJECTS["disc"]
    kept = support(geometry, *measured(parts, geometry))
    monkeypatch.setattr(outline, "_grown", lambda mask: mask)
    bare = support(geometry, *measured(parts, geometry))
    wanted = bare.clone()
    for i, j in bare.nonzero().tolist():
        wanted[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
    assert torch.equal(kept, wanted)
    assert not torch.equal(kept, bare)


def test_without_an_object_nothing_is_kept() -> None:
    geometry = parallel(20)
    blank = torch.zeros(20, geometry.detectors)
    assert not support(geometry, blank, 0.1).any()
    for seed in range(3):
        noise = torch.randn(blank.shape, generator=torch.Generator().manual_seed(seed))
        assert not support(geometry, noise, 1.0).any()
        assert support(geometry, noise.abs(), 1e-3).all()  # control: above that noise it is a signal


@pytest.mark.parametrize("name", BEAMS)
def test_it_grows_with_the_views_that_have_to_agree_and_shrinks_with_the_noise_that_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry, parts = BEAMS[name](16), OBJECTS["ellipses 0"]
    y, std = measured(parts, geometry)
    found = []
    for views in (1, 2, 4, 8, 17):
        monkeypatch.setattr(outline, "VIEWS", views)
        found.append(support(geometry, y, std))
    for less, more in pairwise(found):
        assert (more | ~less).all()
        assert int(more.sum()) > int(less.sum())
    assert found[-1].all()
    monkeypatch.undo()
    told = [support(geometry, y, scale * std) for scale in (0.5, 1.0, 4.0)]
    assert all((more | ~less).all() for more, less in pairwise(told))


def test_noise_may_be_told_ray_by_ray_and_the_type_is_kept_out() -> None:
    geometry, parts = parallel(20), OBJECTS["disc"]
    y, std = measured(parts, geometry)
    wanted = support(geometry, y, std)
    assert torch.equal(support(geometry, y, torch.full_like(y, std)), wanted)
    assert torch.equal(support(geometry, y.float(), torch.tensor(std)), wanted)
    loud = torch.full_like(y, std).index_fill(0, torch.arange(4), 1e3)  # four views that cannot tell
    assert int(support(geometry, y, loud).sum()) < int(wanted.sum())


def test_bad_input() -> None:
    for shape in ((20, 5), (19, 74), (74, 20)):
        with pytest.raises(InputError, match=rf"sinograms of 20 × 74, got \({shape[0]}, {shape[1]}\)"):
            support(ParallelBeam(evenly(20), SIDE, 74), torch.zeros(shape), 0.1)
