import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gramian.core.divergence import (
    bernoulli_kl,
    bernoulli_kl_of_logits,
    categorical_kl,
    categorical_kl_of_logits,
    gaussian_kl,
    kl_inverse_lower,
    kl_inverse_upper,
    spike_and_slab_kl,
)
from gramian.errors import InputError

INVERSES = {kl_inverse_upper: 1, kl_inverse_lower: -1}


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(400):
        yield


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def exact_kl(q: float, p: float | mpf) -> mpf:
    """Binary divergence to 400 digits."""
    q, p = mpf(q), mpf(p)
    kept = q * mpmath.log(q / p) if q else mpf(0)
    return kept + ((1 - q) * mpmath.log((1 - q) / (1 - p)) if q < 1 else 0)


def uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(n: int, seed: int) -> Tensor:
    """In the middle, close to 0 down to 1e-60, and close to 1."""
    u, kind = uniform(n, seed), torch.arange(n) % 3
    return torch.where(kind == 0, u, torch.where(kind == 1, 10 ** (-60 * u), 1 - 10 ** (-15 * u)))


def divergences(n: int, seed: int) -> Tensor:
    """From 1e-28 to 100 nats."""
    return 10 ** (30 * uniform(n, seed) - 28)


def midpoint_inverse(q: float, c: float) -> float:
    """Bisection to a relative 1e-5 that returns its last midpoint: what not to do."""
    low, high = q, 1 - 1e-12
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if bernoulli_kl(q, middle).item() > c else (middle, high)
    return (low + high) / 2


def test_values_of_the_binary_divergence():
    q, p = double(0, 0.1, 0.5, 1, 0.99, 1), double(0.9, 0.9, 0.9, 0.9, 0.9, 0.5)
    expected = [2.3026, 1.7578, 0.5108, 0.1054, 0.0713, 0.6931]
    assert bernoulli_kl(q, p).tolist() == pytest.approx(expected, abs=5e-5)
    assert bernoulli_kl(double(0, 1, 0.3), double(0, 1, 0.3)).tolist() == [0, 0, 0]
    assert bernoulli_kl(double(0, 1, 0.3, 0.3), double(1, 0, 0, 1)).tolist() == [math.inf] * 4
    assert bernoulli_kl(0.1, 0.9).item() == pytest.approx(float(exact_kl(0.1, 0.9)), rel=1e-14)


def test_the_binary_divergence_does_not_cancel():
    q = probabilities(900, 0)
    near = (q * (1 + 10 ** (-15 * uniform(900, 1)))).clamp(max=1)
    for p in (near, probabilities(900, 2)):
        got = bernoulli_kl(q, p)
        for a, b, value in zip(q.tolist(), p.tolist(), got.tolist(), strict=True):
            if b < 1 and a != b:
                assert abs(value / exact_kl(a, b) - 1) < 1e-14
    naive = torch.special.xlogy(q, q / near) + torch.special.xlogy(1 - q, (1 - q) / (1 - near))
    inside = (near < 1) & (near != q)
    error = (naive / bernoulli_kl(q, near) - 1)[inside].abs()
    assert error.max() > 1  # control: the plain formula loses everything


@pytest.mark.parametrize(("inverse", "side"), INVERSES.items(), ids=["upper", "lower"])
def test_inverse_is_on_the_safe_side_and_tight(inverse: Callable[..., Tensor], side: int):
    q, c = probabilities(1500, 3), divergences(1500, 4)
    tolerance = mpf(1e-12 if side > 0 else 1e-10)
    for a, nats, p in zip(q.tolist(), c.tolist(), inverse(q, c).tolist(), strict=True):
        assert p in (0, 1) or exact_kl(a, p) >= nats  # beyond the true inverse
        inner = mpf(p) * (1 - side * tolerance) if p else mpf(1e-300)
        assert side * (inner - a) <= 0 or exact_kl(a, inner) <= nats  # and hardly so


def test_a_bisection_that_returns_its_midpoint_is_below():
    q, c = uniform(200, 5), uniform(200, 6) * 0.2
    ours = kl_inverse_upper(q, c).tolist()
    pairs = list(zip(q.tolist(), c.tolist(), strict=True))
    below = [exact_kl(a, midpoint_inverse(a, nats)) < nats for a, nats in pairs]
    assert 0.3 < sum(below) / 200 < 0.7  # control
    assert not any(exact_kl(a, p) < nats for (a, nats), p in zip(pairs, ours, strict=True))


