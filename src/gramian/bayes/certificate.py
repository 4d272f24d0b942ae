"""Upper bounds of a predictor's risk, with every term that made them, on data that its prior never saw.

The order is: `random_split` before anything is looked at; prior from the prior set alone; posterior from all
data if wished; `sampled_errors` on the bound set with hypotheses drawn afresh; `certify`, which refuses a
prior that saw examples of the bound set. A certificate is about the predictor that draws a hypothesis for
every prediction: not about the thresholded, averaged or voting one. Each prediction must depend on its own
input alone, so statistics of batch normalisation are frozen while losses are drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from gramian.bayes.bounds import (
    BOUNDS,
    bernstein_risk_bound,
    best_lambda,
    binomial_bound,
    chernoff_bound,
    complexity,
    sampled_risk_bound,
)
from gramian.bayes.risk import SampledRisk, bounded
from gramian.bayes.split import Seen, Split, fingerprint
from gramian.errors import InputError

SAMPLING = ("kl", "bernstein", "smaller")
"""Bounds of the empirical risk by draws; the smaller of the first two has δ'/2 for each."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """An upper bound of a predictor's risk, with every term that made it."""

    bound: str
    """Name of the bound: one of `BOUNDS`, or chernoff or binomial for a fixed predictor."""
    value: float
    """The risk is at most this; 1 says nothing."""
    empirical_risk: float
    """Risk on the bound set: exact, or the mean over draws."""
    empirical_bound: float
    """Bound of the risk on the bound set by the draws; the risk itself where it is exact."""
    draws: int | None
    """Hypotheses drawn; None where the empirical risk is exact."""
    sampling: str | None = "kl"
    """Which of `SAMPLING` bounds the risk on the bound set by the draws; None without draws."""
    variance: float | None = None
    """Unbiased variance of the risks over draws, where that bound uses it."""
    kl: float
    """KL(Q‖P) in nats."""
    n: int
    """Examples of the bound set."""
    delta: float
    """Probability that the bound set misleads."""
    delta_sampling: float
    """Probability δ' that the draws mislead; 0 without draws."""
    union: float = 0.0
    """Nats paid for choosing among priors, in ln(1/δ) and in ln(1/δ')."""
    weight: float | None = None
    """λ of the λ bound."""
    loss: str = "0-1 error"
    fixed: bool = False
    """Whether it is about one fixed predictor, by a test-set bound, in place of a random one."""
    prior_examples: int = 0
    """Examples of the prior set."""
    seed: int | None = None
    """Seed of the split."""
    seen: str = ""
    """Fingerprint of the examples that made the prior."""
    bound_set: str = ""
    """Fingerprint of the bound set."""

    @property
    def confidence(self) -> float:
        """Probability 1 − δ − δ' that the value is a bound."""
        return 1 - self.delta - self.delta_sampling

    @property
    def kl_per_example(self) -> float:
        """KL(Q‖P)/n in nats."""
        return self.kl / self.n

    @property
    def vacuous(self) -> bool:
        """Whether the value says nothing: it is 100 % as it is written, rounded up to a hundredth of one."""
        return hundredths(self.value) >= 10_000

    @property
    def sentence(self) -> str:
        """What is certified, in words; percentages are rounded to the safe side."""
        about = (
            "the fixed predictor" if self.fixed else "the random predictor, which draws for every prediction,"
        )
        if self.vacuous:
            claim = f"the bound of the {self.loss} of {about} is 100 %"
            return f"Nothing is certified: {claim} ({self._terms()})."
        chance = _percent(self.confidence + 1e-12, math.floor)
        return (
            f"With probability at least {chance}, the expected {self.loss} of {about} is at most "
            f"{_percent(self.value, math.ceil)} ({self._terms()})."
            + ("" if self.fixed else " It is not about a thresholded, averaged or voting predictor.")
        )

    def _terms(self) -> str:
        made = "predictor" if self.fixed else "prior"
        terms = [f"{self.bound} bound on {self.n} examples that the {made} did not see"]
        if self.draws is None:
            terms.append(f"empirical risk {100 * self.empirical_risk:.3f} %")
        else:
            terms.append(
                f"empirical risk {100 * self.empirical_risk:.3f} % over {self.draws} draws, "
                f"at most {_percent(self.empirical_bound, math.ceil)} by {_SAID[str(self.sampling)]}"
            )
        if not self.fixed:
            terms.append(f"KL {self.kl:.4g} nats")
        terms.append(
            f"δ = {self.delta:g}" + ("" if self.draws is None else f", δ' = {self.delta_sampling:g}")
        )
        if self.union:
            terms.append(f"{self.union:.3g} nats for the choice of the prior")
        return "; ".join(terms)


_SAID = {
    "kl": "their mean",
    "bernstein": "their mean and variance",
    "smaller": "the smaller of two bounds at δ'/2 each",
}


