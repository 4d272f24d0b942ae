"""Settings of classical methods chosen by unseen views: against a search through all of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.classical import METHODS
from gramian.imaging.quality import psnr
from gramian.tasks import classical_choice
from gramian.tasks.classical_choice import (
    FIXED,
    MOST,
    PATIENCE,
    SHARE,
    VARIATIONS,
    VARIED,
    LeftOut,
    leave_out,
    reconstruct,
    vertex,
)
from gramian.tasks.observed_views import Observed
from tasks.small_scans import phantom_scan, seen

ITERATED = tuple(MOST)
SEEK, FINAL, CONVERGED = 20, 30, 80


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classical_choice, "SEEK", SEEK)
    monkeypatch.setattr(classical_choice, "FINAL", FINAL)


def kept_by(name: str, observed: Observed, **chosen: Any) -> Tensor:
    """The method's image of the kept views."""
    rays = observed.kept
    return METHODS[name](rays.projector, rays.sinogram, **FIXED.get(name, {}), **chosen)


def searched(name: str, observed: Observed, unseen: bool) -> int:
    """The best number of iterations among all, each run by itself."""
    judge = observed.unseen if unseen else observed.kept
    assert judge is not None
    found = [
        float((judge.pixel_misfit if unseen else judge.misfit)(kept_by(name, observed, iterations=k)))
        for k in range(1, classical_choice.MOST[name] + 1)
    ]
    scores = found if unseen else [abs(value - 1) for value in found]
    return 1 + min(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize("name", ITERATED)
def test_iterations_are_those_that_predict_unseen_views_best(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classical_choice, "MOST", {name: min(MOST[name], 40)})
    observed = seen(share=0.1)
    found = reconstruct(name, observed)
    assert found.settings == {"iterations": searched(name, observed, unseen=True)}
    rays = observed.all  # the image itself is of all views
    wanted = METHODS[name](rays.projector, rays.sinogram, **FIXED.get(name, {}), **found.settings)
    assert torch.equal(found.image, wanted)
    assert not torch.equal(found.image, kept_by(name, observed, **found.settings))
    assert (found.name, found.seconds > 0) == (name, True)


@pytest.mark.parametrize("name", ["sirt", "cgls"])
def test_without_unseen_views_residuals_end_at_the_noise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classical_choice, "MOST", {name: 60})
    observed = seen(share=0.1).whole
    found = reconstruct(name, observed)
    assert found.settings == {"iterations": searched(name, observed, unseen=False)}
    assert float(observed.all.misfit(found.image)) == pytest.approx(1, abs=0.15)
    assert found.settings["iterations"] < 60


def left_out(name: str, observed: Observed, nats: float) -> Tensor:
    """Return residuals of every view, from an image without it and those as far from the unseen ones."""
    count, held = len(observed.all.sinogram), observed.unseen_views
    part, weight = count // len(held), nats * float(observed.all.std.square().mean())
    found = torch.zeros_like(observed.all.sinogram)
    for step in range(part):
        views = [part * place + (view + step) % part for place, view in enumerate(held)]
        others = observed.all.of_views([view for view in range(count) if view not in views])
        image = METHODS[name](others.projector, others.sinogram, weight, CONVERGED, **FIXED[name])
        some = observed.all.of_views(views)
        found[views] = some.projector.A(image) - some.sinogram
    return found


def energy(residuals: Tensor) -> Tensor:
    """Squares in the mean of frequencies, of which 0 counts a quarter of the first."""
    frequency = torch.fft.fftfreq(residuals.shape[-1]).abs()
    frequency[0] = frequency[1] / 4
    return (frequency * torch.fft.fft(residuals).abs().square()).sum(-1)


@pytest.mark.parametrize(
    "name", [VARIED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in VARIED[1:])]
)
def test_the_weight_of_variation_is_the_one_by_which_views_that_are_left_out_err_least(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classical_choice, "SEEK", CONVERGED)
    observed = seen(share=0.1)
    left = leave_out(observed, name)
    assert left is not None
    some = VARIATIONS[1:5]
    by_weight = [left_out(name, observed, nats) for nats in some]
    energies = [float(energy(each).sum()) for each in by_weight]
    least = energies.index(min(energies))
    assert 0 < least < len(some) - 1
    around = slice(least - 1, least + 2)
    square, slope, _ = np.polyfit(np.log(some[around]), energies[around], 2)
    assert left.variation == pytest.approx(SHARE * math.exp(-slope / (2 * square)), rel=0.1)
    assert min(energies) < 0.9 * max(energies)  # control: the choice matters
    found = reconstruct(name, observed, left)
    assert found.settings == {"weight": pytest.approx(left.variation), "iterations": FINAL}
    rays, variance = observed.all, float(observed.all.std.square().mean())
    wanted = METHODS[name](rays.projector, rays.sinogram, left.variation * variance, FINAL, box=(0.0, 1.0))
    torch.testing.assert_close(found.image, wanted, rtol=0, atol=1e-5)


