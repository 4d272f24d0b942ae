import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from scipy.stats import beta, binom
from torch import Tensor
from torch.autograd import gradcheck

from gramian.bayes.bounds import (
    BOUNDS,
    bernstein_risk_bound,
    best_lambda,
    binomial_bound,
    catoni_bound,
    chernoff_bound,
    classic_bound,
    complexity,
    finite_union,
    grid_union,
    grid_value,
    kl_bound,
    lambda_bound,
    quadratic_bound,
    sampled_risk_bound,
)
from gramian.core.divergence import kl_inverse_upper
from gramian.errors import InputError

RISK, KL, N, DELTA = 0.02, 500.0, 30_000, 0.025


def uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values():
    c = complexity(KL, N, DELTA)
    assert c.item() == pytest.approx(0.01698455, abs=5e-9)
    expected = {"kl": 0.057311, "quadratic": 0.068095, "classic": 0.112154, "lambda": 0.068095}
    for name, value in expected.items():
        assert BOUNDS[name](RISK, KL, N, DELTA).item() == pytest.approx(value, abs=5e-7)
    assert best_lambda(RISK, c).item() == pytest.approx(0.70629, abs=5e-6)
    assert catoni_bound(RISK, KL, N, DELTA, [1.086]).item() == pytest.approx(0.057028, abs=5e-7)
    # a hundred constants with the best among them
    hundred = [0.0109 * k for k in range(1, 101)]
    assert catoni_bound(RISK, KL, N, DELTA, hundred).item() == pytest.approx(0.057251, abs=5e-7)
    assert catoni_bound(RISK, KL, N, DELTA).item() == pytest.approx(0.057251, abs=5e-5)
    assert kl_bound(RISK, 0, N, DELTA).item() == pytest.approx(0.023736, abs=5e-7)
    assert kl_bound(0.0, 0, N, DELTA).item() == pytest.approx(3.17833e-4, abs=5e-10)
    assert chernoff_bound(RISK, N, DELTA).item() == pytest.approx(0.022275, abs=5e-7)
    assert binomial_bound(600, N, DELTA) == pytest.approx(0.021648, abs=5e-7)


def test_values_with_sampled_risk():
    for draws, risk, value in ((150_000, 0.0212, 0.05920), (1000, 0.0379, 0.08389)):
        above = sampled_risk_bound(RISK, draws, 0.01, sides=2)
        assert above.item() == pytest.approx(risk, abs=5e-5)
        assert kl_bound(above, KL, N, DELTA).item() == pytest.approx(value, abs=5e-6)
        assert sampled_risk_bound(RISK, draws, 0.01) < above  # one side is enough for an upper bound


def test_bernstein_bound_by_hand_and_against_kl():
    nats = math.log(200)
    by_hand = 0.02 + (2 * 1e-4 * nats / 5000) ** 0.5 + 7 * nats / (3 * 4999)
    assert bernstein_risk_bound(0.02, 1e-4, 5000, 0.01).item() == pytest.approx(by_hand, rel=1e-14)
    assert bernstein_risk_bound(0.9, 0.1, 2, 0.01) == 1
    grid = torch.linspace(0, 0.4, 50, dtype=torch.float64)
    assert (bernstein_risk_bound(0.1, grid, 1000, 0.05).diff() > 0).all()
    assert (bernstein_risk_bound(grid, 0.01, 1000, 0.05).diff() > 0).all()
    for risk in (0.01, 0.02, 0.05):  # draws that hardly differ, and draws that differ as much as they can
        few, many = round(5 / risk), round(20 / risk)
        assert bernstein_risk_bound(risk, 1e-8, many, 0.01) < sampled_risk_bound(risk, many, 0.01)
        assert bernstein_risk_bound(risk, 1e-8, few, 0.01) > sampled_risk_bound(risk, few, 0.01)
        for draws in (few, many, 10**6):
            most = risk * (1 - risk) * draws / (draws - 1)
            assert bernstein_risk_bound(risk, most, draws, 0.01) > sampled_risk_bound(risk, draws, 0.01)
            assert bernstein_risk_bound(0.0, 0.0, draws, 0.01) > sampled_risk_bound(0.0, draws, 0.01)


def test_bernstein_bound_fails_at_most_as_often_as_said():
    """Exactly, for risks of 0 or 1, by the binomial law of their sum."""
    chances = torch.linspace(0, 1, 401, dtype=torch.float64)
    for draws, delta in ((10, 0.05), (40, 0.1), (200, 0.05)):
        law = torch.as_tensor(binom.pmf(torch.arange(draws + 1)[:, None], draws, chances))
        mean = torch.arange(draws + 1, dtype=torch.float64) / draws
        variance = mean * (1 - mean) * draws / (draws - 1)
        root = (2 * variance * math.log(2 / delta) / draws).sqrt()
        bounds = {
            "bernstein": bernstein_risk_bound(mean, variance, draws, delta),
            "without the last term": mean + root,
            "with 1 for its 7": mean + root + math.log(2 / delta) / (3 * draws),  # of a known variance
        }
        worst = {name: float((law * (b[:, None] < chances)).sum(0).max()) for name, b in bounds.items()}
        assert worst["bernstein"] <= delta
        assert worst["without the last term"] > 0.5  # control: rare events leave no variance
        assert worst["with 1 for its 7"] > 2 * delta  # control


