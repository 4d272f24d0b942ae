import math
from collections.abc import Iterator
from functools import cache

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor

from gramian.core.conditioning import information_gain
from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory import limits
from gramian.theory.duals import DUALS
from gramian.theory.maps import Activation, Dense, Map, Residual, Serial, Signal, signal
from gramian.theory.universality import (
    coefficients,
    kernel_rank,
    normalised,
    second_eigenvalue,
    verdict,
    zonal,
)

BRANCH = Serial(Activation(DUALS["relu"]), Dense(math.sqrt(2)))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Depth without run-time checks of shapes, which cost more than a layer; shallow tests keep them."""
    monkeypatch.setattr(jaxtyping, "jaxtyped", lambda **_: lambda function: function)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def network(rule: str, depth: int) -> Map:
    """Residual ReLU blocks; the scale, which overflows for unscaled ones, is no matter on the sphere."""
    gains = limits.RULES[rule].gains(depth)
    return lambda signal: limits.rescaled(BRANCH, gains, Dense(1.0)(signal))[0]


@cache
def expansion(rule: str, depth: int) -> Tensor:
    return coefficients(zonal(network(rule, depth)), 9)


def sphere(n: int, dimension: int = 3, seed: int = 0) -> Tensor:
    x = torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def on_points(rule: str, depth: int, x: Tensor) -> Signal:
    k = x @ x.T
    return limits.rescaled(BRANCH, limits.RULES[rule].gains(depth), Signal(Gram(k, k.diag(), k.diag()), k))[0]


# Coefficients


def test_coefficients_of_the_exponential_are_bessel_functions() -> None:
    got = coefficients(torch.exp, 8)
    k = np.arange(9)
    assert got.tolist() == pytest.approx(((2 * k + 1) * special.spherical_in(k, 1.0)).tolist(), abs=1e-13)
    assert coefficients(lambda c: (0.9 * c).exp(), 8).tolist() != pytest.approx(got.tolist(), abs=1e-3)


@pytest.mark.parametrize("dimension", [2, 3, 4, 7])
def test_coefficients_in_any_dimension(dimension: int) -> None:
    """Oracle: scipy's Gegenbauer (cosines on the circle) and adaptive quadrature."""
    order = (dimension - 2) / 2

    def polynomial(k: int, c: float) -> float:
        if dimension == 2:
            return math.cos(k * math.acos(c))
        return special.eval_gegenbauer(k, order, c) / special.eval_gegenbauer(k, order, 1.0)

    def integral(k: int, f: object) -> float:
        return integrate.quad(
            lambda t: f(math.cos(t)) * polynomial(k, math.cos(t)) * math.sin(t) ** (dimension - 2),  # type: ignore[operator]
            0,
            math.pi,
            epsabs=1e-12,
        )[0]

    def kernel(c: float) -> float:
        return math.exp(c) / (2 - c)

    expected = [integral(k, kernel) / integral(k, lambda c, k=k: polynomial(k, c)) for k in range(6)]
    got = coefficients(lambda c: c.exp() / (2 - c), 5, dimension)
    assert got.tolist() == pytest.approx(expected, abs=1e-10)
    total = coefficients(lambda c: c.exp() / (2 - c), 60, dimension).sum().item()
    assert total == pytest.approx(math.e, abs=1e-9)


def test_a_polynomial_has_no_other_coefficients() -> None:
    assert coefficients(torch.square, 4).tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0, 0], abs=1e-14)
    assert coefficients(lambda c: c, 0).shape == (1,)


TABLE = [
    ("none", 1, [0.187, 0.750, 0.0586, 0, 0.00293, 0, 5.95e-4]),
    ("none", 2, [0.319, 0.590, 0.0786, 6.46e-3, 3.81e-3, 8.36e-4, 7.82e-4]),
    ("uniform", 10, [0.268, 0.659, 0.0602, 6.76e-3, 2.96e-3, 9.75e-4, 5.83e-4]),
    ("uniform", 1000, [0.283, 0.644, 0.0601, 7.67e-3, 3.09e-3, 1.11e-3, 6.15e-4]),
    ("decreasing", 1000, [0.439, 0.453, 0.0867, 0.0114, 5.65e-3, 1.52e-3, 1.19e-3]),
    ("none", 100, [0.988, 2.41e-3, 1.87e-3, 1.41e-3, 1.09e-3, 8.59e-4, 6.88e-4]),
    ("none", 1000, [1.00, 5.11e-6, 5.05e-6, 4.79e-6, 4.55e-6, 4.32e-6, 4.11e-6]),
]


