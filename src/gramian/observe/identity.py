"""The trace identity between neurons and tokens, as a check of the readings on themselves."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gramian.core.moments import Moments, accumulator


def trace_error(moments: Moments, tokens: Shaped[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Relative error of the trace identity between streamed readings and the tokens they are of.

    Kurt/d + (1 − 1/d) feat_corr_rms² = mean_ab (Σ_I)²_ab,   Σ_I = X Xᵀ/d at mean X² = 1

    The left side is read from the sums over neurons in `moments`, the right side from the n×n matrix of inner
    products between tokens: about 1e-16 when both are right, and of order 1 when they are of other tokens or
    of another normalisation. NaN without tokens and when all are 0.

    Shapes: tokens (n, d), those of `moments`, -> ().
    Holds: exactly.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279 (signal propagation and kurtosis).
    """
    d = tokens.shape[1]
    left = moments.neuron_kurtosis() / d
    if d > 1:
        left = left + (1 - 1 / d) * moments.feature_correlation_rms().square()
    rows = tokens.detach().to(accumulator(tokens.device))
    products = rows @ rows.T
    right = products.square().mean() / products.diagonal().mean().square()
    return (left - right).abs() / right


class TraceCheck:
    """Checks the identity on the first tokens of a stream, some of every batch until there were enough.

    The two halves of a batch's tokens are summed apart and merged, as batches are. No token is kept.
    """

    def __init__(self, centre: bool = False, tokens: int = 256):
        self._centre, self._left = centre, tokens
        self._error: Tensor | None = None

    def add(self, x: Shaped[Tensor, "*tokens d"], mask: Tensor | None = None) -> None:
        """Check the first tokens of a batch that count, unless enough were checked.

        Shapes: x (*tokens, d), mask (*tokens).
        """
        if not self._left:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None:
            rows = rows[mask.to(x.device).reshape(-1).nonzero()[: self._left, 0]]
        rows = rows[: self._left]
        if not len(rows):
            return
        self._left -= len(rows)
        half = (len(rows) + 1) // 2
        moments = Moments.of(rows[:half], centre=self._centre) + Moments.of(rows[half:], centre=self._centre)
        if self._centre:
            rows = rows.to(accumulator(rows.device))
            rows = rows - rows.mean(-1, keepdim=True)
        error = trace_error(moments, rows)
        self._error = error if self._error is None else torch.maximum(self._error, error)

    def error(self) -> float:
        """Return the largest relative error met; NaN when there was no token, or one was not finite."""
        return float("nan") if self._error is None else self._error.item()
