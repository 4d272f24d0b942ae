"""Estimators of the gradient of an expected loss by the logits of independent random masks.

    ∇_s F,   F(s) = E_m[L(m)],   m_j ~ Bernoulli(λ_j),  λ = σ(s);   ∂F/∂s_j = λ_j (1 − λ_j) ∂F/∂λ_j

All have one signature, (loss, logits, generator) -> gradient. The loss maps masks, one a row, to their
losses; those that differentiate it call it with masks that are not 0 or 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.compress.masks import CONCRETE_TEMPERATURE, STRETCH
from gramian.compress.masks import hard_concrete as hard_concrete_mask
from gramian.compress.structures import Weights
from gramian.errors import InputError

Loss = Callable[[Tensor], Tensor]
"""Masks (k, p) -> losses (k,)."""
Estimator = Callable[[Loss, Tensor, torch.Generator], Tensor]
"""(loss, logits (p,), generator) -> gradient (p,)."""

MOST_ENUMERATED = 16
"""Mask variables that are enumerated at most."""


@runtime_checkable
class MomentLoss(Protocol):
    """A loss that also knows its value under Gaussian pre-activations of matched moments."""

    def __call__(self, masks: Tensor) -> Tensor:
        """Return the loss of every mask."""
        ...

    def moments(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return one draw of the loss under matched moments, differentiable by the logits."""
        ...


def all_masks(p: int, like: Tensor) -> Float[Tensor, "masks p"]:
    """Return all 2^p masks, one a row.

    Raises: InputError for more variables than can be enumerated.
    """
    if p > MOST_ENUMERATED:
        raise InputError(f"at most {MOST_ENUMERATED} mask variables can be enumerated, got {p}")
    return torch.cartesian_prod(*[torch.tensor([0, 1], dtype=like.dtype, device=like.device)] * p).reshape(
        -1, p
    )


def expected_loss(loss: Loss, probabilities: Float[Tensor, " p"]) -> Float[Tensor, ""]:
    """Return the expected loss by enumeration, differentiable by λ.

        F(λ) = Σ_m L(m) Π_j λ_j^{m_j} (1 − λ_j)^{1−m_j}

    It is linear in each λ_j, so that its minimum over [0, 1]^p is at a mask.

    Raises: InputError for more variables than can be enumerated.
    Holds: exactly.
    """
    masks = all_masks(len(probabilities), probabilities)
    chance = torch.where(masks > 0, probabilities, 1 - probabilities).prod(-1)
    return chance @ loss(masks).to(chance.dtype)


def enumeration(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator | None = None
) -> Float[Tensor, " p"]:
    """Return the exact gradient; the oracle of the others.

    Raises: InputError for more variables than can be enumerated.
    Holds: exactly.
    """
    s = logits.detach().requires_grad_()
    with torch.no_grad():
        values = loss(all_masks(len(s), s))
    return torch.autograd.grad(expected_loss(lambda _: values, s.sigmoid()), s)[0]


@torch.no_grad()
def score_function(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator, draws: int = 4
) -> Float[Tensor, " p"]:
    """Return the score-function estimate, each loss compared with the mean of the others.

        (1/K) Σ_k (L_k − mean_{i≠k} L_i)(m_k − λ)

    Raises: InputError for fewer than two draws.
    Holds: exactly, on average; variance O(1/K).
    Source: Kool, van Hoof, Welling 2019 (leave-one-out baseline); Williams 1992.
    """
    if draws < 2:
        raise InputError(f"leaving one out needs at least 2 draws, got {draws}")
    masks = _drawn(draws, logits, generator)
    losses = loss(masks)
    others = (losses.sum() - losses) / (draws - 1)
    return ((losses - others) @ (masks - logits.sigmoid())) / draws