@pytest.mark.parametrize(("rule", "depth", "expected"), TABLE)
def test_coefficients_of_residual_kernels(
    rule: str, depth: int, expected: list[float], unchecked: None
) -> None:
    assert expansion(rule, depth)[:7].tolist() == pytest.approx(expected, rel=6e-3, abs=1e-12)


def test_zonal_kernels_are_the_kernels_of_points() -> None:
    x = sphere(5)
    for tangent in (False, True):
        out = Serial(Dense(1.0), *[Residual(BRANCH, 10**-0.5)] * 10)(signal(math.sqrt(3) * x))
        assert out.tangent is not None
        kernel = normalised(out.tangent if tangent else out.activation.cross).cross
        got = zonal(network("uniform", 10), tangent=tangent)((x @ x.T)[0])
        torch.testing.assert_close(got, kernel[0], rtol=1e-7, atol=1e-9)
    biased = Serial(Dense(1.0), Residual(Serial(Activation(DUALS["relu"]), Dense(1.0, 1.0))))
    c = torch.tensor([0.3], dtype=torch.float64)
    assert zonal(biased, 1.0)(c).item() != pytest.approx(
        zonal(biased, 4.0)(c).item(), abs=1e-3
    )  # norms count


# Verdicts


@pytest.mark.parametrize(
    ("rule", "depth", "kind"),
    [
        ("none", 1, "not universal"),
        ("none", 2, "universal"),
        ("uniform", 1000, "universal"),
        ("decreasing", 1000, "universal"),
        ("none", 1000, "collapsed"),
    ],
)
def test_verdicts(rule: str, depth: int, kind: str, unchecked: None) -> None:
    got = verdict(expansion(rule, depth))
    assert got.kind == kind
    if kind == "not universal":
        assert got.vanishing == (3, 5, 7, 9)
    else:
        assert got.vanishing == ()
    assert abs(got.nugget) < 0.01
    assert got.constant + got.varied + got.nugget == pytest.approx(1)


def test_gains_whose_squares_diverge_are_flagged(unchecked: None) -> None:
    gains = limits.power(0.25).gains(1000).tolist()
    slow = Serial(Dense(1.0), *(Residual(BRANCH, gain) for gain in gains))
    assert verdict(coefficients(zonal(slow), 6)).kind == "collapsed"
    assert verdict(expansion("decreasing", 1000)).kind == "universal"


def test_a_constant_plus_a_nugget_is_a_collapse(unchecked: None) -> None:
    """The unscaled tangent kernel: its smallest eigenvalue on a sample rises, which looks like health."""
    got = verdict(coefficients(zonal(network("none", 1000), tangent=True), 6))
    assert got.kind == "collapsed"
    assert (got.constant, got.nugget) == (pytest.approx(0.25, abs=0.01), pytest.approx(0.72, abs=0.01))
    stable = verdict(coefficients(zonal(network("uniform", 1000), tangent=True), 6))
    assert stable.kind == "universal"
    smallest = []
    for depth in (10, 100, 1000):
        tangent = on_points("none", depth, sphere(20)).tangent
        assert tangent is not None
        smallest.append(torch.linalg.eigvalsh(normalised(tangent).cross)[0].item())
    assert smallest[0] < smallest[1] < smallest[2] < 0.75


def test_bad_coefficients_are_refused() -> None:
    for bad in ([math.nan, 1.0], [0.0, 0.0], [1.0, math.inf]):
        with pytest.raises(InputError, match="finite with a positive sum"):
            verdict(torch.tensor(bad, dtype=torch.float64))
    for degree, dimension, order in ((-1, 3, 8), (3, 1, 8), (8, 3, 8)):
        with pytest.raises(InputError, match="coefficients need"):
            coefficients(torch.exp, degree, dimension, order)


