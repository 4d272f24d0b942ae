"""Kullback–Leibler divergences in nats and the inverse of the binary one, all in float64.

kl(q‖p) = q ln(q/p) + (1 − q) ln((1 − q)/(1 − p)) is summed from two terms that are not negative,
a (x − ln(1 + x)) at x = b/a − 1 for (a, b) = (q, p) and (1 − q, 1 − p), so that nothing cancels where p is
close to q. Divergences are elementwise: sum them over independent coordinates. Slopes that are infinite, at
probabilities of 0 or 1, are given as large finite numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import logsigmoid

from gramian.errors import InputError

Number = float | Tensor

_SMALLEST = 1e-280
"""Arguments of the inverse between 0 and this are moved to the safe side of it."""
_MARGIN = 2.0**-45
"""Relative surplus of the inverse's target, some ten times the rounding error of a divergence."""
_HALF_ULP = 2.0**-53


def gaussian_kl(mean: Number, std: Number, prior_mean: Number, prior_std: Number) -> Float[Tensor, "..."]:
    """Return KL(N(mean, std²) ‖ N(prior_mean, prior_std²)) of every coordinate.

        KL = ln(σ₀/σ) + (σ² + (w − w₀)²)/(2σ₀²) − ½

    Shapes: the four broadcast; the result has their shape.
    Raises: InputError for a standard deviation that is not a finite number above 0.
    Holds: exactly; absolute rounding error of some 1e-16.
    """
    mean, std, prior_mean, prior_std = (_double(x) for x in (mean, std, prior_mean, prior_std))
    for value in (std, prior_std):
        if not ((value > 0) & value.isfinite()).all():
            raise InputError("standard deviations have to be finite numbers above 0")
    ratio, moved = std / prior_std, (mean - prior_mean) / prior_std
    return (ratio.square() + moved.square() - 1) / 2 - ratio.log()


def bernoulli_kl(q: Number, p: Number) -> Float[Tensor, "..."]:
    """Return kl(q‖p), the divergence of Bernoulli(q) from Bernoulli(p), of every coordinate.

        kl(q‖p) = q ln(q/p) + (1 − q) ln((1 − q)/(1 − p)),  0 ln 0 = 0

    Range [0, ∞]. Numbers below the smallest normal one count as 0.

    Shapes: the two broadcast; the result has their shape.
    Raises: InputError for numbers that are no probabilities.
    Holds: exactly; relative rounding error 1e-14.
    """
    return _applied(_BernoulliKL)(*_pair(_probabilities("q", q), _probabilities("p", p)))


def bernoulli_kl_of_logits(logits: Number, prior_logits: Number) -> Float[Tensor, "..."]:
    """Return kl(σ(s)‖σ(s₀)) of every coordinate, for masks that are held by their logits.

        kl = λ (ln λ − ln λ₀) + (1 − λ)(ln(1 − λ) − ln(1 − λ₀)),  λ = σ(s), ln λ = −softplus(−s)

    At most (s − s₀)²/8. Logits of ±∞ are certain masks, λ = 1 and 0. The logarithms are those of logsigmoid:
    torch's softplus drops e⁻²⁰ beyond its threshold.

    Shapes: the two broadcast; the result has their shape.
    Raises: InputError for prior logits that are not finite, and NaN.
    Holds: exactly; absolute rounding error of some 1e-16 |s − s₀|.
    """
    s, prior = _pair(_double(logits), _double(prior_logits))
    if not prior.isfinite().all() or s.isnan().any():
        raise InputError(
            "logits have to be numbers, those of the prior finite; clamp its probabilities first"
        )
    s = s.clamp(-1e3, 1e3)  # beyond, λ is 0 or 1 in float64
    kept = torch.sigmoid(s) * (logsigmoid(s) - logsigmoid(prior))
    return kept + torch.sigmoid(-s) * (logsigmoid(-s) - logsigmoid(-prior))