@torch.no_grad()
def arm(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator, draws: int = 1
) -> Float[Tensor, " p"]:
    """Return the estimate of two antithetic masks.

        (L(b₁) − L(b₂)) (u − ½),  b₁ = 1[u > σ(−s)],  b₂ = 1[u < σ(s)]

    Raises: InputError for fewer than one draw.
    Holds: exactly, on average.
    Source: Yin & Zhou 2019, arXiv 1807.11143 (ARM).
    """
    u, first, second = _antithetic(logits, generator, draws)
    gaps = loss(first) - loss(second)
    return (gaps @ (u - 0.5)) / draws


@torch.no_grad()
def disarm(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator, draws: int = 1
) -> Float[Tensor, " p"]:
    """Return the estimate of ARM averaged over all noise that gives the same two masks.

        ½ (L(b₁) − L(b₂)) (−1)^{b₂} 1[b₁ ≠ b₂] σ(|s|)

    Two evaluations and no backward pass; any loss will do, the 0-1 loss too.

    Raises: InputError for fewer than one draw.
    Holds: exactly, on average; variance at most that of ARM.
    Source: Dong, Mnih, Tucker 2020, arXiv 2006.10680.
    """
    _, first, second = _antithetic(logits, generator, draws)
    gaps = loss(first) - loss(second)
    sign = torch.where(first != second, 1 - 2 * second, 0.0)
    return 0.5 * (gaps @ sign) / draws * logits.abs().sigmoid()


def relaxed(
    loss: Loss,
    logits: Float[Tensor, " p"],
    generator: torch.Generator,
    temperature: float = 0.5,
    draws: int = 1,
) -> Float[Tensor, " p"]:
    """Return the gradient through a relaxed mask.

        ∂L(z)/∂s,  z = σ((s + ln u − ln(1 − u)) / τ)

    Raises: InputError unless the temperature is positive, and for fewer than one draw.
    Holds: empirically: the bias falls with τ and the variance grows.
    Source: Maddison, Mnih, Teh 2017, arXiv 1611.00712; Jang, Gu, Poole 2017, arXiv 1611.01144.
    """
    if not temperature > 0:
        raise InputError(f"a temperature must be positive, got {temperature}")
    s = logits.detach().requires_grad_()
    z = Weights().soft(s, _uniform(draws, s, generator), temperature)
    return torch.autograd.grad(loss(z).mean(), s)[0]


def straight_through(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator, draws: int = 1
) -> Float[Tensor, " p"]:
    """Return the gradient by the mask where it was drawn, as if it were that by the probability.

        λ_j (1 − λ_j) ∂L/∂m_j (m)

    Raises: InputError for fewer than one draw.
    Holds: never for a loss that is curved in m_j. Under squared loss of a linear model ∂F/∂λ_j comes out too
    small by s_j (1 − 2λ_j) w_j² exactly: too many weights with λ < ½ are kept, too many with λ > ½ dropped.
    Source: Bengio, Léonard, Courville 2013, arXiv 1308.3432.
    """
    mask = _drawn(draws, logits, generator).requires_grad_()
    slope = torch.autograd.grad(loss(mask).mean(), mask)[0].sum(0)
    return _chain(slope, logits)


def straight_through_half(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator
) -> Float[Tensor, " p"]:
    """Return the gradient by each mask variable at ½, the others as they were drawn.

        λ_j (1 − λ_j) ∂L/∂m_j (m with m_j = ½)

    One evaluation a variable.

    Holds: exactly, on average, where the loss is at most quadratic in each m_j: L(1) − L(0) is then the slope
    in the middle.
    """
    mask = _drawn(1, logits, generator)
    middle = mask.repeat(mask.shape[1], 1).fill_diagonal_(0.5).requires_grad_()
    slope = torch.autograd.grad(loss(middle).sum(), middle)[0].diagonal()
    return _chain(slope, logits)


