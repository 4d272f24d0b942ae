"""Losses in [0, 1], and the empirical risk of a random predictor by hypotheses that are drawn afresh."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gramian.errors import InputError
from gramian.ranks import spread

DrawLosses = Callable[[int, torch.Generator], Tensor]
"""Draw K hypotheses and return the loss of each on every example of the bound set, (K, n)."""


def zero_one_error(
    logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "..."]
) -> Bool[Tensor, "*batch"]:
    """Return whether the largest logit is not that of the label.

    Shapes: logits (*batch, C), labels that broadcast to (*batch) -> (*batch).
    Raises: InputError for labels outside 0 … C − 1.
    Holds: exactly; of equal logits one counts as the largest.
    """
    return logits.argmax(-1) != _labels(logits, labels)


def clipped_cross_entropy(
    logits: Float[Tensor, "*batch classes"], labels: Int[Tensor, "..."], p_min: float = 1e-5
) -> Float[Tensor, "*batch"]:
    """Return the cross-entropy of every example, clipped and scaled to [0, 1].

        ℓ = −ln max(p_label, p_min) / ln(1/p_min)

    Shapes: logits (*batch, C), labels that broadcast to (*batch) -> (*batch).
    Raises: InputError for p_min outside (0, 1) and labels outside 0 … C − 1.
    Holds: exactly; it has no slope where it is clipped.
    Source: Pérez-Ortiz, Rivasplata, Shawe-Taylor, Szepesvári 2021, JMLR 22(227).
    """
    if not 0 < p_min < 1:
        raise InputError(f"p_min has to be above 0 and below 1, not {p_min}")
    own = logits.log_softmax(-1).gather(-1, _labels(logits, labels)[..., None])[..., 0]
    return (own / math.log(p_min)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class SampledRisk:
    """Empirical risks of independently drawn hypotheses, each over the same n examples."""

    risks: Float[Tensor, " draws"]
    n: int

    @property
    def draws(self) -> int:
        """Hypotheses drawn."""
        return len(self.risks)

    @property
    def mean(self) -> float:
        """Mean risk r̂_m, unbiased for the empirical risk of the random predictor."""
        return min(1.0, self.risks.mean().item())

    @property
    def variance(self) -> float:
        """Unbiased variance of the risks over draws.

        Raises: InputError for fewer than 2 draws.
        """
        if self.draws < 2:
            raise InputError(f"a variance of risks needs 2 draws or more, not {self.draws}")
        return self.risks.double().var().item()


def sampled_errors(
    draw_losses: DrawLosses,
    draws: int,
    generator: torch.Generator,
    batch: int = 64,
    progress: Callable[[int], None] = lambda draws: None,
    passing: Callable[[int, torch.Generator], object] | None = None,
) -> SampledRisk:
    """Score hypotheses that are drawn afresh, a batch at a time, each on the whole bound set.

        r̂_k = 1/n Σ_i ℓ(h_k, z_i),  h_k ~ Q independent

    Every row of losses has to be of one hypothesis on all examples: a new draw for every part of the bound
    set is none. Every row counts alike, also of a last batch that is smaller. With `passing`, which takes the
    random numbers of K hypotheses from the generator and scores none, the processes of `gramian.ranks` share
    the batches.

    Shapes: draw_losses(K, generator) (K, n), numbers or booleans.
    Raises: InputError for no draw, losses that are not (K, n) with the same n, and losses outside [0, 1].
    Holds: exactly in the mean over draws.
    """
    if draws < 1 or batch < 1:
        raise InputError(f"risks need 1 draw in batches of 1 or more, not {draws} in batches of {batch}")
    n: int | None = None

    def scored(start: int) -> dict[str, Tensor]:
        nonlocal n
        count = min(batch, draws - start)
        with torch.no_grad():
            losses = bounded(draw_losses(count, generator))
        n = losses.shape[-1] if n is None else n
        if losses.shape != (count, n) or n == 0:
            raise InputError(
                f"losses of {count} hypotheses have to be ({count}, {n or 'n'}), not {tuple(losses.shape)}"
            )
        progress(start + count)
        return {"risks": losses.sum(1, dtype=torch.float64) / n, "n": torch.tensor(n)}

    starts = range(0, draws, batch)
    if passing is None:
        found = [scored(start) for start in starts]
    else:
        found = spread(scored, starts, lambda start: passing(min(batch, draws - start), generator))
    return SampledRisk(torch.cat([each["risks"].cpu() for each in found]), int(found[0]["n"]))


def bounded(losses: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Return losses that a bound can be given for.

    Shapes: any, numbers or booleans; the same.
    Raises: InputError for NaN and anything outside [0, 1].
    """
    if losses.dtype != torch.bool and losses.numel():
        low, high = losses.min().item(), losses.max().item()
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"losses go from {low:.4g} to {high:.4g}, but a bound needs them in [0, 1]; take the 0-1 "
                "error, or clip the cross-entropy at p_min and divide by ln(1/p_min) (clipped_cross_entropy)"
            )
    return losses


def _labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the labels in the shape of the rows of logits."""
    classes = logits.shape[-1]
    if labels.is_floating_point() or not ((labels >= 0) & (labels < classes)).all():
        raise InputError(f"labels have to be classes from 0 to {classes - 1}")
    try:
        return labels.long().expand(logits.shape[:-1])
    except RuntimeError:
        raise InputError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}, one for each row"
        ) from None