def test_without_unseen_views_the_weight_is_in_the_middle() -> None:
    assert leave_out(seen().whole) is None
    assert reconstruct("fista_tv", seen().whole).settings == {
        "weight": pytest.approx(8.0),
        "iterations": FINAL,
    }


@pytest.mark.parametrize("least", [0, 1, 4, 5])
def test_the_best_weight_is_found_from_the_middle(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a method whose images are wrong by how far its weight is from one."""
    observed, tried, told = seen(share=0.1), set[float](), list[int]()
    variance, best = float(observed.all.std.square().mean()), VARIATIONS[least]

    def method(projector: Any, sinogram: Tensor, weight: float, iterations: int, **_: Any) -> Tensor:
        tried.add(round(weight / variance))
        return observed.scan.truth * (1 + math.log(weight / variance / best))

    monkeypatch.setitem(METHODS, "fista_tv", method)
    found = leave_out(observed, progress=told.append)
    assert found is not None
    sets = len(observed.all.sinogram) // len(observed.unseen_views)
    assert told == [sets * (1 + number) for number in range(len(tried))]
    assert found.variation == pytest.approx(SHARE * best, rel=0.1)
    assert best in tried
    assert len(tried) == {0: 5, 1: 5, 4: 4, 5: 4}[least]

    def weight(known: LeftOut | None) -> float:
        return reconstruct("fista_tv", observed, known).settings["weight"]

    assert weight(None) == weight(LeftOut("sirt", 3.0, 5.0)) == pytest.approx(found.variation)
    assert weight(LeftOut("fista_tv", 3.0, 5.0)) == pytest.approx(3.0)


def test_what_has_no_total_variation_has_no_weight() -> None:
    with pytest.raises(InputError, match="'sirt' has no total variation to weigh; choose one of fista_tv"):
        leave_out(seen(), "sirt")


@pytest.mark.parametrize("least", [1.6, 4.0, 9.7, 11.0])
def test_a_parabola_finds_its_least_place(least: float) -> None:
    values = [3.0 * math.log(place / least) ** 2 - 5.0 for place in VARIATIONS]
    assert vertex(VARIATIONS, values) == pytest.approx(least)


def test_a_parabola_is_not_trusted_beyond_the_places() -> None:
    assert vertex((1.0, 2.0, 4.0), (3.0, 2.0, 1.0)) == 4.0
    assert vertex((1.0, 2.0, 4.0), (1.0, 2.0, 4.0)) == 1.0
    assert vertex((1.0, 2.0, 4.0), (1.0, 1.0, 1.0)) == 1.0


def test_nothing_is_chosen_for_filtered_backprojection() -> None:
    found = reconstruct("fbp", seen())
    assert found.settings == {}
    assert ((found.image >= 0) & (found.image <= 1)).all()


@pytest.mark.parametrize("name", METHODS)
def test_images_are_in_units_of_the_peak(name: str) -> None:
    """A scan whose unit is another is the same reconstruction."""
    one, other = (reconstruct(name, seen(peak=peak)) for peak in (1.0, 0.02))
    torch.testing.assert_close(one.image, other.image, rtol=0, atol=2e-3)
    assert one.settings == pytest.approx(other.settings, rel=1e-5)
    assert psnr(one.image, phantom_scan().truth) > 17
    assert not one.image.requires_grad


def test_choices_end_when_nothing_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    cgls = METHODS["cgls"]

    def counted(*given: Any, callback: Any = None, **more: Any) -> Tensor:
        def watch(step: int, image: Tensor) -> object:
            calls.append(step)
            return callback(step, image)

        return cgls(*given, callback=watch if callback else None, **more)

    monkeypatch.setitem(METHODS, "cgls", counted)
    found = reconstruct("cgls", seen(share=0.1))
    assert calls[-1] == found.settings["iterations"] + PATIENCE < MOST["cgls"]


def test_bad_input() -> None:
    for call in (
        lambda: reconstruct("sirt2", seen()),
        lambda: classical_choice.check_classical(("fbp", "sirt2")),
    ):
        with pytest.raises(InputError, match="unknown method 'sirt2'; choose one of fbp, sirt, sart"):
            call()
