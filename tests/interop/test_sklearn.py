"""Estimators: scikit-learn's own checks, the ensembles by hand, and what users do with estimators."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from gramian.bayes.ensemble import METHODS, EnsembleConfig, fit_ensemble
from gramian.errors import InputError
from gramian.interop.sklearn import (
    NTKEnsemble,
    NTKEnsembleClassifier,
    NTKEnsembleRegressor,
    NTKGPRegressor,
)
from gramian.nn.mlp import mlp, prior_variances

SMALL = {"members": 2, "widths": (8,), "steps": 60, "learning_rate": 0.05, "random_state": 0}
FIXED = {"optimise": False, "weight_std": 1.3, "bias_std": 0.4, "noise_variance": 0.2}
REGRESSORS = [NTKGPRegressor(optimise=False, depth=1), NTKEnsembleRegressor(**SMALL)]
CLASSIFIER = NTKEnsembleClassifier(**SMALL)
ALL = [*REGRESSORS, CLASSIFIER]
NAMES = [type(each).__name__ for each in ALL]


def problem(count: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of several scales, and a number that depends on them."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, 3)) * [1, 10, 0.1] + [0, 5, 2]
    return x, np.sin(2 * x[:, 0]) + 0.2 * x[:, 1] + 0.1 * draw.normal(size=count)


def data_for(estimator: Any, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    x, y = problem(count)
    return x, np.where(y > np.median(y), "high", "low") if estimator is CLASSIFIER else y


X, Y = problem()
NEW = problem(7, seed=1)[0]


@parametrize_with_checks(ALL)
def test_scikit_learn_finds_nothing_wrong(estimator: Any, check: Any) -> None:
    check(estimator)


def test_biases_that_are_left_out_stay_out() -> None:
    found = NTKGPRegressor(bias_std=0.0, depth=0, restarts=1, random_state=0).fit(X, Y)
    assert found.bias_std_ == 0
    kept = NTKGPRegressor(bias_std=0.2, depth=0, restarts=0).fit(X, Y)
    assert kept.bias_std_ > 0
    none = NTKEnsembleRegressor(**SMALL, bias_std=0.0).fit(X, Y)
    assert [name for name in none.ensemble_.stack.f.parameters if "bias" in name] == []


@pytest.mark.parametrize("estimator", REGRESSORS, ids=NAMES[:2])
def test_units_do_not_matter(estimator: Any) -> None:
    one = clone(estimator).fit(X, Y)
    two = clone(estimator).fit(1e3 * X - 7, 1e-3 * Y + 5)
    mean, deviation = one.predict(NEW, return_std=True)
    other, spread = two.predict(1e3 * NEW - 7, return_std=True)
    np.testing.assert_allclose(1e3 * (other - 5), mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(1e3 * spread, deviation, rtol=1e-3)
    raw = clone(estimator).set_params(standardise=False).fit(X, Y)  # control
    moved = clone(estimator).set_params(standardise=False).fit(1e3 * X - 7, 1e-3 * Y + 5)
    assert np.abs(1e3 * (moved.predict(1e3 * NEW - 7) - 5) - raw.predict(NEW)).max() > 0.1


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_columns_that_are_constant_change_nothing_but_their_number(estimator: Any) -> None:
    x, y = data_for(estimator)
    wide = np.column_stack((x, np.full(len(x), 1e6), np.zeros(len(x))))
    found = clone(estimator).fit(wide, y)
    assert len(found.predict(wide)) == len(x)
    if isinstance(found, NTKGPRegressor):
        same = clone(found).set_params(weight_std=math.sqrt(5 / 3), depth=0).fit(wide, y)  # ⟨x, x'⟩/5
        plain = clone(found).set_params(weight_std=1.0, depth=0).fit(x, y)
        np.testing.assert_allclose(same.predict(wide), plain.predict(x), rtol=1e-6)


@pytest.mark.parametrize("estimator", REGRESSORS, ids=NAMES[:2])
def test_a_target_that_is_constant(estimator: Any) -> None:
    mean, deviation = clone(estimator).fit(X, np.full(len(X), 3.0)).predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, 3, atol=1.5)
    assert np.isfinite(deviation).all()


def test_draws_of_an_ensemble_are_of_its_members() -> None:
    found = NTKEnsembleRegressor(**{**SMALL, "members": 4}, noise_variance=0.05).fit(X, Y)
    mean, deviation = found.predict(NEW, return_std=True)
    draws = found.sample_y(NEW, 20_000)
    scale = Y.std()
    noise = 0.05 * scale**2
    mixture = (deviation**2 - noise) * 3 / 4 + noise  # the variance of four members, not of their law
    assert (np.abs(draws.mean(1) - mean) < 5 * np.sqrt(mixture / 20_000)).all()
    np.testing.assert_allclose(draws.var(1), mixture, rtol=0.06)
    members = found.ensemble_.functions(found.x_scale_(torch.from_numpy(NEW)))[..., 0].numpy() * scale
    np.testing.assert_allclose(
        np.cov(draws), np.cov(members, rowvar=False, ddof=0) + noise * np.eye(7), atol=0.05 * mixture.max()
    )
    assert np.array_equal(found.sample_y(NEW, 2, 5), found.sample_y(NEW, 2, 5))


@pytest.mark.parametrize("method", METHODS)
def test_the_ensemble_is_that_of_fit_ensemble(method: str) -> None:
    settings = {**SMALL, "method": method, "weight_std": 1.2, "bias_std": 0.2, "noise_variance": 0.05}
    found = NTKEnsembleRegressor(**settings, batch=8).fit(X, Y)
    make = partial(mlp, 3, 1, widths=(8,), weight_std=1.2, bias_std=0.2)
    config = EnsembleConfig(
        method=method, members=2, noise_variance=0.05, prior=prior_variances(make()), steps=60,
        learning_rate=0.05, batch=8, seed=int(np.random.RandomState(0).randint(2**31 - 1)),
    )  # fmt: skip
    x, y, new = ((a - b.mean(0)) / b.std(0) for a, b in ((X, X), (Y, Y), (NEW, X)))
    expected = fit_ensemble(make, torch.from_numpy(x), torch.from_numpy(y), config)
    values = expected.functions(torch.from_numpy(new))[..., 0].numpy() * Y.std() + Y.mean()
    mean, deviation = found.predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-7)
    spread = np.sqrt(values.var(0, ddof=1) + 0.05 * Y.var())
    np.testing.assert_allclose(deviation, spread, rtol=1e-7)
    other = NTKEnsembleRegressor(**settings, batch=None).fit(X, Y)  # control
    assert method == "ntkgp_lin" or np.abs(other.predict(NEW) - mean).max() > 1e-3


def deep(features: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, outputs))


@pytest.mark.parametrize("estimator", ALL[1:], ids=NAMES[1:])
def test_a_network_of_the_users_own(estimator: Any) -> None:
    x, y = data_for(estimator)
    state = torch.random.get_rng_state()
    found = clone(estimator).set_params(network=deep).fit(x, y)
    assert torch.equal(state, torch.random.get_rng_state())
    ensemble = found.ensemble_ if estimator is not CLASSIFIER else found.classifier_.ensemble
    assert "1.weight" in ensemble.trained.networks[0]
    assert clone(found).network is deep
    assert found.score(x, y) > 0.3


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_it_works_in_the_tools_of_scikit_learn(estimator: Any) -> None:
    x, y = data_for(estimator, 40)
    twice = [clone(estimator).fit(x, y).predict(NEW) for _ in range(2)]
    assert np.array_equal(*twice)
    draw = np.random.RandomState(0)
    pipeline = make_pipeline(StandardScaler(), PolynomialFeatures(2), clone(estimator))
    assert pipeline.fit(x, y).score(x, y) > 0.5
    assert cross_val_score(clone(estimator).set_params(random_state=draw), x, y, cv=2).shape == (2,)
    grid = {"noise_variance": [0.05, 100.0]}
    search = GridSearchCV(clone(estimator), grid, cv=2).fit(x, y)
    assert search.best_params_ == {"noise_variance": 0.05} or estimator is CLASSIFIER
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_arrays_of_any_kind(estimator: Any) -> None:
    x, y = data_for(estimator)
    expected = clone(estimator).fit(x, y).predict(NEW)
    for kind in (np.asfortranarray, lambda a: a[::-1].copy()[::-1], np.ndarray.tolist):
        assert np.array_equal(clone(estimator).fit(kind(x), y).predict(kind(NEW)), expected)
    whole = np.round(10 * x).astype(np.int32)
    same = clone(estimator).fit(whole, y).predict(whole)
    assert np.array_equal(same, clone(estimator).fit(whole.astype(np.float64), y).predict(whole))
    single = clone(estimator).fit(x.astype(np.float32), y).predict(NEW.astype(np.float32))
    assert single.dtype == expected.dtype
    turned = clone(estimator).fit(x[::-1], y[::-1]).predict(NEW[::-1])  # strides below 0
    assert turned.shape == expected.shape


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_named_columns(estimator: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    x, y = data_for(estimator)
    found = clone(estimator).fit(pyarrow.table(dict(zip("abc", x.T, strict=True))), y)
    assert found.feature_names_in_.tolist() == ["a", "b", "c"]
    other = pyarrow.table(dict(zip("bac", x.T, strict=True)))
    with pytest.raises(ValueError, match="feature names"):
        found.predict(other)
    with pytest.raises(ValueError, match=r"X has 4 features, but .* is expecting 3 features"):
        clone(estimator).fit(x, y).predict(np.ones((2, 4)))


@pytest.mark.parametrize("estimator", ALL, ids=NAMES)
def test_data_that_cannot_be_used(estimator: Any) -> None:
    x, y = data_for(estimator)
    bad, words = x.copy(), x.astype(object)
    bad[3, 1], words[3, 1] = math.nan, "red"
    for inputs, targets, message in (
        (x[:1], y[:1], "minimum of 2"),
        (x[:0], y[:0], "minimum of 2|0 sample"),
        (bad, y, "NaN"),
        (np.where(np.isnan(bad), math.inf, bad), y, "infinity"),
        (words, y, "could not convert string to float: 'red'"),
        (x, y[:-1], "inconsistent numbers of samples"),
        (x[:, 0], y, "Expected 2D array"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(estimator).fit(inputs, targets)
    found = clone(estimator).fit(x, y)
    with pytest.raises(ValueError, match="NaN"):
        found.predict(bad)
    with pytest.raises(NotFittedError):
        clone(estimator).predict(x)
    mixed = np.column_stack((words[:, :1].astype(str), np.resize(["red", "blue"], len(x))))
    pipeline = make_pipeline(OneHotEncoder(sparse_output=False, handle_unknown="ignore"), clone(estimator))
    assert len(pipeline.fit(mixed, y).predict(mixed)) == len(x)


@pytest.mark.parametrize("estimator", ALL[1:], ids=NAMES[1:])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": 1}, "at least 2 members"),
        ({"method": "swag"}, "unknown method 'swag'"),
        ({"activation": "swoosh"}, "swoosh"),
        ({"weight_std": 0.0}, "positive standard deviation"),
        ({"weight_std": -1.0}, "positive standard deviation"),
        ({"bias_std": -1.0}, "at least 0"),
        ({"noise_variance": 0.0}, "noise variance must be positive"),
        ({"steps": 0}, "needs a step"),
        ({"learning_rate": 0.0}, "positive learning rate"),
        ({"batch": 0}, "at least one row"),
        (
            {"network": lambda features, outputs: nn.Linear(features, outputs + 1)},
            r"needs 1 outputs|has 3 outputs, but there are 2",
        ),
    ],
)
def test_settings_of_an_ensemble(estimator: Any, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clone(estimator).set_params(**settings).fit(*data_for(estimator))


def test_settings_changed_after_training_change_no_prediction() -> None:
    for estimator in REGRESSORS:
        found = clone(estimator).fit(X, Y)
        before = found.predict(NEW, return_std=True)
        found.set_params(noise_variance=9.0, weight_std=5.0)
        assert np.array_equal(before, found.predict(NEW, return_std=True))
    with pytest.raises(TypeError, match="abstract"):
        NTKEnsemble()  # type: ignore[abstract]


def test_the_classifier() -> None:
    x, numbers = load_iris(return_X_y=True)
    y = np.array(["setosa", "versicolor", "virginica"])[numbers][::-1]
    found = clone(CLASSIFIER).set_params(steps=200).fit(x[::-1], y)
    assert found.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    probabilities = found.predict_proba(x[::-1])
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    assert np.array_equal(found.predict(x[::-1]), found.classes_[probabilities.argmax(1)])
    assert found.score(x[::-1], y) > 0.9
    assert 0.05 < found.classifier_.temperature < 1  # not at the end that fifteen right rows would ask for
    with pytest.raises(InputError, match="at least two classes are needed, but all rows are of class setosa"):
        clone(CLASSIFIER).fit(x[:9], ["setosa"] * 9)
    with pytest.raises(ValueError, match="Unknown label type"):
        clone(CLASSIFIER).fit(x, x[:, 0])


def test_a_classifier_of_few_rows() -> None:
    x, y = problem(6)[0], np.array([0, 1, 2, 0, 1, 0])
    found = clone(CLASSIFIER).fit(x, y)
    assert np.isfinite(np.log(found.predict_proba(x))).all()
    with pytest.raises(InputError, match="a class without one to train on"):
        clone(CLASSIFIER).fit(x[:3], y[:3])


def test_rows_far_away_are_doubted() -> None:
    x, y = problem(60)
    for estimator in (NTKGPRegressor(**FIXED), NTKEnsembleRegressor(**{**SMALL, "members": 5})):
        found = estimator.fit(x, y)
        near, far = (found.predict(rows, return_std=True)[1].mean() for rows in (x, x + 30 * x.std(0)))
        assert far > 3 * near
