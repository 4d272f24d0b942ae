"""Regressions of tables: protocol, scores, calibration, units, strange rows, refused input."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from torch import Tensor

from gramian.core.predictive import Predictive
from gramian.data.tables import Table, load_table
from gramian.errors import DivergedError, InputError
from gramian.tasks import regression, regression_fit
from gramian.tasks.regression import CONSTANT, RegressConfig, judged, likeliest_noise, regress, split_rows
from gramian.tasks.regression_fit import DEEP, LINEAR, PROCESS, SHARES, Fitter
from gramian.tasks.regression_scores import constant, coverage_error, far_threshold

QUICK = RegressConfig(
    target="y", method=DEEP, members=2, steps=40, widths=(16,), noise=(0.03,), compare=False, test=0.25
)
"""Half a second; the deep ensemble is tried with three numbers of steps."""


def rows_of(count: int = 80, seed: int = 0) -> list[list[float]]:
    """Return rows (a, b, y) with y = 3a − 2b + noise."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 2))
    y = x @ (3.0, -2.0) + 0.3 * random.normal(size=count)
    return np.column_stack([x, y]).tolist()


def written(path: Path, rows: list[list], header: str = "a b y") -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header.split(), *rows])
    return path


@pytest.fixture
def table(tmp_path) -> Path:
    return written(tmp_path / "table.csv", rows_of())


def plain_table(count: int, splits: tuple = ()) -> Table:
    x = torch.arange(2.0 * count, dtype=torch.float64).view(count, 2)
    return Table("t", x, x[:, 0], ("a", "b"), "y", splits=splits)


@pytest.mark.parametrize(
    ("count", "validation", "test"), [(12, 0.15, 0.2), (13, 0.99, 0.99), (200, 0.3, 0.1)]
)
def test_parts_share_no_row_and_leave_none_out(count, validation, test) -> None:
    config = replace(QUICK, validation=validation, test=test)
    parts = split_rows(plain_table(count), config)
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert min(map(len, parts)) >= 3
    if count == 200:
        assert [len(part) for part in parts] == [126, 54, 20]
    again, other = (
        split_rows(plain_table(count), config),
        split_rows(plain_table(count), replace(config, seed=1)),
    )
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parts, other, strict=True))


def test_a_published_split_is_kept() -> None:
    published = torch.arange(5, 40), torch.arange(5)
    table = plain_table(40, (published, (torch.arange(30), torch.arange(29, 40))))
    train, validation, test = split_rows(table, replace(QUICK, split=0))
    assert test.tolist() == [0, 1, 2, 3, 4]
    assert sorted(torch.cat([train, validation]).tolist()) == list(range(5, 40))
    for split, words in ((1, "none of them twice"), (2, "has splits 0 to 1"), (-1, "has splits 0 to 1")):
        with pytest.raises(InputError, match=words):
            split_rows(table, replace(QUICK, split=split))


def test_scores_are_those_of_the_formulas() -> None:
    mean, variance, noise = torch.tensor([[0.0, 1.0, 4.0], [0.5, 0.0, 2.0], [1.5, 1.0, 2.0]]).double()
    y, normal = torch.tensor([1.0, 3.0, 4.5]).double(), NormalDist()
    found = judged(Predictive(mean, variance, noise), y, 0.8)
    stds = [math.sqrt(2), 1.0, 2.0]
    gaps = [1.0, 2.0, 0.5]
    assert found.rmse == pytest.approx(math.sqrt((1 + 4 + 0.25) / 3))
    densities = [NormalDist(0, s).pdf(gap) for s, gap in zip(stds, gaps, strict=True)]
    assert found.nll == pytest.approx(-sum(map(math.log, densities)) / 3)
    z = normal.inv_cdf(0.9)
    assert found.width == pytest.approx(2 * z * sum(stds) / 3)
    assert found.coverage == pytest.approx(2 / 3)  # the second target is 2 of its deviations off
    scores = []
    for std, gap in zip(stds, gaps, strict=True):
        below = quad(lambda t, std=std: NormalDist(0, std).cdf(t) ** 2, -30, gap)[0]
        above = quad(lambda t, std=std: NormalDist(0, std).cdf(-t) ** 2, gap, 30)[0]
        scores.append(below + above)
    assert found.crps == pytest.approx(sum(scores) / 3, rel=1e-6)


def test_the_ends_of_an_interval_are_in_it() -> None:
    prediction = Predictive.gaussian(torch.zeros(2, dtype=torch.float64), 1.0)
    ends = torch.stack([end[0] for end in prediction.interval(0.9)])
    assert judged(prediction, ends, 0.9).coverage == 1  # the level is not rounded to float32
    assert judged(prediction, 1.0001 * ends, 0.9).coverage == 0