def moment_matching(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator
) -> Float[Tensor, " p"]:
    """Return the gradient through Gaussian pre-activations of the mask's mean and variance.

    The loss needs a method `moments`, as `draws.MaskedLoss` has.

    Raises: InputError for a loss without one.
    Holds: exactly, on average, for one linear layer under squared loss; elsewhere approximately, by the
        central limit theorem.
    Source: Kingma, Salimans, Welling 2015, arXiv 1506.02557 (local reparametrisation).
    """
    if not isinstance(loss, MomentLoss):
        raise InputError("moment matching needs a loss that knows the layers, such as draws.MaskedLoss")
    s = logits.detach().requires_grad_()
    return torch.autograd.grad(loss.moments(s, generator), s)[0]


def hard_concrete(
    loss: Loss, logits: Float[Tensor, " p"], generator: torch.Generator, draws: int = 1
) -> Float[Tensor, " p"]:
    """Return the gradient through a hard concrete mask: a peer's objective, not an estimate of ∇F.

        ∂L(z)/∂s,  z = clip(σ((s + ln u − ln(1 − u)) / b)(ζ − γ) + γ, 0, 1)

    Raises: InputError for fewer than one draw.
    Holds: exactly, on average, for E_z[L(z)].
    Source: Louizos, Welling, Kingma 2018, arXiv 1712.01312.
    """
    s = logits.detach().requires_grad_()
    z = hard_concrete_mask(s, _uniform(draws, s, generator))
    return torch.autograd.grad(loss(z).mean(), s)[0]


def hard_concrete_kept(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the probability that a hard concrete mask is not 0; its sum is the L0 penalty.

        P(z ≠ 0) = σ(s − b ln(−γ/ζ))

    Holds: exactly.
    Source: Louizos, Welling, Kingma 2018, arXiv 1712.01312, Eq. 12.
    """
    low, high = STRETCH
    offset = CONCRETE_TEMPERATURE * torch.tensor(-low / high, dtype=logits.dtype, device=logits.device).log()
    return (logits - offset).sigmoid()


def hard_concrete_mean(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the mask that stands for the random one after training.

        ẑ = clip(σ(s)(ζ − γ) + γ, 0, 1)

    Holds: exactly.
    Source: Louizos, Welling, Kingma 2018, arXiv 1712.01312, Eq. 13.
    """
    low, high = STRETCH
    return (logits.sigmoid() * (high - low) + low).clamp(0, 1)


def mirror(gradient: Float[Tensor, " p"], logits: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Return the gradient by λ from that by the logits; descent along it is mirror descent in λ.

        ∂F/∂λ_j = (∂F/∂s_j) / (λ_j (1 − λ_j))

    Without the factor, which is at most ¼, confident masks do not stall.

    Holds: exactly; 0 where λ has reached 0 or 1 in floating point.
    """
    factor = logits.sigmoid() * (-logits).sigmoid()
    return torch.where(factor > 0, gradient / factor, 0.0)


ESTIMATORS: dict[str, Estimator] = {
    "enumeration": enumeration,
    "score_function": score_function,
    "arm": arm,
    "disarm": disarm,
    "relaxed": relaxed,
    "relaxed_cold": partial(relaxed, temperature=0.1),
    "straight_through": straight_through,
    "straight_through_half": straight_through_half,
    "moment_matching": moment_matching,
    "hard_concrete": hard_concrete,
}
"""Every estimator by name; the unbiased ones are enumeration, score_function, arm and disarm."""


def _uniform(count: int, logits: Tensor, generator: torch.Generator) -> Tensor:
    if count < 1:
        raise InputError(f"at least one draw is needed, got {count}")
    size = (count, *logits.shape)
    return torch.rand(size, generator=generator, dtype=logits.dtype, device=logits.device)


def _drawn(count: int, logits: Tensor, generator: torch.Generator) -> Tensor:
    return Weights().hard(logits.detach(), _uniform(count, logits, generator)).to(logits.dtype)


def _antithetic(logits: Tensor, generator: torch.Generator, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    u = _uniform(draws, logits, generator)
    return u, (u > (-logits).sigmoid()).to(u.dtype), (u < logits.sigmoid()).to(u.dtype)


def _chain(slope: Tensor, logits: Tensor) -> Tensor:
    return slope * logits.sigmoid() * (-logits).sigmoid()
