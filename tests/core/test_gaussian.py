import math

import numpy as np
import pytest
import torch
from scipy.special import roots_hermitenorm
from torch import Tensor

from gramian.core.gaussian import (
    blocked,
    check_gram,
    derivative,
    expectation,
    gauss_hermite,
    gaussian_rule,
    pair_expectation,
)
from gramian.core.gram import Gram, gram
from gramian.errors import InputError

F64 = torch.float64


def real(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


def over_plane(f, g, k: float, a: float, b: float) -> float:
    """E[f(u)g(v)] by a fine grid over two independent Gaussians, through the Cholesky factor."""
    z = torch.arange(-9, 9, 0.03, dtype=F64)
    density = 0.03 * (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    u = math.sqrt(a) * z
    v = k / math.sqrt(a) * z[:, None] + math.sqrt(max(b - k * k / a, 0)) * z
    return float((density * f(u)) @ g(v) @ density)


@pytest.mark.parametrize("order", [1, 2, 7, 40, 200, 1000])
def test_gauss_hermite_integrates_polynomials(order: int) -> None:
    nodes, weights = gauss_hermite(order)
    moment = 1.0
    for power in range(0, min(2 * order, 40), 2):
        assert float(weights @ nodes**power) == pytest.approx(moment, rel=1e-12)
        assert abs(float(weights @ nodes ** (power + 1))) < 1e-12 * moment * (power + 1)
        moment *= power + 1
    if order < 20:  # control: one degree more and the rule is off
        assert float(weights @ nodes ** (2 * order)) != pytest.approx(moment, rel=1e-6)


@pytest.mark.parametrize("order", [3, 64, 140])
def test_gauss_hermite_is_that_of_scipy(order: int) -> None:
    nodes, weights = (x.numpy() for x in gauss_hermite(order))
    theirs, mass = roots_hermitenorm(order)
    np.testing.assert_allclose(nodes, theirs, rtol=0, atol=1e-13)
    np.testing.assert_allclose(weights, mass / mass.sum(), rtol=1e-10)


def test_rules_are_copies_in_the_type_asked_for() -> None:
    for rule in (gauss_hermite, gaussian_rule):
        rule(9)[0].zero_()
        assert rule(9)[0].abs().sum() > 1
        assert {x.dtype for x in rule(9, dtype=torch.float32)} == {torch.float32}
        with pytest.raises(InputError, match="at least 1, not 0"):
            rule(0)


def test_the_rule_keeps_kinks_jumps_and_steep_slopes_at_zero() -> None:
    nodes, weights = gaussian_rule()
    truths = {
        "smooth": (nodes.cos(), math.exp(-0.5)),
        "kink": (nodes.abs(), math.sqrt(2 / math.pi)),
        "jump": ((nodes > 0) * nodes.exp(), math.exp(0.5) * (1 + math.erf(math.sqrt(0.5))) / 2),
        "growth": (nodes**8, 105),
    }
    for values, truth in truths.values():
        assert float(weights @ values) == pytest.approx(truth, rel=1e-13)
    nodes, weights = gauss_hermite(512)
    assert float(weights @ nodes.abs()) != pytest.approx(math.sqrt(2 / math.pi), rel=1e-5)  # control


def test_expectation_of_one_variable() -> None:
    q = real(0, 0.1, 1, 8)
    torch.testing.assert_close(expectation(torch.cos, q), (-q / 2).exp(), rtol=1e-13, atol=0)
    torch.testing.assert_close(expectation(torch.abs, q), (2 * q / math.pi).sqrt(), rtol=1e-13, atol=0)
    many = torch.linspace(0, 2, 2**14 + 3, dtype=F64)[:, None]
    torch.testing.assert_close(expectation(torch.cos, many), (-many / 2).exp(), rtol=1e-13, atol=0)


def test_expectation_is_differentiable_also_at_zero_variance() -> None:
    q = real(0, 0.3, 2).requires_grad_()
    (first,) = torch.autograd.grad(expectation(torch.cos, q).sum(), q, create_graph=True)
    torch.testing.assert_close(first, -(-q / 2).exp() / 2, rtol=1e-12, atol=0)
    (second,) = torch.autograd.grad(first.sum(), q)
    torch.testing.assert_close(second[1:], (-q[1:] / 2).exp().detach() / 4, rtol=1e-10, atol=0)
    assert second.isfinite().all()


@pytest.mark.parametrize("f", [torch.tanh, silu, torch.sin], ids=lambda f: f.__name__)
def test_pair_expectation_equals_the_plane(f) -> None:
    for a, b in ((1, 1), (0.1, 0.1), (0.5, 8), (8, 8)):
        for c in (-1, -0.97, -0.3, 0, 0.6, 0.999, 1):
            k = c * math.sqrt(a * b)
            got = float(pair_expectation(f, f, *real(k, a, b)))
            assert got == pytest.approx(over_plane(f, f, k, a, b), rel=1e-10, abs=1e-13)
    mixed = float(pair_expectation(f, torch.cos, *real(0.4, 0.5, 3)))
    assert mixed == pytest.approx(over_plane(f, torch.cos, 0.4, 0.5, 3), rel=1e-11, abs=1e-13)
    got = float(pair_expectation(f, f, *real(0.6, 1, 1)))
    assert got != pytest.approx(over_plane(f, f, 0.6 + 1e-8, 1, 1), rel=1e-10)  # control


def test_the_long_sum_equals_the_short_one() -> None:
    a, b = torch.linspace(0.2, 3, 70, dtype=F64)[:, None], torch.linspace(0.1, 2, 90, dtype=F64)
    k = torch.linspace(-1, 1, 90, dtype=F64) * (a * b).sqrt()
    whole = pair_expectation(silu, silu, k, a, b)
    rows = [pair_expectation(silu, silu, k[i], a[i], b) for i in range(70)]
    torch.testing.assert_close(whole, torch.stack(rows), rtol=1e-13, atol=1e-15)
    spread = [x.expand(3, 70, 90) for x in (k, a, b)]  # more variances than are held at once
    torch.testing.assert_close(pair_expectation(silu, silu, *spread)[2], whole, rtol=1e-13, atol=1e-15)


def test_pair_expectation_keeps_kinked_functions_exact_on_the_diagonal() -> None:
    q = real(0.1, 1, 8, 100)
    for sign in (1, -1):
        got = pair_expectation(torch.relu, torch.relu, sign * q, q, q)
        torch.testing.assert_close(got, q / 2 if sign > 0 else 0 * q, rtol=1e-13, atol=1e-13)
    step = derivative(torch.relu)
    got = pair_expectation(step, step, q, q, q)
    torch.testing.assert_close(got, torch.full_like(q, 0.5), rtol=1e-13, atol=0)
    c = torch.linspace(-0.97, 0.97, 41, dtype=F64)
    truth = 0.25 + c.asin() / (2 * math.pi)
    one = torch.ones_like(c)
    torch.testing.assert_close(pair_expectation(step, step, c, one, one), truth, rtol=0, atol=1e-13)
    near = pair_expectation(step, step, *real(0.9999, 1, 1))
    assert abs(float(near) - 0.25 - math.asin(0.9999) / (2 * math.pi)) > 1e-6  # as the docstring warns


def test_pair_expectation_is_a_gram() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    own = gram(torch.cat((x, x[:5], -x[:5], 1e-9 + x[:5])))
    for f in (torch.tanh, torch.relu, derivative(torch.relu)):
        kernel = pair_expectation(f, f, own.cross, own.left[:, None], own.right)
        assert torch.linalg.eigvalsh(kernel)[0] > -1e-13


@pytest.mark.parametrize("f", [torch.tanh, silu], ids=lambda f: f.__name__)
def test_gradients_of_a_pair(f) -> None:
    k, a, b = (x.requires_grad_() for x in (real(0.3, -0.5), real(0.7, 1.2), real(2, 0.5)))

    def pair(k: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return pair_expectation(f, f, k, a, b)

    assert torch.autograd.gradcheck(pair, (k, a, b), atol=1e-8)
    assert torch.autograd.gradgradcheck(pair, (k, a, b), atol=1e-6)


def test_gradients_at_the_border_are_finite_and_right() -> None:
    k, a, b = (x.requires_grad_() for x in (real(1, -1, 0, 0), real(1, 1, 0, 0), real(1, 1, 2, 0)))
    pair_expectation(torch.sin, torch.sin, k, a, b).sum().backward()
    half = ((a + b) / 2).detach()
    torch.testing.assert_close(k.grad, torch.cosh(k.detach()) * (-half).exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(a.grad, -torch.sinh(k.detach()) * (-half).exp() / 2, rtol=1e-11, atol=1e-13)


def test_a_kink_does_not_spoil_the_gradient_in_the_variance() -> None:
    k, a, b = (x.requires_grad_() for x in (real(0.3), real(0.7), real(2)))
    pair_expectation(torch.relu, torch.relu, k, a, b).sum().backward()
    truth = math.sqrt(1.4 - 0.09) / (4 * math.pi * 0.7)
    assert a.grad is not None
    assert float(a.grad) == pytest.approx(truth, rel=1e-6)  # E[φ''φ]/2 by autograd would give 0


def test_expectations_within_inference_mode_do_not_spoil_later_ones() -> None:
    with torch.inference_mode():
        q = real(1.234)
        inside = pair_expectation(derivative(torch.tanh), derivative(torch.tanh), q, q, q)
        rule = gaussian_rule(77)[0]
    assert not gaussian_rule(77)[0].is_inference()
    assert rule.shape == (154,)
    q = real(1.234).requires_grad_()
    outside = pair_expectation(derivative(torch.tanh), derivative(torch.tanh), q, q, q)
    outside.sum().backward()
    assert torch.equal(inside, outside.detach())


def test_derivatives_can_be_taken_again() -> None:
    x = torch.linspace(-2, 2, 9, dtype=F64)
    third = derivative(derivative(derivative(torch.sin)))
    torch.testing.assert_close(third(x), -x.cos(), rtol=1e-13, atol=1e-15)
    constant = derivative(derivative(lambda x: 3 * x))
    torch.testing.assert_close(constant(x), torch.zeros_like(x))
    assert not derivative(torch.sin)(x).requires_grad


def test_blocks_equal_the_whole() -> None:
    def compute(k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return k + a * b, k - a + b

    k, a, b = (torch.rand(shape, dtype=F64) for shape in ((3, 50, 41), (50, 1), (3, 1, 41)))
    for size in (40, 500, 5000, 10**6):
        for got, whole in zip(blocked(compute, k, a, b, size=size), compute(k, a, b), strict=True):
            assert torch.equal(got, whole)


def test_a_gram_is_accepted_and_what_is_none_is_named() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    for good in (
        gram(x),
        gram(x, x[:3]),
        gram(torch.zeros_like(x)),
        gram(torch.cat((x, x))),
        gram(x.float()),
    ):
        assert check_gram(good) is good
    one = real(1, 1)

    def square(off: float) -> Tensor:
        return torch.tensor([[1, off], [off, 1]], dtype=F64)

    assert check_gram(Gram(square(1 + 1e-15), one, one))
    for bad, message in (
        (Gram(square(torch.nan), one, one), "NaN"),
        (Gram(square(0.5), real(1, torch.inf), one), "infinity"),
        (Gram(square(0.5), real(1, -0.25), one), r"at least 0, but this Gram has -0\.25"),
        (Gram(square(1.001), one, one), r"within \[-1, 1\].*1\.001"),
    ):
        with pytest.raises(InputError, match=message):
            check_gram(bad)
    cross = torch.full((3, 3), -0.9, dtype=F64).fill_diagonal_(1)
    with pytest.raises(InputError, match=r"negative eigenvalue, but this has -0\.8"):
        check_gram(Gram(cross, real(1, 1, 1), real(1, 1, 1)))
    assert check_gram(Gram(cross, real(1, 1, 1), real(1, 2, 1)))  # two sets of rows need no eigenvalues