@pytest.mark.parametrize(("scale", "spread"), [(1.0, 0.4), (1e-3, 2.0), (5.0, 0.0)])
def test_the_noise_is_that_of_greatest_likelihood(scale, spread) -> None:
    random = np.random.default_rng(0)
    variance = scale**2 * random.uniform(0, spread, 60)
    mean = random.normal(size=60)
    y = mean + np.sqrt(variance + scale**2) * random.normal(size=60)

    def cost(logarithm: float) -> float:
        total = variance + math.exp(logarithm)
        return float(np.mean(0.5 * np.log(2 * math.pi * total) + (y - mean) ** 2 / (2 * total)))

    best = minimize_scalar(cost, bounds=(-30, 5), method="bounded")
    noise, nll = likeliest_noise(*map(torch.tensor, (mean, variance, y)))
    assert noise == pytest.approx(math.exp(best.x), rel=0.03)
    assert nll == pytest.approx(best.fun, abs=1e-3)
    assert cost(math.log(2 * noise)) > nll + 0.01  # control


def test_models_that_differ_more_than_targets_do_leave_no_noise() -> None:
    zeros = torch.zeros(50, dtype=torch.float64)
    noise, _ = likeliest_noise(zeros, zeros + 9, zeros + 0.1)
    assert noise == pytest.approx(1e-6 * 0.01)


def test_the_error_of_coverage_is_that_of_simulated_calibrations() -> None:
    generator = torch.Generator().manual_seed(0)
    few, judged_on = 50, 90
    deviation = torch.randn(4000, few, generator=generator).square().mean(1, keepdim=True).sqrt()
    targets = torch.randn(4000, judged_on, generator=generator).abs()
    for level in (0.5, 0.9):
        inside = (targets < NormalDist().inv_cdf((1 + level) / 2) * deviation).float().mean(1)
        assert inside.std().item() == pytest.approx(coverage_error(level, judged_on, few), rel=0.06)
        assert inside.std().item() > 1.15 * coverage_error(level, judged_on, 10**9)  # control


def test_the_threshold_is_passed_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, k in ((30, 1), (250, 2)):
        known = torch.rand(n, generator=generator, dtype=torch.float64)
        threshold, chance = far_threshold(known)
        assert threshold == known.sort(descending=True).values[k - 1].item()
        assert chance == pytest.approx(k / (n + 1))
        more = torch.rand(3000, n, generator=generator)
        passed = [float(1 - far_threshold(each)[0]) for each in more]  # of uniform numbers
        assert np.mean(passed) == pytest.approx(chance, rel=0.1)


def test_the_constant_has_mean_and_deviation_of_the_training_rows() -> None:
    y = torch.tensor([1.0, 2.0, 6.0])
    found = constant(y, 4)
    assert found.mean.tolist() == [3.0] * 4
    assert found.total.tolist() == pytest.approx([7.0] * 4)


def test_units_of_the_target_carry_over(tmp_path) -> None:
    small = written(tmp_path / "small.csv", rows_of())
    large = written(tmp_path / "large.csv", [[a, b, 1000 * y] for a, b, y in rows_of()])
    one, other = (regress(replace(QUICK, table=path)) for path in (small, large))
    for name in (DEEP, CONSTANT):
        for field in ("rmse", "crps", "width"):
            value = getattr(one.scores[name], field)
            assert getattr(other.scores[name], field) == pytest.approx(1000 * value, rel=1e-3)
        assert other.scores[name].nll == pytest.approx(one.scores[name].nll + math.log(1000), abs=1e-3)
    assert other.threshold == pytest.approx(1e6 * one.threshold, rel=1e-2)


