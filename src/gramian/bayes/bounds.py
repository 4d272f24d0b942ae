"""Bounds on the risk of a random predictor; differentiable, so each is an objective of training as well.

The predictor draws a hypothesis h ~ Q for every prediction. r = E_Q E ℓ(h, z) is its risk, r̂ = E_Q 1/n Σ_i
ℓ(h, z_i) that on n examples of the bound set, ℓ ∈ [0, 1], and P a prior that does not depend on them. Every
bound holds with probability at least 1 − δ over the bound set, for all Q at once, and is computed in float64:

    c = (KL(Q‖P) + ln(2√n/δ))/n

kl, quadratic, classic and λ bound follow from one and the same event, so the smallest of them costs nothing;
Catoni's is another event with a δ of its own.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.divergence import kl_inverse_upper
from gramian.errors import InputError

Number = float | Tensor

CATONI_CONSTANTS = tuple(10 ** (-2 + 4 * k / 99) for k in range(100))
"""Constants C that are tried by default, geometric from .01 to 100; fixed before any data."""


def complexity(kl: Number, n: int, delta: float) -> Float[Tensor, "..."]:
    """Return what the distance from the prior costs an example, in nats.

        c = (KL + ln(2√n/δ))/n

    Shapes: kl (*batch) -> (*batch).
    Raises: InputError for n < 8, δ outside (0, 1), and a KL below 0.
    Holds: exactly.
    Source: Maurer 2004, arXiv cs/0411099, whose proof of 2√n needs n ≥ 8.
    """
    return (_divergence(kl, n, delta) + math.log(2) + 0.5 * math.log(n) - math.log(delta)) / n


def kl_bound(risk: Number, kl: Number, n: int, delta: float) -> Float[Tensor, "..."]:
    """Return the bound through the inverse of the binary divergence, the tightest of its event.

        r ≤ kl⁻¹(r̂, c)

    As an objective its slopes are implicit: ∂/∂r̂ and ∂/∂c of `kl_inverse_upper`.

    Shapes: risk and kl broadcast; the result has their shape.
    Raises: InputError as `complexity`, and for a risk outside [0, 1].
    Holds: with probability at least 1 − δ; never rounded down.
    Source: Langford, Seeger 2001, CMU-CS-01-102; Maurer 2004, arXiv cs/0411099.
    """
    return kl_inverse_upper(risk, complexity(kl, n, delta))


def quadratic_bound(risk: Number, kl: Number, n: int, delta: float) -> Float[Tensor, "..."]:
    """Return the smallest λ bound in closed form.

        r ≤ (√(r̂ + c/2) + √(c/2))²

    At most the classic bound exactly where its value is at most ¼.

    Shapes: risk and kl broadcast; the result has their shape.
    Raises: InputError as `kl_bound`.
    Holds: with probability at least 1 − δ.
    Source: Pérez-Ortiz, Rivasplata, Shawe-Taylor, Szepesvári 2021, JMLR 22(227).
    """
    half = complexity(kl, n, delta) / 2
    return ((_risk(risk, half) + half).sqrt() + half.sqrt()).square()


def classic_bound(risk: Number, kl: Number, n: int, delta: float) -> Float[Tensor, "..."]:
    """Return the bound through Pinsker's inequality.

        r ≤ r̂ + √(c/2)

    Shapes: risk and kl broadcast; the result has their shape.
    Raises: InputError as `kl_bound`.
    Holds: with probability at least 1 − δ.
    Source: McAllester 1999, doi 10.1145/307400.307435, with the c of Maurer 2004.
    """
    half = complexity(kl, n, delta) / 2
    return _risk(risk, half) + half.sqrt()


def lambda_bound(
    risk: Number, kl: Number, n: int, delta: float, weight: Number | None = None
) -> Float[Tensor, "..."]:
    """Return the bound that is linear in r̂ and KL for a fixed λ.

        r ≤ r̂/(1 − λ/2) + c/(λ(1 − λ/2)),  λ ∈ (0, 2), `best_lambda` without

    It holds for all λ at once, so λ may be learnt or minimised at no cost. Without a weight, λ is not
    differentiated: at the minimum its slope is 0, and value and slopes are those of the quadratic bound.

    Shapes: risk, kl and weight broadcast; the result has their shape.
    Raises: InputError as `kl_bound`, and for λ outside (0, 2).
    Holds: with probability at least 1 − δ.
    Source: Thiemann, Igel, Wintenberger, Seldin 2017, arXiv 1608.05610.
    """
    c = complexity(kl, n, delta)
    risk = _risk(risk, c)
    if weight is None:
        weight = best_lambda(risk.detach(), c.detach())
    weight = _double(weight, c)
    if not ((weight > 0) & (weight < 2)).all():
        raise InputError("λ has to be above 0 and below 2")
    return risk / (1 - weight / 2) + c / (weight * (1 - weight / 2))


def best_lambda(risk: Number, c: Number) -> Float[Tensor, "..."]:
    """Return the λ at which the λ bound is smallest.

        λ* = 2/(√(2r̂/c + 1) + 1)

    Range (0, 1].

    Shapes: risk and c broadcast; the result has their shape.
    Holds: exactly, for c above 0.
    """
    c = _double(c)
    return 2 / ((2 * _double(risk, c) / c + 1).sqrt() + 1)


def catoni_bound(
    risk: Number, kl: Number, n: int, delta: float, constants: Sequence[float] = CATONI_CONSTANTS
) -> Float[Tensor, "..."]:
    """Return the smallest of Catoni's bounds over K constants, each at confidence δ/K.

        r ≤ min_C [1 − exp(−C r̂ − (KL + ln(K/δ))/n)]/(1 − e^{−C})

    The constants must be fixed before the bound set is seen; give one alone where it is known.

    Shapes: risk and kl broadcast; the result has their shape.
    Raises: InputError as `kl_bound`, and unless there are constants, all above 0.
    Holds: with probability at least 1 − δ.
    Source: Catoni 2007, arXiv 0712.0248.
    """
    if len(constants) == 0 or not all(0 < constant < math.inf for constant in constants):
        raise InputError("Catoni's bound needs one constant or more, all finite and above 0")
    cost = (_divergence(kl, n, delta) + math.log(len(constants)) - math.log(delta)) / n
    risk = _risk(risk, cost)
    values = [torch.expm1(-(c * risk + cost)) / math.expm1(-c) for c in constants]
    return torch.stack(values).amin(0)


Bound = Callable[[Number, Number, int, float], Tensor]
"""Bound of the risk from empirical risk, KL, n and δ."""

BOUNDS: dict[str, Bound] = {
    "kl": kl_bound,
    "quadratic": quadratic_bound,
    "classic": classic_bound,
    "lambda": lambda_bound,
    "catoni": catoni_bound,
}
"""Bounds by name: of certificates, and as objectives of training."""


def sampled_risk_bound(mean: Number, draws: int, delta: float, sides: int = 1) -> Float[Tensor, "..."]:
    """Return a bound of r̂ from hypotheses drawn from Q, each scored on the whole bound set.

        r̂ ≤ kl⁻¹(r̂_m, ln(s/δ')/m),  s = 1, or 2 as if the lower side were bounded as well

    The distance from r̂ falls like m^{−1/2}, and like 1/m at r̂ = 0.

    Shapes: mean (*batch) -> (*batch).
    Raises: InputError for no draw, δ' outside (0, 1), and a mean outside [0, 1].
    Holds: with probability at least 1 − δ' over the draws, which have to be independent given the bound set.
    Source: Chernoff's bound; Langford, Caruana 2001, NIPS 14.
    """
    if draws < 1:
        raise InputError(f"the empirical risk needs 1 draw of a hypothesis or more, not {draws}")
    _confidence(delta)
    return kl_inverse_upper(mean, math.log(sides / delta) / draws)


def bernstein_risk_bound(mean: Number, variance: Number, draws: int, delta: float) -> Float[Tensor, "..."]:
    """Return a bound of r̂ from hypotheses drawn from Q that gains from risks which hardly differ.

        r̂ ≤ r̂_m + √(2 V ln(2/δ')/m) + 7 ln(2/δ')/(3(m − 1)),  V the unbiased variance of the m risks

    With V near 0 below `sampled_risk_bound` from some 10/r̂ draws on; with V = r̂(1 − r̂), and at r̂_m = 0,
    always above it. Which of them is taken must not depend on the draws, unless each gets a part of δ'.

    Shapes: mean and variance broadcast; the result has their shape.
    Raises: InputError for fewer than 2 draws, δ' outside (0, 1), a mean outside [0, 1], and a variance that
        risks in [0, 1] cannot have.
    Holds: with probability at least 1 − δ' over the draws, which have to be independent given the bound set.
    Source: Maurer, Pontil 2009, arXiv 0907.3740 (theorem 4).
    """
    if draws < 2:
        raise InputError(f"a bound by the variance of risks needs 2 draws or more, not {draws}")
    _confidence(delta)
    variance = _double(variance)
    if not ((variance >= 0) & (variance <= 0.5)).all():
        raise InputError("a variance of risks has to be from 0 to ½, the most that numbers in [0, 1] have")
    nats = math.log(2 / delta)
    deviation = (2 * nats / draws * variance).sqrt() + 7 * nats / (3 * (draws - 1))
    return (_risk(mean, variance) + deviation).clamp(max=1)


def chernoff_bound(risk: Number, n: int, delta: float) -> Float[Tensor, "..."]:
    """Return the test-set bound of one predictor that was fixed before the n examples were seen.

        r ≤ kl⁻¹(r̂, ln(1/δ)/n)

    Shapes: risk (*batch) -> (*batch).
    Raises: InputError for no example, δ outside (0, 1), and a risk outside [0, 1].
    Holds: with probability at least 1 − δ, for losses in [0, 1].
    Source: Langford 2005, JMLR 6 (tutorial on prediction bounds).
    """
    if n < 1:
        raise InputError(f"a test-set bound needs 1 example or more, not {n}")
    _confidence(delta)
    return kl_inverse_upper(risk, -math.log(delta) / n)


def binomial_bound(errors: int, n: int, delta: float) -> float:
    """Return the exact test-set bound of one fixed predictor for errors of 0 and 1 (Clopper–Pearson).

        sup {p: P(Bin(n, p) ≤ k) ≥ δ}, the upper δ-quantile of Beta(k + 1, n − k)

    Raises: InputError for k outside 0 … n, no example, and δ outside (0, 1).
    Holds: with probability at least 1 − δ; rounded up by 1e-12.
    Source: Clopper, Pearson 1934, doi 10.1093/biomet/26.4.404.
    """
    from scipy.special import betainccinv

    if not 0 <= errors <= n or n < 1:
        raise InputError(f"errors have to be a count from 0 to n and n at least 1, not {errors} of {n}")
    _confidence(delta)
    return 1.0 if errors == n else min(1.0, float(betainccinv(errors + 1, n - errors, delta)) * (1 + 1e-12))


def finite_union(count: int) -> float:
    """Return what trying one of `count` priors costs: the nats that ln(1/δ) grows by.

        ln K

    Raises: InputError for a count below 1.
    Holds: exactly.
    """
    if count < 1:
        raise InputError(f"a union needs 1 prior or more, not {count}")
    return math.log(count)


def grid_value(value: float, largest: float, precision: float) -> float:
    """Return the largest point of a geometric grid that is at most a value.

        c₀ e^{−j/b}, j = 1, 2, …;  c₀ is `largest`, b the `precision`, points in a factor of e

    Raises: InputError for numbers that are not above 0.
    Holds: exactly.
    """
    _grid(value, largest, precision)
    index = max(1, math.ceil(precision * math.log(largest / value) - 1e-9))
    return largest * math.exp(-index / precision)


def grid_union(value: float, largest: float, precision: float) -> float:
    """Return what choosing a prior's parameter from a geometric grid costs, in nats.

        ln(π² j²/6),  j = b ln(c₀/value):  δ_j = 6δ/(π² j²) sums to δ

    Raises: InputError for numbers that are not above 0, and a value that is no point of the grid.
    Holds: exactly.
    Source: Dziugaite, Roy 2017, arXiv 1703.11008.
    """
    _grid(value, largest, precision)
    exact = precision * math.log(largest / value)
    index = round(exact)
    if index < 1 or abs(exact - index) > 1e-6 * index:
        raise InputError(
            f"{value} is no point of the grid {largest}·e^(−j/{precision}); take grid_value of it"
        )
    return math.log(math.pi**2 * index**2 / 6)


def _grid(value: float, largest: float, precision: float) -> None:
    if not all(0 < number < math.inf for number in (value, largest, precision)):
        raise InputError(
            f"a geometric grid needs finite numbers above 0, not {value}, {largest} and {precision}"
        )


def _confidence(delta: float) -> None:
    if not 0 < delta < 1:
        raise InputError(f"δ has to be above 0 and below 1, not {delta}")


def _divergence(kl: Number, n: int, delta: float) -> Tensor:
    if n < 8:
        raise InputError(f"a PAC-Bayes bound needs a bound set of 8 examples or more, not {n}")
    _confidence(delta)
    kl = _double(kl)
    if not (kl >= -1e-6).all():  # a sum that is 0 may be rounded below
        raise InputError("a KL divergence has to be at least 0, but is below or NaN")
    return kl.clamp(min=0)


def _risk(risk: Number, like: Tensor) -> Tensor:
    risk = _double(risk, like)
    if not ((risk >= 0) & (risk <= 1)).all():
        raise InputError("an empirical risk has to be from 0 to 1; clip the loss (clipped_cross_entropy)")
    return risk


def _double(value: Number, like: Tensor | None = None) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64)
    return value if like is None or value.ndim else value.to(like.device)