def test_inverse_undoes_the_divergence():
    q = probabilities(3000, 7)
    p = q + (1 - q) * probabilities(3000, 8)
    back = kl_inverse_upper(q, bernoulli_kl(q, p))
    assert (back >= p).all()
    assert (back - p).max() < 1e-12
    lower = q * uniform(3000, 9)
    back = kl_inverse_lower(q, bernoulli_kl(q, lower))
    assert (back <= lower).all()
    assert (lower - back).max() < 1e-12


def test_edges_of_the_inverse():
    c = double(0, 1e-300, 1e-30, 1e-5, 0.3, 5, 40, 1e308, math.inf)
    q = double(0, 1e-60, 0.3, 0.999, 1 - 2**-53, 1)
    upper, lower = (inverse(q[:, None], c) for inverse in INVERSES)
    assert (upper[-1] == 1).all()  # risk 1 is never certified as less
    assert (lower[0] == 0).all()
    assert upper[:, 0].tolist() == lower[:, 0].tolist() == q.tolist()
    assert upper[:, -1].tolist() == [1] * 6
    assert lower[:, -1].tolist() == [0] * 6
    torch.testing.assert_close(upper[0, 2:], -torch.expm1(-c[2:]), rtol=1e-13, atol=0)
    assert (upper[0] >= -torch.expm1(-c)).all()
    torch.testing.assert_close(lower[-1], (-c).exp(), rtol=1e-11, atol=0)
    assert (upper >= q[:, None]).all()
    assert (lower <= q[:, None]).all()
    assert kl_inverse_upper(torch.zeros(0), 1.0).shape == (0,)


@pytest.mark.parametrize("inverse", INVERSES, ids=["upper", "lower"])
def test_inverse_is_monotone(inverse: Callable[..., Tensor]):
    q = torch.cat((double(0, 1e-30, 1e-8), torch.linspace(0.001, 1, 300, dtype=torch.float64)))
    c = torch.cat((double(0), torch.logspace(-12, 3, 300, dtype=torch.float64)))
    values = inverse(q[:, None], c)
    rounding = 1e-12 * values
    assert (values.diff(dim=0) >= -rounding[1:]).all()
    assert (INVERSES[inverse] * values.diff(dim=1) >= -rounding[:, 1:]).all()


def test_lower_and_upper_are_mirror_images():
    q, c = uniform(200, 10), uniform(200, 11)
    torch.testing.assert_close(kl_inverse_lower(q, c), 1 - kl_inverse_upper(1 - q, c), rtol=0, atol=1e-13)


def test_batches_equal_loops_and_float32_is_widened():
    q, c = uniform(5, 12)[:, None], divergences(4, 13)
    values = kl_inverse_upper(q, c)
    for i in range(5):
        for j in range(4):
            one = kl_inverse_upper(q[i, 0].item(), c[j].item())
            torch.testing.assert_close(values[i, j], one, rtol=1e-14, atol=0)
    narrow = kl_inverse_upper(q.float(), c.float())
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, kl_inverse_upper(q.float().double(), c.float().double()))


@pytest.mark.parametrize("function", [*INVERSES, bernoulli_kl, bernoulli_kl_of_logits])
def test_slopes(function: Callable[..., Tensor]):
    inputs = (0.05 + 0.9 * uniform(12, 14)).requires_grad_(), (0.02 + 0.9 * uniform(12, 15)).requires_grad_()
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_implicit_slopes_of_the_inverse():
    q, c = double(0.02, 0.3).requires_grad_(), double(0.017, 0.4).requires_grad_()
    p = kl_inverse_upper(q, c)
    by_q, by_c = torch.autograd.grad(p.sum(), (q, c))
    slope = (1 - q) / (1 - p) - q / p
    torch.testing.assert_close(by_c, 1 / slope, rtol=1e-10, atol=0)
    gain = ((1 - q) / (1 - p)).log() - (q / p).log()
    torch.testing.assert_close(by_q, gain / slope, rtol=1e-10, atol=0)
    assert torch.func.grad(lambda x: kl_inverse_upper(x, 0.017))(q[0].detach()).item() == by_q[0].item()


@pytest.mark.parametrize("inverse", INVERSES, ids=["upper", "lower"])
def test_slopes_are_finite_at_the_edges(inverse: Callable[..., Tensor]):
    q = double(0, 0.3, 1)[:, None].requires_grad_()
    c = double(0, 1e-30, 1, math.inf).requires_grad_()
    for slope in torch.autograd.grad(inverse(q, c).sum(), (q, c)):
        assert slope.isfinite().all()
    logits = double(-800, 800).requires_grad_()  # masks that are certain must not make NaN
    bernoulli_kl(torch.sigmoid(logits), 0.3).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [0, 0]