def certify(
    split: Split,
    seen: Seen,
    risk: SampledRisk | float,
    kl: float | Tensor,
    *,
    delta: float = 0.025,
    delta_sampling: float = 0.01,
    bound: str = "kl",
    sampling: str = "kl",
    union: float = 0.0,
    sides: int = 1,
    loss: str = "0-1 error",
) -> Certificate:
    """Certify the risk of a random predictor on a bound set that its prior did not see.

        r ≤ bound(kl⁻¹(r̂_m, ln(s/δ')/m), KL, n, δ) with probability at least 1 − δ − δ'

    `seen` are the examples that made the prior: its weights, probabilities, clamps and hyper-parameters. The
    posterior may depend on all data. `union` are the nats of `finite_union` or `grid_union`; without draws
    the risk is exact and δ' is not used. The prior's own certificate is that of KL 0.

    `sampling` is fixed before the draws are seen: "kl" as above, "bernstein" for `bernstein_risk_bound`, the
    smaller from some 10/r̂ draws on where their risks hardly differ, or "smaller", at δ'/2 for each of both.

    Raises: InputError for a prior that saw the bound set, risks of another number of examples, a risk
        outside [0, 1], an unknown bound or sampling, δ + δ' not below 1, and as the bounds do.
    Holds: with probability at least 1 − δ − δ' over the bound set and the draws.
    Source: Langford, Caruana 2001, NIPS 14; Dziugaite, Roy 2017, arXiv 1703.11008; Maurer, Pontil 2009,
    arXiv 0907.3740.
    """
    split.check(seen)
    if bound not in BOUNDS:
        raise InputError(f"there is no bound {bound!r}; take one of {', '.join(BOUNDS)}")
    if sampling not in SAMPLING:
        raise InputError(f"there is no bound by draws {sampling!r}; take one of {', '.join(SAMPLING)}")
    sampled = isinstance(risk, SampledRisk)
    if sampled and risk.n != split.n:
        raise InputError(f"the risks are of {risk.n} examples where the bound set has {split.n}")
    _confidences(delta, delta_sampling if sampled else 0.0, union)
    mean, distance, paid = risk.mean if sampled else risk, float(kl), math.exp(-union)
    above = _empirical_bound(risk, sampling, delta_sampling * paid / sides) if sampled else mean
    value = BOUNDS[bound](above, distance, split.n, delta * paid).item()
    cost = complexity(distance, split.n, delta * paid)
    return Certificate(
        bound=bound,
        value=min(1.0, value),
        empirical_risk=mean,
        empirical_bound=above,
        draws=risk.draws if sampled else None,
        sampling=sampling if sampled else None,
        variance=risk.variance if sampled and sampling != "kl" else None,
        kl=max(0.0, distance),
        n=split.n,
        delta=delta,
        delta_sampling=delta_sampling if sampled else 0.0,
        union=union,
        weight=best_lambda(above, cost).item() if bound == "lambda" else None,
        loss=loss,
        **_origin(split, seen),
    )


def certify_fixed(
    split: Split,
    seen: Seen,
    losses: Shaped[Tensor, " n"],
    *,
    delta: float = 0.025,
    bound: str = "chernoff",
    union: float = 0.0,
    loss: str = "0-1 error",
) -> Certificate:
    """Certify one fixed predictor, such as the prior's thresholded mask, by a test-set bound.

    `seen` are the examples that made the predictor, all of it. `bound` is "chernoff", for any loss in [0, 1],
    or "binomial", exact for errors of 0 and 1; `union` are nats for the choice among predictors.

    Shapes: losses (n) on the bound set.
    Raises: InputError for a predictor that saw the bound set, losses that are not (n) or not in [0, 1], an
        unknown bound, and errors that are not 0 or 1 for the binomial one.
    Holds: with probability at least 1 − δ over the bound set.
    Source: Langford 2005, JMLR 6.
    """
    split.check(seen)
    _confidences(delta, 0.0, union)
    if losses.shape != (split.n,):
        raise InputError(f"losses have to be ({split.n},), one an example, not {tuple(losses.shape)}")
    total, paid = bounded(losses).sum(dtype=torch.float64).item(), delta * math.exp(-union)
    if bound == "chernoff":
        value = chernoff_bound(total / split.n, split.n, paid).item()
    elif bound == "binomial":
        if not ((losses == 0) | (losses == 1)).all():
            raise InputError("the binomial bound needs errors of 0 and 1; take the chernoff bound for others")
        value = binomial_bound(round(total), split.n, paid)
    else:
        raise InputError(f"there is no test-set bound {bound!r}; take chernoff or binomial")
    return Certificate(
        bound=bound,
        value=value,
        empirical_risk=total / split.n,
        empirical_bound=total / split.n,
        draws=None,
        sampling=None,
        kl=0.0,
        n=split.n,
        delta=delta,
        delta_sampling=0.0,
        union=union,
        loss=loss,
        fixed=True,
        **_origin(split, seen),
    )


def _empirical_bound(risk: SampledRisk, sampling: str, delta: float) -> float:
    if sampling == "smaller":
        return min(_empirical_bound(risk, each, delta / 2) for each in ("kl", "bernstein"))
    if sampling == "bernstein":
        return bernstein_risk_bound(risk.mean, risk.variance, risk.draws, delta).item()
    return sampled_risk_bound(risk.mean, risk.draws, delta).item()


def _origin(split: Split, seen: Seen) -> dict[str, Any]:
    return {
        "prior_examples": len(split.prior),
        "seed": split.seed,
        "seen": seen if isinstance(seen, str) else fingerprint(seen),
        "bound_set": fingerprint(split.bound),
    }


def _confidences(delta: float, delta_sampling: float, union: float) -> None:
    if not (delta > 0 and delta_sampling >= 0 and delta + delta_sampling < 1):
        raise InputError(f"δ and δ' have to be above 0 with a sum below 1, not {delta} and {delta_sampling}")
    if not 0 <= union < math.inf:
        raise InputError(f"the cost of a union has to be a finite number of nats of at least 0, not {union}")


def hundredths(share: float, rounding: Callable[[float], int] = math.ceil) -> int:
    """Return a share in hundredths of a percent, rounded to one side: up, as bounds are."""
    return rounding(share * 1e4)


def _percent(share: float, rounding: Callable[[float], int]) -> str:
    """Write a share in percent, rounded to one side."""
    return f"{hundredths(share, rounding) / 100:g} %"
