"""A scan's views: which are kept and which unseen, their units, and the same rays through larger pixels."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.phantoms import raster, shepp_logan
from gramian.imaging.unseen_views import hold_out
from gramian.tasks.observed_views import observe
from tasks.small_scans import phantom_scan, seen


def test_kept_and_unseen_views_share_out_the_scan() -> None:
    scan, found = phantom_scan(), observe(phantom_scan(), held_out=0.2, seed=3)
    assert (found.kept_views, found.unseen_views) == hold_out(20, 0.2, 3)
    assert found.unseen is not None
    for rays, views in ((found.kept, found.kept_views), (found.unseen, found.unseen_views)):
        assert torch.equal(rays.sinogram, scan.sinogram[list(views)])
        assert rays.projector.geometry.angles == tuple(scan.geometry.angles[view] for view in views)
        assert rays.std.shape == rays.sinogram.shape
    assert torch.equal(found.all.sinogram, scan.sinogram)
    assert (found.size, found.device) == (16, torch.device("cpu"))


def test_images_are_in_units_of_the_peak_and_the_truth_has_a_misfit_of_one() -> None:
    for peak in (1.0, 0.02):
        scan = phantom_scan(peak=peak)
        found = observe(scan, held_out=0.2)
        truth = scan.truth / peak
        assert found.unseen is not None
        for rays in (found.all, found.kept, found.unseen):
            error = 4 * math.sqrt(2 / rays.sinogram.numel())
            assert abs(float(rays.misfit(truth)) - 1) < error
            assert float(rays.misfit(1.1 * truth)) > 2  # control
            assert abs(float(rays.pixel_misfit(truth)) - 1) < 2 * error  # high frequencies weigh more
            assert float(rays.pixel_misfit(1.3 * truth)) > 2
        energy = found.kept.energy(3.0)
        wanted = 0.5 * found.kept.misfit(truth) * found.kept.sinogram.numel() + 3 * energy.roughness(truth)
        assert float(energy(truth)) == pytest.approx(float(wanted), rel=1e-5)
    batch = torch.stack((truth, 0 * truth))
    torch.testing.assert_close(found.all.misfit(batch)[0], found.all.misfit(truth))


def test_noise_of_every_ray_stays_with_its_view() -> None:
    std = torch.linspace(0.1, 2.0, phantom_scan().sinogram.numel()).view_as(phantom_scan().sinogram)
    found = observe(replace(phantom_scan(), noise_std=std), held_out=0.2)
    assert found.unseen is not None
    assert torch.equal(found.unseen.std, std[list(found.unseen_views)])
    assert torch.equal(found.kept.std, std[list(found.kept_views)])


def test_views_are_left_out_in_turn() -> None:
    found = seen(share=0.2)
    sets = found.left_out()
    assert sets.shape == (5, 20)
    assert sets[0].nonzero().flatten().tolist() == list(found.unseen_views)
    assert (sets.sum(0) == 1).all()


def test_without_unseen_views_all_are_kept() -> None:
    for found in (observe(phantom_scan()), seen().whole):
        assert found.kept is found.all
        assert found.unseen is None
        assert (found.kept_views, found.unseen_views) == (tuple(range(20)), ())
    part = seen()
    assert part.whole.inside is part.inside
    assert part.whole.scan is part.scan
    assert part.unseen is not None  # control: the given one stays as it was


def test_the_outline_is_told_by_kept_views_alone() -> None:
    scan = phantom_scan(views=30)
    one = observe(scan, held_out=0.2)
    unseen = list(one.unseen_views)
    louder, quieter = (scan.sinogram.clone() for _ in range(2))
    louder[unseen], quieter[unseen] = 100.0, 0.0
    assert one.inside is not None
    assert 0.3 < float(one.inside.float().mean()) < 1
    for sinogram in (louder, quieter):
        other = observe(replace(scan, sinogram=sinogram), held_out=0.2)
        assert torch.equal(other.inside, one.inside)
    kept = scan.sinogram.clone()
    kept[list(one.kept_views)] = 100.0  # control
    assert observe(replace(scan, sinogram=kept), held_out=0.2).inside.all()
    assert (scan.truth[~one.inside] == 0).all()
    assert observe(scan, outline=False).inside is None
    assert observe(replace(scan, sinogram=0 * scan.sinogram)).inside is None  # rather than no pixel at all


@pytest.mark.parametrize("peak", [1.0, 0.02])
@pytest.mark.parametrize("block", [2, 4])
def test_larger_pixels_are_seen_as_the_blocks_that_they_are(block: int, peak: float) -> None:
    found = seen(side=32, peak=peak)
    rays = found.coarse(block)
    coarse = raster(shepp_logan(32.0), 32 // block, float(block)).float()
    fine = coarse.repeat_interleave(block, 0).repeat_interleave(block, 1)
    wanted, got = found.kept.projector.A(fine), rays.projector.A(coarse)

    def apart(one: Tensor) -> float:
        return float((one - wanted).norm() / wanted.norm())

    assert apart(got) < 0.08
    assert apart(rays.projector.A(coarse.T)) > 0.1  # control
    torch.testing.assert_close(got.sum(1), wanted.sum(1), rtol=0.02, atol=0)
    assert torch.equal(rays.sinogram, found.kept.sinogram)
    assert torch.equal(rays.std, found.kept.std)
    assert rays.projector.geometry.angles == found.kept.projector.geometry.angles


def test_pixels_of_their_own_size_are_the_same_rays() -> None:
    assert seen().coarse(1) is seen().kept
    whole = seen().whole.coarse(2)
    assert whole.sinogram.shape == seen().all.sinogram.shape


def test_bad_input() -> None:
    for share, words in (
        (-0.1, "from 0 to below 1, not -0.1"),
        (1.0, "from 0 to below 1, not 1"),
        (math.nan, "not nan"),
        (0.6, "between 0 and 0.5, not 0.6"),
    ):
        with pytest.raises(InputError, match=words):
            observe(phantom_scan(), held_out=share)
    with pytest.raises(InputError, match="at least 5 views, not 4"):
        observe(phantom_scan(views=4), held_out=0.1)