def test_bernoulli_by_logits():
    s, prior = 6 * uniform(50, 16) - 3, 6 * uniform(50, 17) - 3
    got = bernoulli_kl_of_logits(s, prior)
    torch.testing.assert_close(got, bernoulli_kl(s.sigmoid(), prior.sigmoid()), rtol=1e-10, atol=1e-15)
    assert (got <= (s - prior).square() / 8).all()
    assert not (got <= (s - prior).square() / 16).all()  # control: the constant counts
    far = bernoulli_kl_of_logits(double(math.inf, -math.inf, 1e4, 40, -40), 2.0)
    kept, dropped = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert far.tolist() == pytest.approx([kept, dropped, kept, kept, dropped], rel=1e-13)
    # control: λ is 1 in float32 from 17 on, and the information is gone
    confident = bernoulli_kl_of_logits(double(30.0), 20.0)
    assert confident.item() == pytest.approx(
        float(exact_kl(1 / (1 + mpmath.exp(-30)), 1 / (1 + mpmath.exp(-20)))), rel=1e-6
    )
    assert bernoulli_kl(double(30.0).float().sigmoid(), double(20.0).float().sigmoid()).item() == 0


def test_gaussian_divergence_is_that_of_torch():
    mean, std, prior_mean = uniform(9, 18), 0.1 + uniform(9, 19), uniform(9, 20)
    got = gaussian_kl(mean, std, prior_mean, 0.7)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(prior_mean, double(0.7)))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    assert gaussian_kl(1.5, 1e-12, 1.5, 1.0).item() == pytest.approx(12 * math.log(10) - 0.5, rel=1e-12)
    assert gaussian_kl(0.3, 0.2, 0.3, 0.2).item() == 0


def test_categorical_divergence():
    q, p = (uniform(12, seed).view(3, 4) for seed in (21, 22))
    q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(categorical_kl(q, p), (q * (q / p).log()).sum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        categorical_kl_of_logits(q.log() + 3, p.log()), categorical_kl(q, p), rtol=1e-12, atol=1e-15
    )
    two = categorical_kl(double(0.2, 0.8), double(0.6, 0.4))
    assert two.item() == pytest.approx(bernoulli_kl(0.2, 0.6).item(), rel=1e-12)
    certain = categorical_kl(double(1, 0, 0, 0, 0, 0), torch.full((6,), 1 / 6, dtype=torch.float64))
    assert certain.item() == pytest.approx(math.log(6), rel=1e-12)  # one 2:4 pattern of six


def test_spike_and_slab_equals_monte_carlo():
    keep, prior_keep, mean, std, prior_mean, prior_std = 0.7, 0.4, 0.5, 0.3, 0.0, 0.6
    generator = torch.Generator().manual_seed(23)
    kept = torch.rand(400_000, generator=generator, dtype=torch.float64) < keep
    w = mean + std * torch.randn(400_000, generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal
    slab = normal(double(mean), double(std)).log_prob(w) - normal(double(prior_mean), prior_std).log_prob(w)
    spike = math.log((1 - keep) / (1 - prior_keep))
    samples = torch.where(kept, math.log(keep / prior_keep) + slab, spike)
    exact = spike_and_slab_kl(keep, prior_keep, mean, std, prior_mean, prior_std).item()
    error = samples.std().item() / len(samples) ** 0.5
    assert abs(samples.mean().item() - exact) < 4 * error
    without = bernoulli_kl(keep, prior_keep).item() + gaussian_kl(mean, std, prior_mean, prior_std).item()
    assert abs(samples.mean().item() - without) > 20 * error  # control: the slab counts with weight λ


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_inverse_upper(1.1, 0.1), "from 0 to 1"),
        (lambda: kl_inverse_upper(math.nan, 0.1), "from 0 to 1"),
        (lambda: kl_inverse_upper(0.1, -0.1), "at least 0"),
        (lambda: kl_inverse_lower(0.1, math.nan), "at least 0"),
        (lambda: bernoulli_kl(double(0.1, -0.1), 0.5), "from 0 to 1"),
        (lambda: bernoulli_kl_of_logits(0.0, math.inf), "clamp"),
        (lambda: bernoulli_kl_of_logits(math.nan, 0.0), "finite"),
        (lambda: gaussian_kl(0.0, 0.0, 0.0, 1.0), "above 0"),
        (lambda: gaussian_kl(0.0, 1.0, 0.0, math.inf), "above 0"),
        (lambda: categorical_kl(double(0.5, 0.6), double(0.5, 0.5)), "sum to 1"),
        (lambda: categorical_kl_of_logits(double(0, math.inf), double(0, 0)), "finite"),
    ],
)
def test_refusals(call: Callable[[], Tensor], message: str):
    with pytest.raises(InputError, match=message):
        call()
