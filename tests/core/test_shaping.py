"""Constants of shaped activations: their conditions by an independent quadrature, and published values."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch.nn import functional

from gramian.core.maximal import Maximal, plain, residual
from gramian.core.shaping import (
    STEEPEST_RELU,
    LocalMaps,
    Shaping,
    dks,
    dks_leaky_relu,
    dks_relu,
    leaky_relu_map,
    local_maps,
    tat,
    tat_leaky_relu,
)
from gramian.errors import InputError

Scalar = Callable[[float], float]


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def logistic(x: float) -> float:
    return float(special.expit(x))


SMOOTH: dict[str, tuple[Callable, Scalar, Scalar, Scalar]] = {
    "tanh": (
        torch.tanh,
        math.tanh,
        lambda x: 1 - math.tanh(x) ** 2,
        lambda x: -2 * math.tanh(x) * (1 - math.tanh(x) ** 2),
    ),
    "gelu": (
        functional.gelu,
        lambda x: x * special.ndtr(x),
        lambda x: special.ndtr(x) + x * density(x),
        lambda x: (2 - x * x) * density(x),
    ),
    "softplus": (
        functional.softplus,
        lambda x: float(np.logaddexp(0, x)),
        logistic,
        lambda x: logistic(x) * logistic(-x),
    ),
    "sin": (torch.sin, math.sin, math.cos, lambda x: -math.sin(x)),
}
"""A function as tensors, as numbers, and its first two derivatives in closed form."""


def mean(f: Scalar) -> float:
    value, _ = integrate.quad(lambda z: f(z) * density(z), -12, 12, epsabs=1e-13, epsrel=1e-12, limit=400)
    return value


def by_quadrature(name: str, shaping: Shaping) -> LocalMaps:
    """The local numbers from adaptive quadrature and derivatives in closed form."""
    _, phi, first, second = SMOOTH[name]
    a, b, d, g = vars(shaping).values()

    def f(z: float) -> float:
        return g * (phi(a * z + b) + d)

    def f1(z: float) -> float:
        return g * a * first(a * z + b)

    q = mean(lambda z: f(z) ** 2)
    return LocalMaps(
        q,
        mean(lambda z: f(z) * f1(z) * z),
        mean(f) ** 2 / q,
        mean(lambda z: f1(z) ** 2) / q,
        mean(lambda z: (g * a * a * second(a * z + b)) ** 2) / q,
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_local_numbers_of_a_function(name: str) -> None:
    shaping = Shaping(1.3, -0.4, 0.2, 0.7)
    found = local_maps(lambda x: shaping(SMOOTH[name][0], x))
    assert found == pytest.approx(by_quadrature(name, shaping), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("depth", [2, 36])
def test_dks_meets_its_four_conditions(name: str, depth: int) -> None:
    slope = 1.5 ** (1 / depth)
    q, q_slope, c_zero, c_slope, _ = by_quadrature(name, dks(SMOOTH[name][0], slope))
    assert (q, q_slope, c_zero, c_slope) == pytest.approx((1, 1, 0, slope), abs=1e-10)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("depth", [1, 36])
def test_tat_meets_its_four_conditions(name: str, depth: int) -> None:
    shaping = tat(SMOOTH[name][0], 0.3 / depth)
    q, q_slope, _, c_slope, c_curvature = by_quadrature(name, shaping)
    assert (q, q_slope, c_slope, c_curvature) == pytest.approx((1, 1, 1, 0.3 / depth), abs=1e-10)
    assert shaping.input_scale * shaping.output_scale < 2


def test_a_shift_in_the_wrong_place_breaks_the_conditions() -> None:
    """Control: with the shifts after the scales, γφ(α(x + β)) + δ, the conditions are far off."""
    right = tat(functional.gelu, 0.3 / 36)
    wrong = Shaping(
        right.input_scale,
        right.input_scale * right.input_shift,
        right.output_shift / right.output_scale,
        right.output_scale,
    )
    assert by_quadrature("gelu", right).q == pytest.approx(1, abs=1e-10)
    assert abs(by_quadrature("gelu", wrong).q - 1) > 0.1


GOLDEN = [  # Martens, DKS 2021 and TAT 2022: chain of 36 layers
    (dks, "tanh", 1.5 ** (1 / 36), (0.14346, 0.25597, -0.16145, 9.9602)),
    (dks, "none", 1.5 ** (1 / 36), (0.14358, 0.25669, -0.16197, 9.9437)),
    (tat, "tanh", 0.3 / 36, (0.09640, 0.32581, -0.20315, 13.7965)),
    (tat, "none", 0.3 / 36, (0.09650, 0.32666, -0.20379, 13.7713)),
]


@pytest.mark.parametrize(("rule", "approximate", "target", "expected"), GOLDEN)
def test_published_constants_of_gelu(
    rule: Callable, approximate: str, target: float, expected: tuple[float, ...]
) -> None:
    found = rule(lambda x: functional.gelu(x, approximate=approximate), target)
    assert tuple(vars(found).values()) == pytest.approx(expected, rel=6e-5)
    other = rule(
        lambda x: functional.gelu(x, approximate={"tanh": "none", "none": "tanh"}[approximate]), target
    )
    assert tuple(vars(other).values()) != pytest.approx(expected, rel=6e-5)


@pytest.mark.parametrize(("depth", "slope"), [(18, 0.1461), (36, 0.3511), (72, 0.5084), (108, 0.5840)])
def test_published_slopes_of_leaky_relu(depth: int, slope: float) -> None:
    assert tat_leaky_relu(0.9, plain(depth)) == pytest.approx(slope, abs=5e-5)


@pytest.mark.parametrize("maximal", [plain(14), plain(500), residual(60, 0.8)])
def test_leaky_relu_takes_orthogonal_inputs_to_the_target(maximal: Maximal) -> None:
    slope = tat_leaky_relu(0.9, maximal)
    assert maximal(leaky_relu_map(slope), 0.0) == pytest.approx(0.9, abs=1e-12)
    assert maximal(leaky_relu_map(0.0), 0.0) > 0.91  # control: ReLU itself goes further


@pytest.mark.parametrize(("depth", "reached"), [(4, "0.680"), (8, "0.834"), (12, "0.897")])
def test_a_shallow_chain_says_how_far_it_gets(depth: int, reached: str) -> None:
    with pytest.raises(InputError, match=rf"only {reached}\d*; lower eta or take more layers"):
        tat_leaky_relu(0.9, plain(depth))


def homogeneous(slope: float, c: float) -> float:
    """C map of a leaky ReLU as an integral over directions: (u, v) = r (cos θ, cos(θ − arccos c))."""
    angle = math.acos(c)

    def product(theta: float) -> float:
        u, v = math.cos(theta), math.cos(theta - angle)
        return max(u, slope * u) * max(v, slope * v)

    kinks = sorted(
        t % (2 * math.pi) for t in (math.pi / 2, -math.pi / 2, angle + math.pi / 2, angle - math.pi / 2)
    )
    value, _ = integrate.quad(product, 0, 2 * math.pi, points=kinks, epsabs=1e-13, limit=200)
    return value / math.pi * 2 / (1 + slope**2)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3511, 1.0])
def test_map_of_leaky_relu(slope: float) -> None:
    cosine = leaky_relu_map(slope)
    for c in (-1.0, -0.6, 0.0, 0.3, 0.99):
        assert cosine(c) == pytest.approx(homogeneous(slope, c), abs=1e-11)
    values = [cosine(c / 200) for c in range(201)]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert all(value >= c / 200 for c, value in enumerate(values))


@pytest.mark.parametrize("slope", [1.004, 1.14, 1.46, 1.4669, 1.467, 2.0])
def test_dks_of_relu_meets_three_conditions(slope: float) -> None:
    alpha, beta, delta, gamma = vars(dks_relu(slope)).values()
    assert beta == (1.0 if slope < math.pi / (math.pi - 1) else -1.0)
    preactivation = stats.norm(beta, alpha)
    first, second = (
        integrate.quad(lambda y, n=n: y**n * preactivation.pdf(y), 0, beta + 14 * alpha, epsabs=1e-13)[0]
        for n in (1, 2)
    )
    assert first + delta == pytest.approx(0, abs=1e-9)
    assert gamma**2 * (second + 2 * delta * first + delta**2) == pytest.approx(1, abs=1e-9)
    assert (gamma * alpha) ** 2 * preactivation.sf(0) == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("slope", [1.004, 1.14, STEEPEST_RELU])
def test_dks_of_leaky_relu_meets_four_conditions(slope: float) -> None:
    a, shaping = dks_leaky_relu(slope)
    d, g = shaping.output_shift, shaping.output_scale
    half = 1 / math.sqrt(2 * math.pi)  # E max(z, 0)
    first, second, weighted = (1 - a) * half, (1 + a * a) / 2, (1 + a * a) / 2 + d * (1 - a) * half
    assert first + d == pytest.approx(0, abs=1e-14)
    assert g * g * (second + 2 * d * first + d * d) == pytest.approx(1, abs=1e-13)
    assert g * g * weighted == pytest.approx(1, abs=1e-13)
    assert g * g * second == pytest.approx(slope, abs=1e-12)
    assert 0 <= a < 1


def test_dks_of_leaky_relu_has_a_steepest_slope() -> None:
    assert dks_leaky_relu(STEEPEST_RELU)[0] == pytest.approx(0, abs=1e-7)
    with pytest.raises(InputError, match=r"a slope of at most 1.46694, not 1.5; take a deeper network"):
        dks_leaky_relu(1.5)


def test_constants_follow_the_function_and_not_its_scale() -> None:
    """σ(x) = (1 + tanh(x/2))/2 gets the shaped function of tanh, though it is four times flatter."""
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    for rule, target in ((tat, 0.3 / 36), (dks, 1.5 ** (1 / 36))):
        expected = rule(torch.tanh, target)(torch.tanh, x)
        torch.testing.assert_close(rule(torch.sigmoid, target)(torch.sigmoid, x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_very_deep_chains(depth: int) -> None:
    shaping = tat(functional.silu, 0.3 / depth)
    maps = local_maps(lambda x: shaping(functional.silu, x))
    assert maps.q == pytest.approx(1, abs=1e-9)
    assert maps.c_curvature * depth == pytest.approx(0.3, rel=1e-4)
    assert shaping.input_shift == pytest.approx(0.4466, abs=1e-3)


@pytest.mark.parametrize(
    "function",
    [torch.relu, torch.abs, torch.sign, functional.hardtanh, functional.elu, lambda x: torch.tanh(200 * x)],
)
@pytest.mark.parametrize("solve", [lambda f: dks(f, 1.1), lambda f: tat(f, 0.1), local_maps])
def test_a_kink_is_refused(function: Callable, solve: Callable) -> None:
    with pytest.raises(InputError, match="has a kink, a jump or too sharp a bend"):
        solve(function)


@pytest.mark.parametrize("function", [torch.ones_like, lambda x: 3 * x + 1, torch.square])
def test_functions_that_cannot_be_shaped(function: Callable) -> None:
    for solve in (lambda f: dks(f, 1.1), lambda f: tat(f, 0.1)):
        with pytest.raises(InputError, match="no scales and shifts were found"):
            solve(function)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dks(torch.tanh, 1.0), "the slope of a layer must be above 1, not 1.0"),
        (lambda: dks_relu(0.5), "the slope of a layer must be above 1, not 0.5"),
        (lambda: dks_leaky_relu(math.nan), "the slope of a layer must be above 1, not nan"),
        (lambda: tat(torch.tanh, -0.1), "the curvature of a layer must be above 0, not -0.1"),
        (lambda: tat(torch.log, 0.1), "an elementwise function with finite values"),
        (lambda: local_maps(lambda x: x[:4]), "an elementwise function with finite values"),
        (lambda: tat_leaky_relu(1.0, plain(36)), "eta, .* lies between 0 and 1, not at 1.0"),
        (lambda: tat_leaky_relu(math.nan, plain(36)), "eta, .* lies between 0 and 1, not at nan"),
    ],
)
def test_bad_input_is_named(make: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_nothing_around_the_call_matters() -> None:
    """A model is often built on the meta device, in another default type or without gradients."""
    expected = pytest.approx(vars(tat(torch.tanh, 0.01)), rel=1e-9)
    with torch.device("meta"), torch.no_grad(), torch.inference_mode():
        assert vars(tat(torch.tanh, 0.01)) == expected
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert vars(tat(torch.tanh, 0.01)) == expected
    finally:
        torch.set_default_dtype(before)
