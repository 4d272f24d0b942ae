import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

from gramian.core.gaussian import Dual
from gramian.errors import InputError
from gramian.nn import activations
from gramian.nn.tailored import deep_kernel_shaped, tailored
from gramian.theory.duals import DUALS, PiecewiseLinear, Series, dual
from reference import Case, cases, load

F64 = torch.float64
KINKED = {"relu": 0.0, "leaky_relu": 0.01, "abs": -1.0, "identity": 1.0, "steep": -2.5}
SMOOTH = [name for name in DUALS if name not in KINKED]
PAIRS = [(1.0, 1.0), (0.1, 0.1), (0.5, 8.0), (8.0, 8.0)]
CORRELATIONS = (-1, -0.9, -0.2, 0, 0.5, 0.97, 1)


def real(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def corner(slope: float) -> Dual:
    return PiecewiseLinear(slope)


def over_plane(f, g, k: float, a: float, b: float) -> float:
    """E[f(u)g(v)] by a fine grid over two independent Gaussians."""
    z = torch.arange(-9, 9, 0.025, dtype=F64)
    density = 0.025 * (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    u, v = math.sqrt(a) * z, k / math.sqrt(a) * z[:, None] + math.sqrt(max(b - k * k / a, 0)) * z
    return float((density * f(u)) @ g(v) @ density)


def over_angles(f, k: float, a: float, b: float) -> float:
    """E[f(u)f(v)] of a piecewise linear f: in polar coordinates the radius integrates to 2."""
    turn = math.acos(max(-1.0, min(1.0, k / math.sqrt(a * b))))

    def along(t: float) -> float:
        return float(f(math.cos(t)) * f(math.cos(t - turn))) / math.pi

    kinks = sorted(
        (t % (2 * math.pi)) for t in (math.pi / 2, -math.pi / 2, turn + math.pi / 2, turn - math.pi / 2)
    )
    edges = [0.0, *kinks, 2 * math.pi]
    parts = [integrate.quad(along, low, high)[0] for low, high in pairwise(edges)]
    return math.sqrt(a * b) * sum(parts)


def slope_of(f, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


@pytest.mark.parametrize("slope", KINKED.values(), ids=KINKED)
def test_piecewise_linear_equals_an_integral_over_angles(slope: float) -> None:
    kernel = corner(slope)
    for a, b in PAIRS:
        for c in CORRELATIONS:
            k = c * math.sqrt(a * b)
            values, slopes = (float(part) for part in kernel.both(*real(k, a, b)))
            truth = over_angles(lambda x: x if x > 0 else slope * x, k, a, b)
            assert values == pytest.approx(truth, rel=1e-12, abs=1e-14)
            same_side = 0.5 + math.asin(c) / math.pi  # P(uv > 0)
            truth = same_side * (1 + slope**2) / 2 + (1 - same_side) * slope
            assert slopes == pytest.approx(truth, rel=1e-7, abs=1e-8)  # k = c√(ab) is rounded


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_equal_an_integral_over_the_plane(name: str) -> None:
    kernel = DUALS[name]
    for a, b in PAIRS:
        for c in CORRELATIONS:
            k = c * math.sqrt(a * b)
            values, slopes = (float(part) for part in kernel.both(*real(k, a, b)))
            assert values == pytest.approx(
                over_plane(kernel.function, kernel.function, k, a, b), rel=1e-10, abs=1e-12
            )

            def slope(x: Tensor) -> Tensor:
                return slope_of(kernel.function, x)

            assert slopes == pytest.approx(over_plane(slope, slope, k, a, b), rel=1e-10, abs=1e-12)
    wrong = over_plane(kernel.function, kernel.function, 0.5 + 1e-7, 1, 1)  # control
    assert float(kernel.values(*real(0.5, 1, 1))) != pytest.approx(wrong, rel=1e-9)


@pytest.mark.parametrize("name", DUALS)
def test_duals_are_what_sampling_gives(name: str) -> None:
    z = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(5), dtype=F64)
    a, b, k = 0.8, 2.0, 0.7
    u = math.sqrt(a) * z[0]
    v = k / math.sqrt(a) * z[0] + math.sqrt(b - k * k / a) * z[1]
    kernel = DUALS[name]
    values, slopes = kernel.both(*real(k, a, b))
    for product, truth in (
        (kernel.function(u) * kernel.function(v), values),
        (slope_of(kernel.function, u) * slope_of(kernel.function, v), slopes),
        (kernel.function(v), kernel.mean(real(b)).squeeze()),
    ):
        error = product.std() / math.sqrt(len(product))
        assert abs(product.mean() - truth) <= 5 * error + 1e-12
    product = kernel.function(u) * kernel.function(v)
    off = kernel.values(*real(k + 0.1, a, b))  # control: another correlation is told apart
    assert abs(product.mean() - off) > 5 * product.std() / math.sqrt(len(product))


@pytest.mark.parametrize("name", DUALS)
def test_diagonal_readings(name: str) -> None:
    kernel, q = DUALS[name], real(0, 1e-12, 0.1, 1, 1.7, 3, 8)
    values, slopes = kernel.both(q, q, q)
    torch.testing.assert_close(kernel.variance(q), values, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(kernel.gain(q), slopes, rtol=1e-13, atol=1e-15)
    one_dimensional = Series(kernel.function)
    torch.testing.assert_close(kernel.variance(q), one_dimensional.variance(q), rtol=1e-12, atol=1e-15)
    positive = q[1:]  # a kink has no slope at 0
    torch.testing.assert_close(kernel.gain(positive), one_dimensional.gain(positive), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(kernel.mean(q), one_dimensional.mean(q), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", DUALS)
def test_the_diagonal_of_a_deep_fold_stays_a_gram(name: str) -> None:
    """Duplicates, opposites and a zero row; erf multiplies by 1.2 a layer what rounding puts above c = 1."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = torch.cat((x, x[:2], -x[:2], x[:1] * (1 + 1e-9), torch.zeros(1, 3, dtype=F64)))
    cross = x @ x.T / 3
    kernel = DUALS[name]
    for _ in range(200 if name in ("relu", "gelu", "erf") else 20):
        diagonal = cross.diagonal()
        cross = kernel.values(cross, diagonal[:, None], diagonal)
        cross = cross / kernel.variance(real(1.0))
    assert cross.isfinite().all()
    norms = cross.diagonal().sqrt()
    assert (cross.abs() <= (1 + 1e-12) * norms[:, None] * norms + 1e-300).all()
    torch.testing.assert_close(cross, cross.T, rtol=1e-11, atol=1e-14)
    assert cross[0, 5] == cross[0, 0]
    assert torch.linalg.eigvalsh(cross)[0] > -1e-11 * cross.diagonal().max()


def test_near_duplicates_keep_their_digits() -> None:
    for a in (1.0, 3.7, 0.013):
        for delta in (1e-6, 1e-9, 1e-12, 1e-14):
            k = a * (1 - delta)
            gap = float((Fraction(a) - Fraction(k)) / Fraction(a))  # 1 − c of the numbers given, exactly
            angle = 2 * math.asin(math.sqrt(gap / 2))
            slopes = DUALS["relu"].slopes(*real(k, a, a))
            assert float(0.5 - slopes) * 2 * math.pi == pytest.approx(angle, rel=1e-15 / angle)
    naive = torch.acos(real(3.7 * (1 - 1e-14)) / real(3.7).sqrt() ** 2)  # control: the usual form is off
    gap = float((Fraction(3.7) - Fraction(3.7 * (1 - 1e-14))) / Fraction(3.7))
    assert float(naive) != pytest.approx(2 * math.asin(math.sqrt(gap / 2)), rel=1e-3)


@pytest.mark.parametrize("name", DUALS)
def test_slopes_are_the_derivative_of_values(name: str) -> None:
    kernel = DUALS[name]
    k, a, b = (x.requires_grad_() for x in (real(0.3, -0.8), real(0.7, 1.3), real(2, 1)))
    assert torch.autograd.gradcheck(kernel.both, (k, a, b), atol=1e-7)
    (by_k,) = torch.autograd.grad(kernel.values(k, a, b).sum(), k)
    torch.testing.assert_close(by_k, kernel.slopes(k, a, b).detach(), rtol=1e-11, atol=1e-13)
    if name != "identity":
        assert not torch.allclose(by_k, kernel.slopes(k, a, 1.001 * b).detach(), rtol=1e-8, atol=0)  # control


@pytest.mark.parametrize("name", DUALS)
def test_gradients_are_finite_at_the_border(name: str) -> None:
    kernel = DUALS[name]
    start = real(2, -2, 0, 0, 0), real(2, 2, 0, 0, 1), real(2, 2, 0, 3, 0)
    k, a, b = (x.clone().requires_grad_() for x in start)
    values, slopes = kernel.both(k, a, b)
    grads = torch.autograd.grad(values.sum() + slopes.sum(), (k, a, b), retain_graph=True)
    assert all(grad.isfinite().all() for grad in (values, slopes, *grads))
    (by_k,) = torch.autograd.grad(values.sum(), k)
    torch.testing.assert_close(by_k, slopes.detach(), rtol=1e-12, atol=1e-13)
    q = real(0, 1).requires_grad_()
    for reading in (kernel.variance, kernel.gain, kernel.mean):
        assert reading(q).isfinite().all()
        if reading(q).requires_grad:
            assert torch.autograd.grad(reading(q).sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("name", ["relu", "gelu", "erf", "sin", "tanh"])
def test_shapes_broadcast_and_types_stay(name: str) -> None:
    kernel = DUALS[name]
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    cross, left = x @ x.mT, x.square().sum(-1)
    values, slopes = kernel.both(cross, left[..., :, None], left[..., None, :])
    one = kernel.both(cross[1, 0, 2], left[1, 0], left[1, 2])
    torch.testing.assert_close((values[1, 0, 2], slopes[1, 0, 2]), one, rtol=1e-13, atol=1e-15)
    narrow = kernel.both(*(part.float() for part in (cross, left[..., :, None], left[..., None, :])))
    assert [part.dtype for part in narrow] == [torch.float32] * 2
    torch.testing.assert_close(narrow[0].double(), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "gelu", "sin"])
def test_large_grams_equal_small_ones(name: str) -> None:
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    cross, norms = x @ x.T, (x @ x.T).diagonal()
    values, slopes = DUALS[name].both(cross, norms[:, None], norms)
    few = DUALS[name].both(cross[7:9], norms[7:9, None], norms)
    torch.testing.assert_close((values[7:9], slopes[7:9]), few, rtol=1e-14, atol=1e-14)


def test_modules_names_and_functions_find_their_dual() -> None:
    k, a, b = real(0.4), real(0.9), real(1.6)
    for module in (
        nn.ReLU(),
        nn.LeakyReLU(0.3),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
        nn.SiLU(),
        nn.Tanh(),
        nn.Softplus(),
        nn.Softplus(2.0),
        nn.Identity(),
        nn.ELU(),
        nn.Sigmoid(),
        activations.Erf(),
        activations.Sin(),
        activations.Abs(),
    ):
        found = dual(module)
        oracle = Series(module)
        torch.testing.assert_close(found.values(k, a, b), oracle.values(k, a, b), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.slopes(k, a, b), oracle.slopes(k, a, b), rtol=1e-5, atol=1e-9)
    for name, kernel in DUALS.items():
        assert dual(name) is kernel
        assert dual(kernel) is kernel
    assert dual(torch.relu) is DUALS["relu"]
    assert dual(nn.functional.gelu) is dual(nn.GELU()) is DUALS["gelu"]
    assert isinstance(dual(lambda x: x**3), Series)
    assert float(dual(nn.LeakyReLU(0.3)).gain(real(1.0))) == pytest.approx(1.09 / 2)
    assert float(dual(nn.LeakyReLU(0.2)).gain(real(1.0))) != pytest.approx(1.09 / 2)  # control


def test_tailored_activations_have_their_dual() -> None:
    one = real(1.0)
    leaky = dual(tailored(nn.ReLU, 36))
    assert isinstance(leaky, PiecewiseLinear)
    torch.testing.assert_close(leaky.variance(one), one, rtol=1e-12, atol=0)
    c = real(0.0)
    for _ in range(36):
        c = leaky.values(c, one, one)
    assert float(c) == pytest.approx(0.9, abs=1e-6)
    smooth = dual(tailored(nn.GELU, 36))
    assert isinstance(smooth, Series)
    torch.testing.assert_close(smooth.variance(one), one, rtol=1e-7, atol=0)
    torch.testing.assert_close(smooth.gain(one), one, rtol=1e-7, atol=0)
    shaped = dual(deep_kernel_shaped(nn.LeakyReLU, 36))
    torch.testing.assert_close(shaped.variance(one), one, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("rleu", "unknown activation 'rleu'; known are relu"),
        (nn.PReLU(), "PReLU has trainable parameters"),
        (nn.Linear(4, 4), "Linear has trainable parameters"),
        (nn.Softmax(-1), "Softmax is not a deterministic elementwise function"),
        (nn.GLU(), "GLU is not a deterministic elementwise function"),
        (nn.Dropout(0.5), "Dropout is not a deterministic elementwise function"),
        (lambda x: x.sum(-1), "not a deterministic elementwise function"),
        (lambda x: x.log(), "not a deterministic elementwise function"),
        (lambda x: x @ x, "cannot be applied"),
    ],
)
def test_what_has_no_dual_is_named(activation, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dual(activation)


def maps() -> list:
    return [case for case in cases("kernel_shaping") if case.id in ("absent", "local_maps")]


def named(name: str, case: Case) -> Dual:
    if name == "leaky_relu":
        return dual(nn.LeakyReLU(case.spec["config"]["leaky_relu_negative_slope"]))
    return DUALS[{"gelu_exact": "gelu"}.get(name, name)]


@pytest.mark.parity
@pytest.mark.parametrize("path", maps())
def test_local_maps_equal_reference(path: Path) -> None:
    case = load(path)
    arrays, tolerance = case.arrays, case.spec["suggested_test_tolerance"]["float64"]
    c, one = arrays["c_grid"], torch.ones(1, dtype=F64)
    for name in case.spec["config"]["activations"]:
        kernel = named(name, case)

        def equal(got: Tensor, array: str, name: str = name) -> None:
            torch.testing.assert_close(got, arrays[f"{array}_{name}"], **tolerance)

        q = arrays["q_grid"].clone().requires_grad_()
        equal(kernel.variance(q).detach(), "q_map")
        equal(torch.autograd.grad(kernel.variance(q).sum(), q)[0], "q_slope")
        norm = kernel.variance(one)
        values, slopes = kernel.both(c, one, one)
        equal(values / norm, "c_map")
        equal(slopes / norm, "c_slope")
        full = arrays[f"c_curv_{name}"].shape == c.shape
        inner = (c if full else arrays["c_grid_interior"]).clone().requires_grad_()
        equal(torch.autograd.grad(kernel.slopes(inner, one, one).sum(), inner)[0] / norm, "c_curv")
        a, b = arrays["q_pairs"][:, :1], arrays["q_pairs"][:, 1:]
        scale = (kernel.variance(a) * kernel.variance(b)).sqrt()
        equal(kernel.values(c * (a * b).sqrt(), a, b) / scale, "c_map_q_pairs")
        with pytest.raises(AssertionError):  # control
            equal(kernel.values(c, one, one * (1 + 1e-6)) / norm, "c_map")


@pytest.mark.parametrize("name", ["gelu", "erf"])
def test_large_variances_keep_to_numbers(name) -> None:
    """ab − k² rounds to less than −(1 + a + b) at variances like those of deep unscaled residual networks."""
    for exponent in (20, 60, 68, 100):
        q = torch.tensor(10.0**exponent, dtype=torch.float64)
        for share in (1.0, 1 - 1e-16, 1 - 1e-15, 0.999):
            values, slopes = DUALS[name].both(share * q, q, q * (1 + 1e-15))
            assert bool(values.isfinite() & slopes.isfinite())
            if name == "gelu":  # ReLU's from there on
                relu = torch.stack(DUALS["relu"].both(share * q, q, q))
                torch.testing.assert_close(torch.stack((values, slopes)), relu, rtol=1e-6, atol=0)
