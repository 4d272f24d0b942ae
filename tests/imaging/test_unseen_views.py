"""Error bars judged by views that were not fitted: exact posteriors, and groups that are exchangeable."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor

from gramian.bayes.linear_gaussian import GaussianPosterior, exact_posterior
from gramian.core.predictive import Predictive
from gramian.errors import InputError
from gramian.imaging.geometry import ParallelBeam, evenly
from gramian.imaging.radon import Projector
from gramian.imaging.unseen_views import (
    LARGEST,
    SpreadFactor,
    ViewCheck,
    check_views,
    folds,
    hold_out,
    noise_energy,
    pixel_energy,
    rescaled,
    spread_factor,
)

F64 = torch.float64
SIDE, STD = 12, 0.3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


@cache
def scan() -> tuple[Projector, tuple[int, ...], tuple[int, ...]]:
    whole = Projector(ParallelBeam(evenly(10), SIDE, 18), dtype=F64)
    return whole, *hold_out(10, 0.4, seed=1)


@cache
def prior() -> Tensor:
    """Return the covariance of images that are smooth over two pixels."""
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
    return (-0.5 * torch.cdist(at, at).square() / 4).exp() + 1e-4 * torch.eye(SIDE**2, dtype=F64)


def matrix(projector: Projector) -> Tensor:
    unit = torch.eye(SIDE**2, dtype=F64).unflatten(-1, (SIDE, SIDE))
    return projector.A(unit).flatten(1).mT


@cache
def posteriors(count: int = 30) -> tuple[list[GaussianPosterior], Tensor]:
    """Return exact posteriors given the kept views of that many scans, and the held-out measurements."""
    whole, kept, held = scan()
    truth = normal(count, SIDE**2, seed=3) @ torch.linalg.cholesky(prior()).mT
    exact = whole.A(truth.unflatten(-1, (SIDE, SIDE)))
    measured = exact + STD * normal(*exact.shape, seed=4)
    rows = matrix(whole.subset(kept))
    known = [exact_posterior(rows, y[list(kept)].flatten(), STD**2, prior()) for y in measured]
    return known, measured[:, list(held)]


def checks(members: int, stretch: float = 1.0) -> list[ViewCheck]:
    whole, _, held = scan()
    part, (known, measured) = whole.subset(held), posteriors()
    found = []
    for seed, (one, y) in enumerate(zip(known, measured, strict=True)):
        samples = one.sample(members, generator(seed)).unflatten(-1, (SIDE, SIDE))
        found.append(check_views(rescaled(samples, stretch), part, y, STD))
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    found = torch.tensor(values, dtype=F64)
    return float(found.mean()), float(found.std() / math.sqrt(len(found)))


def test_the_foretold_law_is_the_exact_one() -> None:
    whole, _, held = scan()
    (known, measured), check = posteriors(), checks(4000)[0]
    exact = known[0].predict(matrix(whole.subset(held)), STD**2)
    foretold = check.prediction
    torch.testing.assert_close(foretold.total.flatten(), exact.total, rtol=0.15, atol=1e-3)
    assert float(((foretold.mean.flatten() - exact.mean) / exact.std).abs().max()) < 0.08
    assert torch.equal(check.sinogram, measured[0])
    z = (measured[0].flatten() - exact.mean) / exact.std
    assert check.chi_square == pytest.approx(float(z.square().mean()), rel=0.05)
    nll = 0.5 * (z.square() + (2 * math.pi * exact.total).log()).mean()
    assert check.nll == pytest.approx(float(nll), abs=0.02)
    assert float((exact.variance > STD**2).double().mean()) > 0.3  # the spread matters here


def test_an_exact_posterior_is_found_right_and_others_are_not() -> None:
    right, narrow, wide = checks(200), checks(200, 1 / 3), checks(200, 3.0)
    mean, error = mean_and_error([one.chi_square for one in right])
    assert abs(mean - 1.02) < 3 * error  # 1.02: of 200 samples
    assert error < 0.1
    assert mean_and_error([one.misfit for one in right])[0] > 1.5  # control: noise alone is too little
    assert mean_and_error([one.chi_square for one in narrow])[0] > 1.5
    assert mean_and_error([one.chi_square for one in wide])[0] < 0.5
    scores = [mean_and_error([one.nll for one in some])[0] for some in (right, narrow, wide)]
    assert scores[0] == min(scores)
    covered = [torch.stack([one.coverage() for one in some]).mean(0) for some in (right, narrow, wide)]
    levels = torch.linspace(0.05, 0.95, 19, dtype=F64)
    assert float((covered[0] - levels).abs().mean()) < 0.03
    assert float((covered[1] - levels).mean()) < -0.05
    assert float((covered[2] - levels).mean()) > 0.05


def test_views_tell_the_energy_of_pixels() -> None:
    projector = Projector(ParallelBeam(evenly(40), 32, 46), dtype=F64)
    smooth = torch.nn.functional.avg_pool2d(normal(8, 32, 32), 7, 1, 3)
    rough = smooth - torch.nn.functional.avg_pool2d(smooth, 3, 1, 1)
    rays, energies = [], []
    for errors in (smooth, rough):
        views = projector.A(errors)
        rays.append(float((views.square().sum((-1, -2)) / errors.square().sum((-1, -2))).mean()))
        energies.append(float((pixel_energy(views).sum(-1) / errors.square().sum((-1, -2))).mean()))
    assert 1 < energies[0] / energies[1] < 1.5  # pixels of linear beams blur what alternates
    assert rays[0] > 4 * rays[1]  # control: along rays it cancels


def test_the_energy_of_noise() -> None:
    std = 0.1 + normal(3, 7).abs()
    drawn = pixel_energy(std * normal(20_000, 3, 7, seed=1)).mean(0)
    torch.testing.assert_close(drawn, noise_energy(std.square()), rtol=0.05, atol=0)


def test_the_factor_undoes_what_was_done_to_the_spread() -> None:
    factors = [spread_factor(one) for one in checks(200)]
    mean, error = mean_and_error([one.factor for one in factors])
    assert abs(mean - 1) < 3 * error + 0.02
    assert error < 0.06
    stated = math.sqrt(sum(one.error**2 for one in factors) / len(factors))
    spread = error * math.sqrt(len(factors))
    assert 0.5 < stated / spread < 2.5  # four views say roughly how uncertain the factor is
    for stretch in (1 / 3, 2.0):
        for one, other in zip(factors, checks(200, stretch), strict=True):
            found = spread_factor(other)
            assert found.factor * stretch == pytest.approx(one.factor, rel=1e-5)
            assert not found.capped
    assert mean_and_error([spread_factor(one).factor for one in checks(200, 1 / 3)])[0] > 2.7


def test_few_samples_inflate_no_more_than_stated() -> None:
    members = 8
    bound = (1 + 1 / members) * (members - 1) / (members - 3)
    law = Predictive.from_samples(normal(members, 3, 40_000), 1e-6)
    pure = ViewCheck(law, normal(3, 40_000, seed=1))
    assert pure.chi_square == pytest.approx(bound, rel=0.02)
    assert spread_factor(pure).factor == pytest.approx(1, rel=0.01)
    few, many = checks(members), checks(200)
    more = [one.chi_square - other.chi_square for one, other in zip(few, many, strict=True)]
    mean, error = mean_and_error(more)
    assert 2 * error < mean < bound - 1
    mean, error = mean_and_error([spread_factor(one).factor for one in few])
    assert abs(mean - 1) < 3 * error + 0.02
    levels = torch.linspace(0.05, 0.95, 19, dtype=F64)
    drawn = torch.stack([one.drawn_coverage(generator(7)) for one in few]).mean(0)
    mixed = torch.stack([one.coverage() for one in few]).mean(0)
    assert float((drawn - levels).abs().mean()) < 0.03
    assert float(mixed[-1]) < float(drawn[-1]) - 0.02  # control: eight samples and their noise are too narrow


def waves(*frequencies: int, detectors: int = 16) -> Tensor:
    """Return a view of cosines, all of amplitude 1."""
    at = torch.arange(detectors, dtype=F64)
    return sum((torch.cos(2 * math.pi * f * at / detectors) for f in frequencies), torch.zeros(detectors))


def test_the_factor_of_pure_waves_is_that_of_their_weighted_energies() -> None:
    samples = torch.stack([waves(2), -waves(2)])[:, None]  # of variance 2 cos²: mean 0, K = 2
    noise = 0.01
    check = ViewCheck(Predictive.from_samples(samples, noise), 3 * waves(6)[None])
    deviations = 2 * (2 / 16) * (16 / 2) ** 2 * 2  # both signs of ω, |ω|, |F cos|²; two samples less one
    residuals = 9 * 2 * (6 / 16) * (16 / 2) ** 2
    white = (float(torch.fft.fftfreq(16).abs().sum()) + 1 / 64) * 16 * noise
    assert spread_factor(check).factor == pytest.approx(
        math.sqrt((residuals - white) / (1.5 * deviations)), rel=1e-9
    )
    squares, p = check.sinogram.square(), check.prediction
    found = spread_factor(check)

    def likelihood(s: float) -> float:
        law = Predictive.gaussian(p.mean, s**2 * p.variance + p.aleatoric)
        return float(law.log_likelihood(check.sinogram).mean())

    assert squares.numel() == 16
    assert found.gain == pytest.approx(likelihood(found.factor) - likelihood(1.0), rel=1e-9, abs=1e-12)


def test_one_view_that_stands_out_does_not_decide() -> None:
    samples = torch.stack([waves(2), -waves(2)])[:, None].expand(2, 5, 16)

    def factor(*amplitudes: float) -> SpreadFactor:
        errors = torch.tensor(amplitudes, dtype=F64)[:, None] * waves(2)
        return spread_factor(ViewCheck(Predictive.from_samples(samples, 1e-9), errors))

    usual = factor(2, 2.1, 1.9, 2.2, 1.8)
    assert factor(2, 2.1, 1.9, 90, 1.8).factor == pytest.approx(usual.factor, rel=1e-6)
    assert factor(2, 2.1, 1.9, 2.2, 0).factor == pytest.approx(usual.factor, rel=1e-6)
    assert factor(2, 2.1, 90, 90, 90).factor > 10 * usual.factor  # control: most of them do
    assert usual.factor == pytest.approx(2 / math.sqrt(3), rel=1e-6)  # 2² of (1 + 1/2) 2
    assert usual.error == pytest.approx(1.2533 / 0.6745 * 0.41 / 5**0.5 / (2 * 2) / math.sqrt(3), rel=1e-3)


def blurred(images: Tensor, width: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, width, 1, width // 2)


def test_it_compares_pixels_where_sums_along_rays_mislead() -> None:
    """Errors that are smooth, and deviations that alternate, of the same size at pixels."""
    side = 64
    projector = Projector(ParallelBeam(evenly(40), side, 92), dtype=F64)
    at = torch.linspace(-1, 1, side, dtype=F64)
    inside = (at[:, None].square() + at.square() < 0.9).double()
    smooth = blurred(normal(1, side, side, seed=5), 9)[0] * inside
    white = normal(60, side, side, seed=6) * inside
    rough = blurred(white, 3) - blurred(white, 7)
    rough = (rough - rough.mean(0)) * inside
    rough = rough * (smooth.square().mean() / rough.var(0).mean()).sqrt()
    check = check_views(rough, projector, projector.A(smooth), 1e-6)
    assert 0.8 < spread_factor(check).factor < 1.2
    rays = (check.sinogram - check.prediction.mean).square().mean() / check.prediction.variance.mean()
    assert float(rays.sqrt()) > 2  # what sums along rays ask for


def test_factors_at_their_ends() -> None:
    exact = torch.zeros(4, 3, 5, dtype=F64)
    exact[:2] += 1e-3
    sure = ViewCheck(Predictive.from_samples(exact, 1e-4), torch.full((3, 5), 1.0, dtype=F64))
    found = spread_factor(sure)
    assert (found.factor, found.capped) == (pytest.approx(LARGEST, rel=1e-6), True)
    spread = normal(50, 3, 5)
    hit = ViewCheck(Predictive.from_samples(spread, 1.0), spread.mean(0))
    assert spread_factor(hit) == (found := spread_factor(hit))
    assert (found.factor, found.error, found.capped) == (0.0, 0.0, False)
    one_view = ViewCheck(Predictive.from_samples(spread[:, :1], 1.0), normal(1, 5, seed=3))
    assert math.isnan(spread_factor(one_view).error)
    with pytest.raises(InputError, match="foretell the same"):
        spread_factor(ViewCheck(Predictive.from_samples(exact[:2], 1.0), exact[0]))


def test_order_of_samples_changes_nothing() -> None:
    whole, _, held = scan()
    part, y = whole.subset(held), posteriors()[1][0]
    samples = posteriors()[0][0].sample(9, generator(2)).unflatten(-1, (SIDE, SIDE))
    one, other = (check_views(some, part, y, STD) for some in (samples, samples.flip(0)))
    torch.testing.assert_close(one.z, other.z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.coverage(), other.coverage())
    assert spread_factor(one).factor == pytest.approx(spread_factor(other).factor, rel=1e-5)
    every = torch.full(y.shape, STD, dtype=F64)
    assert torch.equal(check_views(samples, part, y, every).z, one.z)
    single = Projector(part.geometry)
    rough = check_views(samples.float(), single, y.float(), STD)
    assert rough.z.dtype == F64
    torch.testing.assert_close(rough.z, one.z, rtol=1e-3, atol=1e-3)


def test_what_no_ray_sees_is_not_judged() -> None:
    whole, _, held = scan()
    part, y = whole.subset(held), posteriors()[1][0]
    samples = posteriors()[0][0].sample(30, generator(2))
    values, vectors = torch.linalg.eigh(matrix(part).mT @ matrix(part))
    unseen = vectors[:, values < 1e-9 * values[-1]]
    assert unseen.shape[1] > 20
    wrong = samples + 100 * (samples @ unseen) @ unseen.mT
    one, other = (check_views(some.unflatten(-1, (SIDE, SIDE)), part, y, STD) for some in (samples, wrong))
    assert other.chi_square == pytest.approx(one.chi_square, rel=1e-4)
    assert spread_factor(other).factor == pytest.approx(spread_factor(one).factor, rel=1e-3)
    assert float(wrong.var(0).mean() / samples.var(0).mean()) > 100


def test_deviations_are_multiplied() -> None:
    samples = torch.rand(6, 4, 4, generator=generator(), dtype=F64)
    twice = rescaled(samples, 2.0)
    torch.testing.assert_close(twice.mean(0), samples.mean(0))
    torch.testing.assert_close(twice.std(0), 2 * samples.std(0))
    assert torch.equal(rescaled(samples, 0.0), samples.mean(0).expand(6, 4, 4))
    boxed = rescaled(samples, 3.0, (0.0, 1.0))
    assert torch.equal(boxed, rescaled(samples, 3.0).clamp(0, 1))
    noise = torch.full((4, 4), 0.1, dtype=F64)
    prediction = Predictive.from_samples(samples, noise)
    wide = rescaled(prediction, 2.0)
    assert wide.samples is not None
    torch.testing.assert_close(wide.samples, twice)
    torch.testing.assert_close(wide.variance, 4 * prediction.variance)
    assert torch.equal(wide.aleatoric, noise)
    kept = rescaled(prediction, 3.0, (0.0, 1.0))
    torch.testing.assert_close(kept.mean, boxed.mean(0))
    torch.testing.assert_close(kept.variance, boxed.var(0))
    plain = rescaled(Predictive.gaussian(samples[0], 0.5, 0.1), 3.0)
    assert plain.samples is None
    torch.testing.assert_close(plain.total, torch.full((4, 4), 4.6, dtype=F64))


@pytest.mark.parametrize("tails", [4.0, 5.0, 50.0])
def test_gaussian_samples_are_given_the_tails_of_student(tails: float) -> None:
    samples = 1 + normal(4000, 2, 5)
    wide = rescaled(samples, 2.0, tails=tails)
    torch.testing.assert_close(wide.mean(0), samples.mean(0))
    scale = 2 * math.sqrt((tails - 2) / tails)
    for level in (0.5, 0.95):
        reach = scale * float(student(tails).ppf((1 + level) / 2))
        inside = ((wide - wide.mean(0)).abs() <= reach).double().mean()
        assert float(inside) == pytest.approx(level, abs=0.01)
    assert torch.equal(wide, rescaled(samples, 2.0, tails=tails))
    prediction = rescaled(Predictive.from_samples(samples, 0.1), 2.0, tails=tails)
    assert prediction.samples is not None
    torch.testing.assert_close(prediction.samples, wide)
    torch.testing.assert_close(prediction.variance, wide.var(0))


def test_tails_share_the_spread_out_differently_and_leave_it_as_it_is() -> None:
    few = normal(400, 50, 3)
    energies = rescaled(few.transpose(0, 1).reshape(50, -1, 1), 3.0, tails=4.0).var(0).mean()
    assert float(energies) == pytest.approx(9 * float(few.var(1).mean()), rel=0.05)


@given(st.integers(5, 300), st.floats(0.001, 0.499), st.integers(0, 5))
def test_held_views_are_spread_over_all(views: int, share: float, seed: int) -> None:
    kept, held = hold_out(views, share, seed)
    assert sorted(kept + held) == list(range(views))
    assert 2 <= len(held) < len(kept)
    assert abs(len(held) - share * views) <= 2
    assert all(view * len(held) // views in (part - 1, part) for part, view in enumerate(held))
    assert (kept, held) == hold_out(views, share, seed)


def test_held_views_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    assert len({hold_out(60, seed=seed)[1] for seed in range(10)}) > 5
    assert len(hold_out(60)[1]) == 6
    assert torch.equal(before, torch.get_rng_state())
    counted = torch.zeros(20)
    for seed in range(600):
        counted[list(hold_out(20, seed=seed)[1])] += 1
    assert float((counted / 60 - 1).abs().max()) < 0.5  # every view is drawn alike


@given(st.integers(5, 190), st.floats(0.05, 0.45), st.integers(0, 5))
def test_folds_share_out_the_views_and_are_alike(views: int, share: float, seed: int) -> None:
    held = hold_out(views, share, seed)[1]
    found = folds(views, held)
    assert found[0] == held
    assert sorted(view for fold in found for view in fold) == list(range(views))
    ends = [part * views // len(held) for part in range(len(held) + 1)]
    for fold in found:
        inside = [sum(low <= view < high for view in fold) for low, high in pairwise(ends)]
        assert max(inside) == 1
        assert len(fold) == len(held) or fold is found[-1]


def test_folds_need_one_view_of_each_part() -> None:
    with pytest.raises(
        InputError, match=r"of 2 equal parts of 10 views one each has to be held, not \(0, 1\)"
    ):
        folds(10, (0, 1))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: hold_out(4), "needs at least 5 views, not 4"),
        (lambda: hold_out(60, 0.5), "between 0 and 0.5, not 0.5"),
        (lambda: hold_out(60, math.nan), "between 0 and 0.5, not nan"),
        (lambda: check(samples=normal(1, SIDE, SIDE)), r"at least 2 samples .* not \(1, 12, 12\)"),
        (lambda: check(samples=normal(SIDE, SIDE)), r"at least 2 samples .* not \(12, 12\)"),
        (
            lambda: check(samples=normal(3, SIDE, SIDE).long()),
            r"floating-point numbers, not \(3, 12, 12\) of torch.int64",
        ),
        (lambda: check(samples=normal(3, SIDE, SIDE) / 0), "samples of an image have to be finite"),
        (lambda: check(samples=normal(3, SIDE, 5)), "images of this scan are"),
        (lambda: check(sinogram=normal(4, 17)), r"has to be \(4, 18\) and not empty, not \(4, 17\)"),
        (lambda: check(sinogram=normal(4, 18) / 0), "measurements have to be finite"),
        (lambda: check(std=0.0), "finite and above 0"),
        (lambda: check(std=torch.ones(18)), r"one number or \(4, 18\) like the sinogram"),
        (lambda: rescaled(normal(3, 4, 4), -1.0), "at least 0, not -1"),
        (lambda: rescaled(normal(3, 4, 4), math.inf), "at least 0, not inf"),
        (lambda: rescaled(normal(1, 4, 4), 2.0), "at least 2 samples"),
        (
            lambda: rescaled(Predictive.gaussian(normal(4, 4), 1.0), 2.0, (0.0, 1.0)),
            "has no box or tails",
        ),
        (lambda: rescaled(Predictive.gaussian(normal(4, 4), 1.0), 2.0, tails=5.0), "has no box or tails"),
        (lambda: rescaled(normal(3, 4, 4), 1.0, tails=2.0), "more than 2 degrees of freedom, not 2"),
        (lambda: rescaled(normal(3, 4, 4), 1.0, tails=math.inf), "a finite number of more than 2"),
        (lambda: rescaled(normal(3, 4, 4), 1.0, tails=math.nan), "more than 2 degrees of freedom, not nan"),
    ],
)
def test_bad_input(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]


def check(
    samples: Tensor | None = None, sinogram: Tensor | None = None, std: float | Tensor = STD
) -> ViewCheck:
    whole, _, held = scan()
    samples = normal(3, SIDE, SIDE) if samples is None else samples
    return check_views(samples, whole.subset(held), normal(4, 18) if sinogram is None else sinogram, std)