def categorical_kl(q: Float[Tensor, "... k"], p: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Return the divergence of categorical distributions over the last axis.

        KL = Σ_k q_k ln(q_k/p_k),  0 ln 0 = 0

    Shapes: (…, k) and (…, k), which broadcast -> (…).
    Raises: InputError for numbers that are not at least 0 or do not sum to 1 over the last axis.
    Holds: exactly; absolute rounding error of some 1e-16 · ln(1/p).
    """
    q, p = q.double(), p.double()
    for value in (q, p):
        if not (value >= 0).all() or not ((value.sum(-1) - 1).abs() <= 1e-6).all():
            raise InputError("class probabilities have to be at least 0 and to sum to 1 over the last axis")
    return (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(-1)


def categorical_kl_of_logits(
    logits: Float[Tensor, "... k"], prior_logits: Float[Tensor, "... k"]
) -> Float[Tensor, "..."]:
    """Return the divergence of categorical distributions that are held by their logits.

        KL = Σ_k q_k (ln q_k − ln p_k),  q = softmax(s), p = softmax(s₀)

    Shapes: (…, k) and (…, k), which broadcast -> (…).
    Raises: InputError for logits that are not finite.
    Holds: exactly; absolute rounding error of some 1e-16 · ln(1/p).
    """
    if not logits.isfinite().all() or not prior_logits.isfinite().all():
        raise InputError("logits have to be finite, but hold NaN or infinity")
    log_q, log_p = (x.double().log_softmax(-1) for x in (logits, prior_logits))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def spike_and_slab_kl(
    keep: Number,
    prior_keep: Number,
    mean: Number,
    std: Number,
    prior_mean: Number,
    prior_std: Number,
) -> Float[Tensor, "..."]:
    """Return the divergence of masked Gaussian weights from masked Gaussian weights, of every coordinate.

        KL = kl(λ‖λ₀) + λ KL(N(w, σ²) ‖ N(w₀, σ₀²)),  the law of a weight being (1 − λ) δ₀ + λ N(w, σ²)

    Shapes: the six broadcast; the result has their shape.
    Raises: InputError as `bernoulli_kl` and `gaussian_kl`.
    Holds: exactly, since the atom and the density charge disjoint sets.
    """
    keep = _double(keep)
    return bernoulli_kl(keep, prior_keep) + keep * gaussian_kl(mean, std, prior_mean, prior_std)


def kl_inverse_upper(q: Number, c: Number) -> Float[Tensor, "..."]:
    """Return the largest p that is within c nats above q; differentiable in both.

        kl⁻¹(q, c) = sup {p ∈ [q, 1]: kl(q‖p) ≤ c},
        ∂p/∂c = p(1 − p)/(p − q),  ∂p/∂q = ∂p/∂c · ln(p(1 − q)/(q(1 − p)))

    Newton's method falls from above onto a target that rounding cannot pass, and the last steps go up float
    by float until the divergence has reached it: the result is never below the true inverse.
    kl⁻¹(0, c) = 1 − e^{−c}, kl⁻¹(1, c) = 1, kl⁻¹(q, 0) = q.

    Shapes: the two broadcast; the result has their shape.
    Raises: InputError for q outside [0, 1] and c below 0.
    Holds: exactly up to a relative error of 1e-13, upwards; q and c between 0 and 1e-280 count as 1e-280.
    Source: Langford, Seeger 2001, CMU-CS-01-102; the slopes by implicit differentiation.
    """
    return _inverse(q, c, 1)


def kl_inverse_lower(q: Number, c: Number) -> Float[Tensor, "..."]:
    """Return the smallest p that is within c nats below q; differentiable in both.

        inf {p ∈ [0, q]: kl(q‖p) ≤ c} = 1 − kl⁻¹(1 − q, c)

    Never above the true value, also relative to a p that is close to 0.

    Shapes: the two broadcast; the result has their shape.
    Raises: InputError for q outside [0, 1] and c below 0.
    Holds: exactly up to a relative error of 1e-10, downwards; q below 1e-280 counts as 0.
    """
    return _inverse(q, c, -1)


def _inverse(q: Number, c: Number, side: int) -> Tensor:
    q, c = _pair(_probabilities("q", q), _double(c))
    if not (c >= 0).all():
        raise InputError("the divergence c to invert has to be at least 0, but is below or NaN")
    return _applied(_Inverse)(q, c, side)


class _BernoulliKL(Function):
    """kl(q‖p) with slopes ln(q(1 − p)/(p(1 − q))) and (p − q)/(p(1 − p))."""

    @staticmethod
    def forward(q: Tensor, p: Tensor) -> Tensor:
        return _kl(q, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, p = (x.clamp(_SMALLEST, 1 - _HALF_ULP) for x in ctx.saved_tensors)
        return gradients[0] * -_log_odds_gain(q, p, p - q), gradients[0] * (p - q) / (p * (1 - p))


class _Inverse(Function):
    """The p on the given side of q with kl(q‖p) = c, and its slopes."""

    @staticmethod
    def forward(q: Tensor, c: Tensor, side: int) -> Tensor:
        return torch.where(c > 0, _solve(q, c, side), q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.side = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, p = ctx.saved_tensors
        inside = (p > 0) & (p < 1)
        p = torch.where(inside, p, 0.5)
        q = torch.where(inside, q.clamp(_SMALLEST, 1 - _HALF_ULP), 0.5)
        gap = ctx.side * torch.maximum(ctx.side * (p - q), q * _HALF_ULP)
        by_c = p * (1 - p) / gap
        by_q = by_c * _log_odds_gain(q, p, gap)
        return *(torch.where(inside, gradients[0] * slope, 0) for slope in (by_q, by_c)), None


def _log_odds_gain(q: Tensor, p: Tensor, gap: Tensor) -> Tensor:
    """Give ln(p(1 − q)/(q(1 − p))) for gap = p − q."""
    ratio = gap / (q * (1 - p))
    near = ratio > -0.5
    return torch.where(
        near, torch.log1p(torch.where(near, ratio, 0)), (p / q).log() + ((1 - q) / (1 - p)).log()
    )


def _kl(q: Tensor, p: Tensor) -> Tensor:
    """Give kl(q‖p) to a relative error of 1e-14."""
    before, after = torch.stack((q, 1 - q)), torch.stack((p, 1 - p))
    change = torch.stack((p - q, q - p))
    x = change / before
    log = torch.where(x > -0.5, torch.log1p(x), (after / before).log())
    excess = before * torch.where(x.abs() < 0.1, _series(x), x - log)
    return torch.where(before >= torch.finfo(q.dtype).tiny, excess, change.clamp(min=0)).sum(0)


def _series(x: Tensor) -> Tensor:
    """Give x − ln(1 + x) for |x| < .1, from ln(1 + x) = 2 artanh(r) with r = x/(2 + x)."""
    r = x / (2 + x)
    square, total = r * r, torch.zeros_like(r)
    for k in range(6, -1, -1):
        total = total * square + 1 / (2 * k + 3)
    return r * (x - 2 * square * total)


def _solve(q: Tensor, c: Tensor, side: int) -> Tensor:
    """Give a float p on the given side of q whose divergence is at least c, and hardly more."""
    safe = q.clamp(min=_SMALLEST) if side > 0 else torch.where(q < _SMALLEST, 0, q)
    q = torch.where(q > 0, safe, q)
    target = c.clamp(_SMALLEST, 1e300) * (1 + _MARGIN)
    low, high = (q, torch.ones_like(q)) if side > 0 else (torch.zeros_like(q), q)
    p = _start(q, target, side).clamp(low, high)
    for _ in range(64):
        step = (_kl(q, p) - target) * p * (1 - p) / (p - q)
        moved = torch.where(step.isfinite(), p - step, p).clamp(low, high)
        scale = torch.minimum(torch.minimum(p, 1 - p), (p - q).abs())  # the next error is (step/scale)²
        settled = ((moved - p).abs() <= 1e-7 * scale + 4 * _HALF_ULP * p).all()
        p = moved
        if settled:
            break
    return _reach(q, p, target, side)


def _start(q: Tensor, target: Tensor, side: int) -> Tensor:
    """Give a p beyond the inverse: the better of a bound for small and of one for large divergences."""
    room = 1 - q if side > 0 else q
    entropy = torch.special.entr(q) - torch.special.xlog1py(1 - q, -q)
    exponent = -(target + entropy) / room
    if side > 0:
        return torch.minimum(-exponent.expm1(), q + target + target.sqrt() * (2 * q + target).sqrt())
    return torch.maximum(exponent.exp(), q - target.sqrt() * (2 * q).sqrt())


def _reach(q: Tensor, p: Tensor, target: Tensor, side: int) -> Tensor:
    """Move p away from q by 1, 2, 4, … floats until kl(q‖p) is at least the target, or p is 1 or 0."""
    end, floats = float(side > 0), side
    last = torch.ones_like(p).view(torch.int64)
    while (short := (_kl(q, p) < target) & (p != end)).any():
        further = (p.view(torch.int64) + floats).clamp(torch.zeros_like(last), last).view(torch.float64)
        p = torch.where(short, further, p)
        floats *= 2
    return p


def _applied(function: type[Function]) -> Callable[..., Tensor]:
    return function.apply  # pyright: ignore[reportReturnType]


def _double(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast two tensors; a number goes to the other's device."""
    a, b = (a.to(b.device), b) if a.ndim == 0 else (a, b.to(a.device) if b.ndim == 0 else b)
    a, b = torch.broadcast_tensors(a, b)
    return a, b


def _probabilities(name: str, value: Number) -> Tensor:
    value = _double(value)
    if not ((value >= 0) & (value <= 1)).all():
        raise InputError(f"{name} has to be a probability from 0 to 1")
    return value
