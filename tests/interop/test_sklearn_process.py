"""The Gaussian process as an estimator: its posterior and evidence in plain NumPy, and its joint draws."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.interop import sklearn as estimators
from gramian.interop.sklearn import BOUNDS, NTKGPRegressor

FIXED = {"optimise": False, "weight_std": 1.3, "bias_std": 0.4, "noise_variance": 0.2}


def problem(count: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of several scales, and a number that depends on them."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, 3)) * [1, 10, 0.1] + [0, 5, 2]
    return x, np.sin(2 * x[:, 0]) + 0.2 * x[:, 1] + 0.1 * draw.normal(size=count)


X, Y = problem()
NEW = problem(7, seed=1)[0]


def relu_kernels(
    a: np.ndarray, b: np.ndarray, depth: int, weight: float, bias: float
) -> dict[str, np.ndarray]:
    """The two kernels of a perceptron of infinite width, entry by entry."""
    nngp, ntk = np.zeros((2, len(a), len(b)))
    for i, u in enumerate(a):
        for j, v in enumerate(b):
            k, p, q = (weight**2 * np.dot(*pair) / len(u) + bias**2 for pair in ((u, v), (u, u), (v, v)))
            theta = k
            for _ in range(depth):
                norm = math.sqrt(p * q)
                angle = math.acos(max(-1.0, min(1.0, k / norm)))
                value = norm * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
                slope = (math.pi - angle) / (2 * math.pi)
                k, p, q = (weight**2 * moment + bias**2 for moment in (value, p / 2, q / 2))
                theta = k + weight**2 * slope * theta
            nngp[i, j], ntk[i, j] = k, theta
    return {"nngp": nngp, "ntk": ntk}


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
def test_the_process_equals_plain_numpy(kernel: str, depth: int, standardise: bool, monkeypatch) -> None:
    found = NTKGPRegressor(kernel=kernel, depth=depth, standardise=standardise, **FIXED).fit(X, Y)
    center, size = (X.mean(0), X.std(0)) if standardise else (0, 1)
    shift, scale = (Y.mean(), Y.std()) if standardise else (0, 1)
    x, new, y = (X - center) / size, (NEW - center) / size, (Y - shift) / scale
    of = partial(relu_kernels, depth=depth, weight=1.3, bias=0.4)
    train, cross, test = (of(*pair)[kernel] for pair in ((x, x), (new, x), (new, new)))
    jitter = 1e-8 * np.trace(train) / len(x)
    matrix = train + (0.2 + jitter) * np.eye(len(x))
    inverse = np.linalg.inv(matrix)
    mean = cross @ inverse @ y * scale + shift
    covariance = (test - cross @ inverse @ cross.T + 0.2 * np.eye(7)) * scale**2
    evidence = -0.5 * (y @ inverse @ y + np.linalg.slogdet(matrix)[1] + len(x) * math.log(2 * math.pi))
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)  # acos near 1 costs half the digits
    close(found.predict(NEW), mean)
    close(found.predict(NEW, return_cov=True)[0], mean)
    close(found.predict(NEW, return_cov=True)[1], covariance)
    close(found.predict(NEW, return_std=True)[1], np.sqrt(np.diag(covariance)))
    assert found.log_evidence_ == pytest.approx(evidence, abs=1e-5)
    assert found.jitter_ == pytest.approx(jitter, rel=1e-9)
    whole = found.predict(NEW, return_std=True)
    monkeypatch.setattr(estimators, "ROWS", 3)
    np.testing.assert_allclose(found.predict(NEW, return_std=True), whole, rtol=1e-10)
    other = NTKGPRegressor(
        kernel=kernel, depth=depth, standardise=standardise, **{**FIXED, "weight_std": 1.4}
    )
    assert np.abs(other.fit(X, Y).predict(NEW) - mean).max() > 1e-4  # control


def test_one_kind_of_doubt_at_a_time() -> None:
    found = NTKGPRegressor(**FIXED).fit(X, Y)
    with pytest.raises(InputError, match="not for both"):
        found.predict(NEW, return_std=True, return_cov=True)


NOISY = Y + np.random.default_rng(2).normal(size=len(Y))


def evidence(**settings: float) -> float:
    return NTKGPRegressor(optimise=False, depth=1, **settings).fit(X, NOISY).log_evidence_


def test_the_evidence_is_at_its_maximum() -> None:
    found = NTKGPRegressor(depth=1, restarts=0).fit(X, NOISY)
    chosen = {name: getattr(found, f"{name}_") for name in BOUNDS}
    assert found.log_evidence_ == pytest.approx(evidence(**chosen), abs=1e-9)
    assert found.log_evidence_ > evidence(weight_std=1.0, bias_std=0.3, noise_variance=0.1) + 0.5
    lost = {}
    for name in BOUNDS:
        moved = [evidence(**{**chosen, name: chosen[name] * factor}) for factor in (0.3, 0.9, 1 / 0.9, 3)]
        assert max(moved) < found.log_evidence_ + 1e-3
        lost[name] = found.log_evidence_ - max(moved[0], moved[3])
    assert min(lost["noise_variance"], lost["weight_std"]) > 0.1  # of the biases, small here, it knows little


def test_the_best_of_the_starts_is_taken_and_each_keeps_to_its_bounds(monkeypatch) -> None:
    limits = np.log(list(BOUNDS.values())).T
    chosen, starts = np.log([0.2, 0.5, 0.4]), []

    def minimised(cost, start, **options) -> SimpleNamespace:
        starts.append(start)
        return SimpleNamespace(fun=[2.0, 1.0, 3.0][len(starts) - 1], x=chosen + (len(starts) != 2))

    monkeypatch.setattr(estimators, "minimize", minimised)
    found = NTKGPRegressor(restarts=2, weight_std=99.0, noise_variance=0.0, random_state=0).fit(X, Y)
    assert [getattr(found, f"{name}_") for name in BOUNDS] == pytest.approx([0.2, 0.5, 0.4])
    assert all(((limits[0] <= start) & (start <= limits[1])).all() for start in starts)
    assert starts[0].tolist() == pytest.approx(np.log([1e-6, 10.0, 0.3]))
    assert len({tuple(start) for start in starts}) == 3


def test_the_evidence_of_some_rows() -> None:
    x, y = problem(40)
    some = NTKGPRegressor(depth=0, restarts=0, evidence_rows=15, random_state=3).fit(x, y)
    kept = np.random.RandomState(3).permutation(40)[:15]
    few = NTKGPRegressor(depth=0, restarts=0, random_state=3, standardise=False)
    few.fit(((x - x.mean(0)) / x.std(0))[kept], ((y - y.mean()) / y.std())[kept])
    assert some.noise_variance_ == pytest.approx(few.noise_variance_, rel=1e-2)
    whole = NTKGPRegressor(depth=0, restarts=0).fit(x, y)
    assert whole.log_evidence_ > some.log_evidence_ + 1e-3


def test_rows_that_repeat_need_noise_or_jitter() -> None:
    x, y = np.concatenate((X, X)), np.concatenate((Y, Y))
    exact = {**FIXED, "noise_variance": 0.0}
    found = NTKGPRegressor(**exact, jitter=1e-6).fit(x, y)
    assert found.jitter_ > 0
    np.testing.assert_allclose(found.predict(X), Y, atol=1e-3)
    assert found.predict(X, return_std=True)[1].max() < 1e-2 * Y.std()
    assert np.isfinite(found.sample_y(X)).all()
    with pytest.raises(InputError, match="raise the noise or the jitter"):
        NTKGPRegressor(**exact, jitter=0.0).fit(x, y)
    noisy = NTKGPRegressor(**FIXED, jitter=0.0).fit(x, y)
    assert noisy.jitter_ == 0
    np.testing.assert_allclose(  # two noisy copies are one with half the noise
        noisy.predict(NEW),
        NTKGPRegressor(**{**FIXED, "noise_variance": 0.1}, jitter=0.0).fit(X, Y).predict(NEW),
    )


def z_scores(draws: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """How far first and second moments of Gaussian draws (n, draws) are from what they should be."""
    count, diagonal = draws.shape[1], np.diag(covariance)
    first = (draws.mean(1) - mean) / np.sqrt(diagonal / count)
    away = draws - mean[:, None]
    spread = np.sqrt((np.outer(diagonal, diagonal) + covariance**2) / count)
    return np.concatenate((first, ((away @ away.T / count - covariance) / spread).ravel()))


def test_draws_of_the_process_are_joint() -> None:
    found = NTKGPRegressor(**FIXED).fit(X, Y)
    mean, covariance = found.predict(NEW, return_cov=True)
    draws = found.sample_y(NEW, 20_000)
    assert draws.shape == (7, 20_000)
    assert np.abs(z_scores(draws, mean, covariance)).max() < 4.5
    alone = np.concatenate([found.sample_y(row[None], 20_000, number) for number, row in enumerate(NEW)])
    assert np.abs(z_scores(alone, mean, covariance)).max() > 10  # control: row by row
    assert np.array_equal(found.sample_y(NEW, 2, 5), found.sample_y(NEW, 2, 5))
    assert not np.array_equal(found.sample_y(NEW, 2, 5), found.sample_y(NEW, 2, 6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "rbf"}, "unknown kernel 'rbf'; choose one of ntk, nngp"),
        ({"activation": "swoosh"}, "unknown activation 'swoosh'"),
        ({"depth": -1}, "depth must be finite and at least 0, got -1"),
        ({"weight_std": 0.0}, "weight_std must be positive and finite, got 0"),
        ({"weight_std": math.nan}, "weight_std must be positive and finite, got nan"),
        ({"bias_std": -1.0}, "bias_std must be finite and at least 0"),
        ({"noise_variance": -1.0}, "noise_variance must be finite and at least 0"),
        ({"jitter": math.inf}, "jitter must be finite and at least 0"),
        ({"restarts": -1}, "restarts must be finite and at least 0"),
        ({"evidence_rows": 1}, "evidence_rows must be finite and at least 2"),
    ],
)
def test_settings_of_the_process(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NTKGPRegressor(**settings).fit(X, Y)