def test_bounds_by_draws_fail_at_most_as_often_as_said():
    """Counted over 4000 laws of risks: a + (b − a) Bin(J, q)/J, constant to 0 or 1, rare to even."""
    generator, count, draws, delta = torch.Generator().manual_seed(6), 4000, 200, 0.2
    low, span, rate = (torch.rand(count, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    low, chance = low * (1 - span), 0.5 * 10 ** (-4 * rate)
    trials = torch.tensor([1.0, 3, 30, 1000], dtype=torch.float64).repeat(count // 4)[:, None]
    low[::8], span[::8] = 0.0, 1.0  # risks of 0 and 1
    risks = torch.binomial(trials.repeat(1, draws), chance.repeat(1, draws), generator=generator) / trials
    risks, risk = low + span * risks, (low + span * chance)[:, 0]
    mean, variance = risks.mean(1), risks.var(1)

    def above(share: float) -> tuple[Tensor, Tensor]:
        return sampled_risk_bound(mean, draws, share), bernstein_risk_bound(mean, variance, draws, share)

    def wrong(bound: Tensor) -> float:
        return float((bound < risk).double().mean())

    kl, bernstein = above(delta)
    smaller = torch.minimum(*above(delta / 2))
    assert max(map(wrong, (kl, bernstein, smaller))) <= delta
    assert wrong(kl) > 0
    assert 0.1 * count < (bernstein < kl).sum() < 0.9 * count
    assert wrong(mean - 1e-12) > delta  # controls: no bound at all, and rare events without the last term
    rare = (trials[:, 0] == 1) & (chance[:, 0] < 1 / draws)
    blind = mean + (2 * variance * math.log(2 / delta) / draws).sqrt()
    assert (blind < risk)[rare].double().mean() > 2 * delta
    assert (bernstein < risk)[rare].double().mean() <= delta


def test_order_of_the_bounds():
    risk, kl = uniform(3000, 0), 3000 * uniform(3000, 1)
    tight, quadratic, classic = (f(risk, kl, 2000, 0.05) for f in (kl_bound, quadratic_bound, classic_bound))
    assert (tight <= torch.minimum(quadratic, classic)).all()
    small = quadratic <= 0.25
    assert 0 < int(small.sum()) < 3000
    assert ((quadratic <= classic) == small).all()
    alone = kl_bound(risk, 0, 2000, 0.05)
    assert (chernoff_bound(risk, 2000, 0.05) <= alone).all()
    assert (alone <= tight).all()
    assert not (chernoff_bound(risk, 200, 0.05) <= alone).all()  # control: of a smaller test set


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_bounds_are_monotone(bound: Callable[..., Tensor]):
    grid = torch.linspace(0, 1, 200, dtype=torch.float64)
    assert (bound(grid, 50.0, 1000, 0.05).diff() >= 0).all()
    assert (bound(0.1, 300 * grid, 1000, 0.05).diff() > 0).all()
    assert bound(0.1, 50.0, 1000, 0.01) > bound(0.1, 50.0, 1000, 0.05)
    assert bound(0.1, 50.0, 2000, 0.05) < bound(0.1, 50.0, 1000, 0.05)


def test_the_quadratic_bound_is_the_smallest_lambda_bound():
    risk, kl = uniform(50, 2), 500 * uniform(50, 3)
    quadratic = quadratic_bound(risk, kl, 2000, 0.05)
    torch.testing.assert_close(lambda_bound(risk, kl, 2000, 0.05), quadratic, rtol=1e-12, atol=0)
    weights = torch.linspace(0.001, 1.999, 4001, dtype=torch.float64)[:, None]
    every = lambda_bound(risk, kl, 2000, 0.05, weights)
    assert (every >= quadratic * (1 - 1e-12)).all()
    torch.testing.assert_close(every.amin(0), quadratic, rtol=1e-5, atol=0)
    c = complexity(kl, 2000, 0.05)
    assert (weights[every.argmin(0), 0] - best_lambda(risk, c)).abs().max() < 1e-3


def test_catoni_with_lambda_and_the_linear_relaxation():
    risk, kl, n, constant = 0.1, 80.0, 2000, 0.6
    exact = catoni_bound(risk, kl, n, 0.05, [constant]).item()
    cost = (kl + math.log(1 / 0.05)) / n
    relaxed = (constant * risk + cost) / -math.expm1(-constant)
    assert exact < relaxed
    assert exact == pytest.approx(-math.expm1(-(constant * risk + cost)) / -math.expm1(-constant), rel=1e-12)
    alone = catoni_bound(risk, kl, n, 0.05, [constant]).item()
    pair = catoni_bound(risk, kl, n, 0.05, [constant, constant]).item()
    assert pair > alone  # control: trying is paid for, even the same


@pytest.mark.parametrize("name", BOUNDS)
def test_slopes_as_objectives(name: str):
    risk, kl = (0.02 + 0.5 * uniform(6, 4)).requires_grad_(), (10 + 200 * uniform(6, 5)).requires_grad_()

    def objective(r: Tensor, k: Tensor) -> Tensor:
        if name == "lambda":  # λ is held still while the others move
            weight = best_lambda(risk.detach(), complexity(kl.detach(), 1000, 0.05))
            return lambda_bound(r, k, 1000, 0.05, weight)
        return BOUNDS[name](r, k, 1000, 0.05)

    assert gradcheck(objective, (risk, kl))


def test_slopes_of_lambda_at_its_minimum_are_those_of_the_quadratic_bound():
    risk, kl = (0.02 + 0.5 * uniform(6, 4)).requires_grad_(), (10 + 200 * uniform(6, 5)).requires_grad_()
    slopes = [
        torch.autograd.grad(BOUNDS[b](risk, kl, 1000, 0.05).sum(), (risk, kl))
        for b in ("lambda", "quadratic")
    ]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=0)
    off = torch.autograd.grad(lambda_bound(risk, kl, 1000, 0.05, 0.3).sum(), (risk, kl))
    assert not torch.allclose(off[0], slopes[1][0], rtol=1e-3)  # control: elsewhere they are not


def test_training_on_a_bound_lowers_it():
    """A posterior over five hypotheses, all of the trade-off between risk and KL in closed form."""
    errors = torch.tensor([0.05, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    prior = torch.full((5,), 0.2, dtype=torch.float64)
    values = {}
    for name in ("kl", "quadratic", "lambda"):
        logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([logits], lr=0.05)
        for _ in range(150):
            q = logits.softmax(-1)
            objective = BOUNDS[name](q @ errors, (q * (q / prior).log()).sum(), 200, 0.05)
            optimiser.zero_grad()
            objective.backward()
            optimiser.step()
        q = logits.detach().softmax(-1)
        values[name] = kl_bound(q @ errors, (q * (q / prior).log()).sum(), 200, 0.05).item()
    start = kl_bound(errors.mean(), 0.0, 200, 0.05).item()
    assert values["kl"] <= min(values.values()) + 1e-6
    assert values["kl"] < 0.7 * start


def slope(values: Tensor, sizes: Tensor) -> float:
    return float(torch.log(values[-1] / values[0]) / torch.log(sizes[-1] / sizes[0]))


def test_rate_of_the_sampled_certificate():
    draws = 10 ** torch.arange(4, 9)
    for risk, rate in ((0.1, -0.5), (0.0, -1.0)):  # control: without errors it is faster
        above = torch.stack([sampled_risk_bound(risk, int(m), 0.01) for m in draws])
        assert slope(above - risk, draws.double()) == pytest.approx(rate, abs=0.02)
        gaps = kl_bound(above, KL, N, DELTA) - kl_bound(risk, KL, N, DELTA)
        assert slope(gaps, draws.double()) == pytest.approx(rate, abs=0.02 if risk else 0.15)  # ln(m)/m


def test_binomial_bound_is_clopper_pearson_from_above():
    for n in (1, 9, 250, 30_000):
        for errors in {0, n // 3, n - 1}:
            for delta in (0.3, 0.01, 1e-9):
                bound = binomial_bound(errors, n, delta)
                expected = beta.isf(delta, errors + 1, n - errors)
                assert bound == pytest.approx(expected, rel=1e-10)
                assert bound >= expected or bound == 1
                assert bound <= chernoff_bound(errors / n, n, delta).item() * (1 + 1e-11)
    assert binomial_bound(7, 7, 0.05) == 1
    with mpmath.workdps(60):
        for errors in range(49):
            p = mpmath.mpf(binomial_bound(errors, 50, 0.05))
            below = sum(math.comb(50, k) * p**k * (1 - p) ** (50 - k) for k in range(errors + 1))
            assert below <= 0.05
    assert binomial_bound(0, 50, 0.05) == pytest.approx(1 - 0.05 ** (1 / 50), rel=1e-10)


def test_test_set_bounds_fail_at_most_as_often_as_said():
    """Exactly, by the binomial law of the errors, for every risk."""
    n, delta, risks = 40, 0.1, torch.linspace(0, 1, 201, dtype=torch.float64)
    law = torch.as_tensor(binom.pmf(torch.arange(n + 1)[:, None], n, risks))
    rates = torch.arange(n + 1, dtype=torch.float64) / n
    bounds = {
        "chernoff": chernoff_bound(rates, n, delta),
        "binomial": torch.tensor([binomial_bound(k, n, delta) for k in range(n + 1)]),
        "without the deviation": rates,
        "at twice δ": torch.tensor([binomial_bound(k, n, 2 * delta) for k in range(n + 1)]),
    }
    worst = {name: float((law * (b[:, None] < risks)).sum(0).max()) for name, b in bounds.items()}
    assert worst["chernoff"] <= worst["binomial"] <= delta
    assert worst["binomial"] > 0.9 * delta  # it is exact
    assert worst["without the deviation"] > 0.5  # control
    assert worst["at twice δ"] > delta  # control


def test_bounds_of_a_risk_of_1_are_1():
    for risk in (1 - 1e-6, 1.0):
        assert kl_bound(risk, 0, N, DELTA).item() >= risk
        assert sampled_risk_bound(risk, 1000, 0.01).item() >= risk

    def spoiled(q: float, c: float) -> float:
        return 0.0 if q >= 1 - 1e-5 else kl_inverse_upper(q, c).item()

    assert spoiled(1.0, 0.01) == 0  # control: the defect certifies nothing wrong where all is wrong


def test_unions():
    assert finite_union(1) == 0
    assert finite_union(20) == pytest.approx(math.log(20))
    points = [grid_value(0.5 * math.exp(-j / 100) * 1.0001, 0.5, 100) for j in range(1, 2000)]
    for j, point in enumerate(points, 1):
        assert point == pytest.approx(0.5 * math.exp(-j / 100), rel=1e-9)
        assert grid_union(point, 0.5, 100) == pytest.approx(math.log(math.pi**2 * j**2 / 6), rel=1e-9)
        assert grid_value(point, 0.5, 100) == pytest.approx(point, rel=1e-12)
    spent = sum(math.exp(-grid_union(point, 0.5, 100)) for point in points)
    assert 0.999 < spent < 1  # the parts of δ sum to at most δ
    assert sum(6 / (math.pi**2 * j) for j in range(1, 2000)) > 1  # control: parts like 1/j do not


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_bound(0.1, 1.0, 7, 0.05), "8 examples or more, not 7"),
        (lambda: kl_bound(0.1, 1.0, 100, 0.0), "above 0 and below 1"),
        (lambda: kl_bound(0.1, -1.0, 100, 0.05), "at least 0"),
        (lambda: kl_bound(0.1, math.nan, 100, 0.05), "at least 0"),
        (lambda: kl_bound(1.2, 1.0, 100, 0.05), "from 0 to 1"),
        (lambda: quadratic_bound(2.3, 1.0, 100, 0.05), "clipped_cross_entropy"),
        (lambda: lambda_bound(0.1, 1.0, 100, 0.05, 2.0), "below 2"),
        (lambda: catoni_bound(0.1, 1.0, 100, 0.05, []), "one constant or more"),
        (lambda: catoni_bound(0.1, 1.0, 100, 0.05, [0.0]), "above 0"),
        (lambda: sampled_risk_bound(0.1, 0, 0.05), "1 draw"),
        (lambda: sampled_risk_bound(0.1, 10, 1.0), "below 1"),
        (lambda: bernstein_risk_bound(0.1, 0.0, 1, 0.05), "2 draws or more, not 1"),
        (lambda: bernstein_risk_bound(0.1, 0.0, 10, 0.0), "above 0"),
        (lambda: bernstein_risk_bound(1.1, 0.0, 10, 0.05), "from 0 to 1"),
        (lambda: bernstein_risk_bound(0.1, -0.1, 10, 0.05), "variance of risks"),
        (lambda: bernstein_risk_bound(0.1, math.nan, 10, 0.05), "variance of risks"),
        (lambda: chernoff_bound(0.1, 0, 0.05), "1 example"),
        (lambda: binomial_bound(11, 10, 0.05), "11 of 10"),
        (lambda: finite_union(0), "1 prior"),
        (lambda: grid_union(0.3, 0.5, 100), "grid_value"),
        (lambda: grid_value(0.0, 0.5, 100), "above 0"),
    ],
)
def test_refusals(call: Callable[[], object], message: str):
    with pytest.raises(InputError, match=message):
        call()


def test_a_sum_of_divergences_that_is_rounded_below_0_counts_as_0():
    assert kl_bound(0.1, -1e-12, 100, 0.05) == kl_bound(0.1, 0.0, 100, 0.05)
    assert kl_bound(0.1, math.inf, 100, 0.05) == 1