def test_the_same_seed_gives_the_same_numbers(table) -> None:
    one, again, other = (regress(replace(QUICK, table=table, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(one.tested.prediction.mean, again.tested.prediction.mean)
    assert one.scores == again.scores
    assert one.scores != other.scores


class Changed:
    """A fitter of a table of which some targets are changed."""

    def __init__(self, table: Table, parts: tuple[Tensor, Tensor, Tensor], which: int, method: str) -> None:
        y = table.y.clone()
        if which < 3:
            y[parts[which]] += torch.linspace(-1, 1, len(parts[which]), dtype=torch.float64)
        config = replace(QUICK, method=method, steps=1)  # a single setting of a deep ensemble
        with Progress(console=Console(quiet=True)) as progress:
            self.fitted, _ = Fitter(config, replace(table, y=y), *parts[:2], progress).best(method)
        self.prediction = self.fitted.predict(table.x[parts[2]])


def test_members_learn_from_the_training_rows_alone(table) -> None:
    found = load_table(table, "y")
    parts = split_rows(found, QUICK)
    as_it_is, trained, chosen_by, reported = (Changed(found, parts, which, DEEP) for which in (3, 0, 1, 2))
    assert torch.equal(reported.prediction.mean, as_it_is.prediction.mean)
    assert reported.fitted.noise == as_it_is.fitted.noise
    assert torch.equal(chosen_by.prediction.mean, as_it_is.prediction.mean)
    assert torch.equal(chosen_by.prediction.variance, as_it_is.prediction.variance)
    assert chosen_by.fitted.noise != as_it_is.fitted.noise
    assert not torch.allclose(trained.prediction.mean, as_it_is.prediction.mean, atol=1e-3)


def test_the_setting_that_the_validation_rows_like_best_is_taken(table) -> None:
    found = regress(replace(QUICK, table=table, steps=200))
    assert [trial.steps for trial in found.trials] == [round(200 * share) for share in SHARES]
    assert found.fitted.trial.steps == min(found.trials, key=lambda trial: trial.nll).steps
    assert found.scores[DEEP].rmse < 0.5 * found.scores[CONSTANT].rmse


def test_a_setting_that_diverges_is_passed_over(table, monkeypatch) -> None:
    fit = regression_fit.fit_ensemble

    def sometimes(make, x, y, settings, progress, **more):
        if settings.noise_variance == 0.03:
            raise DivergedError("the loss is not finite")
        return fit(make, x, y, settings, progress, **more)

    monkeypatch.setattr(regression_fit, "fit_ensemble", sometimes)
    found = regress(replace(QUICK, table=table, method="rp_param"))
    assert [math.isinf(trial.nll) for trial in found.trials] == [False, True]
    assert found.fitted.trial.prior == found.trials[0].prior
    with pytest.raises(DivergedError):
        regress(replace(QUICK, table=table, learning_rate=1e9))


def test_linear_members_share_a_linearisation_where_rows_are_many(table, monkeypatch) -> None:
    fit, shared = regression_fit.fit_ensemble, []

    def watched(*arguments, auxiliary, **more):
        shared.append(auxiliary)
        return fit(*arguments, auxiliary=auxiliary, **more)

    monkeypatch.setattr(regression_fit, "fit_ensemble", watched)
    config = replace(QUICK, table=table, method=LINEAR)
    regress(config)
    assert shared == [None] * len(shared)
    shared.clear()
    before = torch.random.get_rng_state()
    monkeypatch.setattr(regression_fit, "SHARED", 50)  # of 51 training rows
    found = regress(config)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(isinstance(each, torch.nn.Module) for each in shared)
    assert found.scores[LINEAR].rmse < 0.5 * found.scores[CONSTANT].rmse


@pytest.mark.parametrize("method", ["ntkgp_param", LINEAR, PROCESS])
def test_far_rows_are_told_from_near_ones(tmp_path, table, method) -> None:
    near = [row[:2] for row in rows_of(40, seed=9)]
    path = written(tmp_path / "new.csv", [*near, *([10 * a, 10 * b] for a, b in near)], "a b")
    found = regress(replace(QUICK, table=table, method=method, members=4, steps=150, predict=path))
    assert found.new is not None
    assert found.new.y is None
    flags = found.far(found.new.prediction)
    assert flags[:40].double().mean() < 0.2
    assert flags[40:].double().mean() > 0.7
    if method == PROCESS:
        assert (found.trials, found.fitted.trial.steps) == ((), 0)
        assert found.scores[PROCESS].rmse < 0.2 * found.scores[CONSTANT].rmse


def test_what_is_shown_beside(table, monkeypatch) -> None:
    found = regress(replace(QUICK, table=table, method=PROCESS, compare=True))
    assert list(found.predictions) == list(found.scores) == [PROCESS, DEEP, CONSTANT]
    monkeypatch.setattr(regression, "DENSE", 50)  # of 51 training rows
    assert list(regress(replace(QUICK, table=table, compare=True)).scores) == [DEEP, CONSTANT]


def test_a_process_of_too_many_rows(table, monkeypatch) -> None:
    monkeypatch.setattr(regression_fit, "MOST", 50)
    with pytest.raises(InputError, match="ntkgp takes at most 50 training rows, got 51; choose another"):
        regress(replace(QUICK, table=table, method=PROCESS))


def test_words_are_levels(tmp_path) -> None:
    rows = [["red" if a > 0 else "blue", b, 5 * (a > 0) + y / 10] for a, b, y in rows_of()]
    path = written(tmp_path / "words.csv", rows, "colour b y")
    new = written(tmp_path / "new.csv", [["red", 0], ["blue", 0]], "colour b")
    found = regress(replace(QUICK, table=path, predict=new, steps=300))
    assert found.table.columns == ("colour=red", "b")
    assert found.new is not None
    red, blue = found.new.prediction.mean
    assert 4 < red - blue < 7
    written(new, [["green", 0]], "colour b")
    with pytest.raises(InputError, match="'green' in line 2; the levels learnt from are 'blue', 'red'"):
        regress(replace(QUICK, table=path, predict=new))


def test_targets_of_new_rows_are_read_where_all_are_known(tmp_path, table) -> None:
    for last, known in ((7.0, True), ("", False)):
        new = written(tmp_path / "new.csv", [[0.1, 0.2, 6.5], [0.3, 0.4, last]])
        found = regress(replace(QUICK, table=table, predict=new)).new
        assert found is not None
        assert found.numbers.tolist() == [1, 2]
        assert (found.y is not None and found.y.tolist() == [6.5, 7.0]) is known


def test_a_file_of_arrays_with_its_split(tmp_path) -> None:
    rows = np.array(rows_of())
    split = {"train_index": np.arange(20, 80)[None], "test_index": np.arange(20)[None]}
    np.savez(tmp_path / "t.npz", X=rows[:, :2], y=rows[:, 2], **split)
    found = regress(replace(QUICK, table=tmp_path / "t.npz", target=None, split=0))
    assert found.tested.numbers.tolist() == list(range(1, 21))
    assert found.tested.y is not None
    assert torch.equal(found.tested.y, torch.tensor(rows[:20, 2]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magic"}, "unknown method 'magic'; choose one of deep_ensemble, "),
        ({"level": 1.0}, "level of intervals must lie between 0 and 1, got 1"),
        ({"level": math.nan}, "level of intervals must lie between 0 and 1"),
        ({"members": 1}, "members must be at least 2, got 1"),
        ({"test": 0.0}, "share for test must lie between 0 and 1"),
        ({"noise": ()}, "noise must be one positive number or more"),
        ({"noise": (0.1, -1.0)}, "noise must be one positive number or more"),
        ({"weight_std": 0.0}, "weight_std must be positive"),
        ({"bias_std": -1.0}, "bias_std must be at least 0"),
        ({"learning_rate": math.inf}, "learning_rate must be positive"),
        ({"widths": (8, 0)}, "layers must be at least 1 wide"),
        ({"activation": "step"}, "unknown activation 'step'"),
        ({"target": "price"}, "has no column 'price'; it has 'a', 'b', 'y'"),
        ({"target": None}, "name the column of table.csv to predict"),
        ({"leave_out": ("c",)}, "has no column 'c'"),
        ({"leave_out": ("a", "b")}, "no column that varies"),
        ({"table": Path("absent.csv")}, "there is no file absent.csv"),
        ({"split": 0}, "has no published splits, got split 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(table, settings, words) -> None:
    with pytest.raises(InputError, match=words):
        regress(replace(QUICK, **{"table": table} | settings))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*rows_of(20), [1.0, "", 2.0]], "column 'b' has no value in line 22"),
        ([*rows_of(20), [1.0, "nan", 2.0]], "column 'b' has no value in line 22"),
        ([*rows_of(20), [1.0, "inf", 2.0]], "column 'b' must hold finite numbers, got 'inf' in line 22"),
        (rows_of(1), "has one row"),
        (rows_of(11), "has 11 rows; at least 12 are needed"),
        ([[a, b, 4.0] for a, b, _ in rows_of(20)], "the target 'y' is the same in all 12 training rows"),
    ],
    ids=["empty", "nan", "infinite", "one", "few", "constant"],
)
def test_tables_that_cannot_be_used(tmp_path, rows, words) -> None:
    path = written(tmp_path / "bad.csv", rows)
    with pytest.raises(InputError, match=words):
        regress(replace(QUICK, table=path))


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        ([[1.0, 2.0]], "a y", "new.csv has no column 'b'; it has 'a', 'y'"),
        ([], "a b", "new.csv has no rows"),
        ([[1.0, "many"]], "a b", "column 'b' must hold finite numbers, got 'many' in line 2"),
    ],
    ids=["column", "empty", "word"],
)
def test_new_rows_that_cannot_be_used(tmp_path, table, rows, header, words, monkeypatch) -> None:
    monkeypatch.setattr(regression_fit.Fitter, "best", lambda *_: pytest.fail("read before training"))
    new = written(tmp_path / "new.csv", rows, header)
    with pytest.raises(InputError, match=words):
        regress(replace(QUICK, table=table, predict=new))
