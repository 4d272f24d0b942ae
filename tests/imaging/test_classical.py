"""Every iterative method does what its equation says, and settings are chosen by their scores."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.classical import METHODS, stopped, tuned
from gramian.imaging.geometry import ParallelBeam, evenly, padded
from gramian.imaging.iterative import cgls, em, largest_eigenvalue, of_views, ordered_subsets, sart, sirt
from gramian.imaging.quality import psnr
from gramian.imaging.radon import Projector
from gramian.imaging.variation import fista_tv, pdhg_tv
from imaging.dense import Dense, error, generator, noisy

F64 = torch.float64
ITERATIVE = {name: method for name, method in METHODS.items() if name != "fbp"}
WITH_WEIGHT = {"fista_tv", "anisotropic_tv", "pdhg_tv"}


def settings(name: str) -> dict[str, float]:
    return {"weight": 0.05} if name in WITH_WEIGHT else {}


def test_cgls_is_least_squares() -> None:
    projector = Dense()
    _, y = noisy(projector, 3)
    x = cgls(projector, y, 30)
    expected = (torch.linalg.pinv(projector.matrix) @ y.flatten(1).T).T.view_as(x)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(cgls(projector, y, 5), expected, rtol=1e-3)  # control
    begun = cgls(projector, y, 30, start=expected + 1.0)  # what no ray sees stays as it began
    torch.testing.assert_close(projector.A(begun), projector.A(expected), rtol=1e-8, atol=1e-8)


def history(method: Callable[..., Tensor], *arguments: object, **chosen: object) -> list[Tensor]:
    images: list[Tensor] = []
    method(*arguments, callback=lambda step, image: images.append(image.clone()), **chosen)
    return images


def falls(values: list[float]) -> bool:
    return all(b <= a + 1e-12 * abs(a) for a, b in pairwise(values))


@pytest.mark.parametrize("box", [(None, None), (0.0, None), (0.2, 0.6)])
@pytest.mark.parametrize("relaxation", [0.4, 1.0, 1.9])
def test_sirt_never_grows_its_own_objective(
    relaxation: float, box: tuple[float | None, float | None]
) -> None:
    projector = Dense()
    _, y = noisy(projector)
    weights = projector.matrix.sum(1).view(projector.shape)
    inverse = torch.where(weights > 0, 1 / weights, 0)

    def objective(x: Tensor, weights: Tensor) -> float:
        return float((weights * (y - projector.A(x)).square()).sum())

    images = history(sirt, projector, y, 60, relaxation=relaxation, box=box)
    assert falls([objective(x, inverse) for x in images])
    if box[0] is not None:
        assert all(float(x.amin()) >= box[0] for x in images)
    plain = [torch.zeros(4, 4, dtype=F64)]
    columns = projector.matrix.sum(0).view(4, 4)
    for _ in range(9):  # control: without the weights of rows the same step is too long
        step = projector.A_adjoint(y - projector.A(plain[-1])) / columns.clamp(min=1e-9)
        plain.append(plain[-1] + step)
    assert not falls([objective(x, inverse) for x in plain])


def test_sirt_ends_at_weighted_least_squares() -> None:
    projector = Dense()
    _, y = noisy(projector)
    x = sirt(projector, y, 20_000)
    weights = projector.matrix.sum(1)
    root = torch.where(weights > 0, weights, math.inf).rsqrt()
    expected = torch.linalg.pinv(root[:, None] * projector.matrix) @ (root * y.flatten())
    seen = projector.matrix.sum(0) > 0
    torch.testing.assert_close(x.flatten()[seen], expected[seen], rtol=1e-5, atol=1e-6)
    assert float(x.flatten()[~seen].abs().max()) == 0


def test_em_never_loses_likelihood() -> None:
    projector = Dense()
    _, y = noisy(projector)
    y = y.clamp(min=0)
    y[0, 3] = 0  # the blind detector: any other count there is impossible

    def likelihood(x: Tensor) -> float:
        expected = projector.A(x)
        return float((torch.xlogy(y, expected.clamp(min=1e-300)) - expected).sum())

    images = history(em, projector, y, 80)
    assert falls([-likelihood(x) for x in images])
    assert all(float(x.amin()) >= 0 for x in images)
    images[0] = torch.ones(4, 4, dtype=F64)
    hasty = [
        x * (new / x.clamp(min=1e-300)) ** 4 for x, new in pairwise(images[:1] + history(em, projector, y, 1))
    ]
    assert not falls([-likelihood(x) for x in (images[0], *hasty)])  # control: four times the step
    total = float((y - projector.A(images[-1])).sum())
    assert abs(total) < 1e-10  # every iteration keeps the total of the counts


def test_em_finds_consistent_data_and_takes_negative_ones_as_none() -> None:
    projector = Dense(blind=False)
    truth, _ = noisy(projector)
    exact = projector.A(truth)
    assert error(projector.A(em(projector, exact, 2000)), exact) < 1e-3
    negative = exact.clone()
    negative[1] = -1.0
    assert torch.equal(em(projector, negative, 5), em(projector, negative.clamp(min=0), 5))
    assert bool(em(projector, negative, 50).isfinite().all())


def test_sart_of_all_views_at_once_is_sirt() -> None:
    projector = Dense()
    _, y = noisy(projector, 2)
    together = sart(projector, y, 7, relaxation=0.8, subset=5)
    torch.testing.assert_close(together, sirt(projector, y, 7, relaxation=0.8), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(sart(projector, y, 7, relaxation=0.8), together, rtol=1e-2)  # control


def test_sart_comes_nearer_in_a_sweep() -> None:
    projector = Dense(blind=False)
    truth, _ = noisy(projector)
    y = projector.A(truth)
    residuals = [float((y - projector.A(x)).norm()) for x in history(sart, projector, y, 40, relaxation=1.0)]
    assert falls(residuals)
    slow = float((y - projector.A(sirt(projector, y, 40))).norm())
    assert residuals[-1] < 0.8 * slow


@pytest.mark.parametrize(("views", "size"), [(1, 1), (7, 1), (12, 4), (13, 4), (5, 9)])
def test_subsets_share_out_all_views(views: int, size: int) -> None:
    blocks = ordered_subsets(views, size)
    assert sorted(v for block in blocks for v in block) == list(range(views))
    assert max(map(len, blocks)) <= size
    if views == 7:
        steps = [abs(a[0] - b[0]) for a, b in pairwise(blocks)]
        assert min(steps) > 1  # neighbours in a sweep are no neighbours in angle


def test_some_views_of_any_operator() -> None:
    projector = Dense()
    part, x = of_views(projector, [3, 1], 5), torch.rand(2, 4, 4, generator=generator(), dtype=F64)
    y = torch.rand(2, 2, 6, generator=generator(1), dtype=F64)
    assert torch.equal(part.A(x), projector.A(x)[:, [3, 1]])
    one, other = (part.A(x) * y).sum(), (x * part.A_adjoint(y)).sum()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_largest_eigenvalue() -> None:
    projector = Dense()
    exact = float(torch.linalg.matrix_norm(projector.matrix, 2)) ** 2
    found = [largest_eigenvalue(projector, torch.zeros(4, 4, dtype=F64), k) for k in (1, 15)]
    assert found[0] < 0.999 * exact
    assert 0.9999 * exact < found[1] <= exact * (1 + 1e-12)


@pytest.mark.parametrize("name", ITERATIVE)
def test_batches_types_starts_and_stops(name: str) -> None:
    projector, method, chosen = Dense(), ITERATIVE[name], settings(name)
    _, y = noisy(projector, 2, 3)
    together = method(projector, y, iterations=6, **chosen)
    for place in ((0, 0), (1, 2)):
        alone = method(projector, y[place], iterations=6, **chosen)
        torch.testing.assert_close(together[place], alone, rtol=1e-9, atol=1e-10)
    single = method(projector, y.float(), iterations=2, **chosen)
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), method(projector, y, iterations=2, **chosen), rtol=1e-3, atol=1e-3
    )
    steps: list[int] = []

    def watch(step: int, image: Tensor) -> bool:
        steps.append(step)
        return step == 4

    early = method(projector, y, iterations=6, callback=watch, **chosen)
    assert steps == [1, 2, 3, 4]
    torch.testing.assert_close(early, method(projector, y, iterations=4, **chosen), rtol=0, atol=0)
    start = torch.rand(2, 3, 4, 4, generator=generator(9), dtype=F64)
    kept = start.clone()
    assert not torch.equal(method(projector, y, iterations=1, start=start, **chosen), early)
    assert torch.equal(start, kept)
    with pytest.raises(InputError, match="a start has to be"):
        method(projector, y, iterations=1, start=start[0], **chosen)
    with pytest.raises(InputError, match="number of iterations"):
        method(projector, y, iterations=-1, **chosen)
    with pytest.raises(InputError, match="NaN"):
        method(projector, y * math.nan, iterations=1, **chosen)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_a_disc_behind_a_real_projector(name: str) -> None:
    """With the angles turned round, none does."""
    geometry = ParallelBeam(evenly(30), 24, padded(24), pixel_mm=0.5, spacing_mm=0.5)
    x, y = geometry.pixels()
    truth = ((x - 1.5).square() + (y + 1).square() < 9).float()
    sinogram = Projector(geometry, "area", scale=1 / 36).A(truth)
    chosen = {"weight": 1e-4, "iterations": 100} if name in WITH_WEIGHT else {}
    projector = Projector(geometry, scale=1 / 36)
    found = error(METHODS[name](projector, sinogram, **chosen), truth)
    assert found < (0.13 if name in WITH_WEIGHT else 0.3)
    turned = Projector(replace(geometry, angles=[-a for a in geometry.angles]), scale=1 / 36)
    assert error(METHODS[name](turned, sinogram, **chosen), truth) > 2 * found


def test_subsets_of_a_real_projector_are_those_of_any() -> None:
    geometry = ParallelBeam(evenly(6), 8, 12)
    projector, x = Projector(geometry, dtype=F64), torch.rand(8, 8, generator=generator(), dtype=F64)

    class Plain:
        A, A_adjoint = staticmethod(projector.A), staticmethod(projector.A_adjoint)

    y = projector.A(x)
    torch.testing.assert_close(sart(projector, y, 3), sart(Plain(), y, 3), rtol=1e-10, atol=1e-12)


def test_the_best_setting_is_chosen() -> None:
    projector = Dense()
    truths, sinograms = noisy(projector, 3)
    grid = [{"weight": w, "iterations": 50} for w in (0.0, 0.05, 50.0)]
    choice = tuned(fista_tv, grid, projector, (sinograms, truths))
    scores = [float(psnr(fista_tv(projector, sinograms, **s), truths).mean()) for s in grid]
    assert choice.score == max(scores)
    assert choice.settings == grid[scores.index(max(scores))]
    assert [value for _, value in choice.tried] == scores
    worst = tuned(fista_tv, grid, projector, (sinograms, truths), lambda x, t: -psnr(x, t))
    assert worst.settings == grid[scores.index(min(scores))]


def test_the_best_stop_is_found_in_one_run() -> None:
    projector = Dense()
    truths, sinograms = noisy(projector, 3)
    choice = stopped(cgls, projector, (sinograms, truths), 20)
    grid = [{"iterations": k} for k in range(1, 21)]
    expected = tuned(cgls, grid, projector, (sinograms, truths))
    assert choice.settings == expected.settings
    assert choice.score == pytest.approx(expected.score, rel=1e-12)
    assert choice.settings["iterations"] < 20  # more iterations fit the noise
    patient = stopped(cgls, projector, (sinograms, truths), 20, patience=3)
    assert patient.settings == choice.settings
    assert len(patient.tried) == choice.settings["iterations"] + 3
    kept = stopped(sirt, projector, (sinograms, truths), 5, relaxation=0.5)
    assert kept.settings["relaxation"] == 0.5
    assert set(kept.settings) == {"relaxation", "iterations"}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p, y: sirt(p, y, relaxation=2.0), "between 0 and 2"),
        (lambda p, y: sart(p, y, relaxation=0.0), "between 0 and 2"),
        (lambda p, y: sart(p, y, subset=0), "at least 1 view"),
        (lambda p, y: em(p, y, start=-torch.ones(4, 4, dtype=F64)), "nowhere negative"),
        (lambda p, y: fista_tv(p, y, -1.0), "total variation"),
        (lambda p, y: pdhg_tv(p, y, math.inf), "total variation"),
        (lambda p, y: pdhg_tv(p, y, 1.0, ratio=0.0), "ratio"),
        (lambda p, y: fista_tv(p, y, 1.0, box=(1.0, 0.0)), "above the greatest"),
        (lambda p, y: sirt(p, y[0]), "has to be"),
        (lambda p, y: tuned(cgls, [], p, (y, y)), "at least one setting"),
        (lambda p, y: stopped(cgls, p, (y, torch.ones(4, 4, dtype=F64)), 0), "at least one setting"),
    ],
)
def test_bad_input(make: Callable[..., object], said: str) -> None:
    projector = Dense()
    with pytest.raises(InputError, match=said):
        make(projector, noisy(projector)[1])