# Finite samples


def test_second_eigenvalues_of_samples(unchecked: None) -> None:
    x = sphere(20)
    second = {
        rule: [
            second_eigenvalue(on_points(rule, depth, x).activation.cross).item() for depth in (10, 100, 1000)
        ]
        for rule in ("none", "uniform", "decreasing")
    }
    assert 0.03 < second["none"][0] < 0.2
    assert 3e-4 < second["none"][1] < 6e-3
    assert second["none"][2] < 1e-4
    for rule in ("uniform", "decreasing"):
        assert 0.1 < second[rule][2] < 0.4
        assert second[rule][2] == pytest.approx(second[rule][1], rel=0.1)
    ranks = [kernel_rank(on_points("none", depth, x).activation.cross).item() for depth in (10, 100, 1000)]
    assert ranks[0] > ranks[1] > ranks[2] > 1
    assert ranks[2] < 1.01
    assert kernel_rank(on_points("uniform", 1000, x).activation.cross).item() > 3


def test_second_eigenvalue_at_its_extremes() -> None:
    ones = torch.ones(4, 4, dtype=torch.float64)
    assert second_eigenvalue(ones).item() == pytest.approx(0, abs=1e-14)
    assert second_eigenvalue(torch.eye(4, dtype=torch.float64)).item() == pytest.approx(0.25)
    two = torch.block_diag(ones, 9 * ones)  # two directions, whatever their norms
    assert second_eigenvalue(two).item() == pytest.approx(0.5)
    assert kernel_rank(two).item() == pytest.approx(2)
    assert second_eigenvalue(torch.stack([two, torch.eye(8, dtype=torch.float64)])).shape == (2,)
    with pytest.raises(InputError, match="at least two inputs, got 1"):
        second_eigenvalue(torch.ones(1, 1))


def complexity(kernel: Tensor, targets: Tensor, noise: float) -> float:
    """KL of the posterior of Gaussian process regression from its prior, over the n values at the inputs."""
    n = len(kernel)
    inverse = torch.linalg.inv(kernel + noise * torch.eye(n, dtype=torch.float64))
    weights = inverse @ targets
    log_determinant = torch.linalg.slogdet(torch.eye(n, dtype=torch.float64) + kernel / noise).logabsdet
    return 0.5 * (log_determinant - (kernel @ inverse).trace() + weights @ kernel @ weights).item()


def test_complexity_of_regression_is_bounded_in_depth_for_stable_kernels_alone(unchecked: None) -> None:
    """KL of posterior from prior, 20 points, labels sign(x_1), noise 0.1."""
    x = sphere(20)
    targets = x[:, 0].sign()

    def at(rule: str, depth: int, *, raw: bool = True) -> float:
        out = on_points(rule, depth, x).activation.cross
        growth = limits.log_growth(limits.RULES[rule].gains(depth), 1.0)[-1].exp().item()
        kernel = out * growth if raw else normalised(out).cross
        got = information_gain(kernel, targets, 0.1).item()
        assert got == pytest.approx(complexity(kernel, targets, 0.1), rel=1e-6)
        return got

    uniform = [at("uniform", depth) for depth in (10, 100, 1000)]
    assert all(5 < value < 30 for value in uniform)
    assert abs(uniform[2] - uniform[1]) < 0.1 * abs(uniform[1] - uniform[0]) + 0.02
    decreasing = [at("decreasing", depth) for depth in (10, 100, 1000)]
    assert decreasing[0] < decreasing[1] < decreasing[2] < 2 * decreasing[0]
    slope = (at("none", 300) - at("none", 200)) / 100
    assert slope == pytest.approx(20 / 2 * math.log(2), rel=0.02)  # (n/2) ln(1 + s) a layer
    assert at("none", 1000, raw=False) < 0.5 * at("none", 10, raw=False)  # nothing can be fitted any more
