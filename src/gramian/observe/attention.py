"""Readings of attention matrices: entropy, and heads that rest on the first token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.moments import accumulator
from gramian.errors import InputError


@dataclass(frozen=True, eq=False)
class AttentionMoments:
    """Sums over queries of attention matrices; `+` merges those of two batches."""

    count: Float[Tensor, ""]
    """Number of queries, all sequences together."""
    entropy: Float[Tensor, " heads"]
    """Sum over queries of −Σ_j A_ij log A_ij."""
    first: Float[Tensor, " heads"]
    """Sum over queries of the attention A_i0 to the first token."""

    @classmethod
    def of(
        cls, weights: Float[Tensor, "batch heads queries keys"], mask: Tensor | None = None
    ) -> "AttentionMoments":
        """Take the sums of softmax weights; `mask` keeps the queries where it is 1 or true.

        Shapes: weights (batch, heads, queries, keys), mask (batch, queries).
        Raises: InputError for a mask of another shape.
        """
        batch, _, queries, _ = weights.shape
        if mask is None:
            mask = torch.ones(batch, queries)
        if mask.shape != (batch, queries):
            raise InputError(f"a mask of shape {tuple(mask.shape)} does not fit {batch} x {queries} queries")
        wide = accumulator(weights.device)
        weights = weights.detach()
        entropy = torch.special.entr(weights.float() if weights.itemsize < 4 else weights).sum(-1, dtype=wide)
        kept = mask.to(weights.device).bool()[:, None]
        return cls(
            count=kept.sum().to(wide),
            entropy=torch.where(kept, entropy, 0).sum((0, 2)),
            first=torch.where(kept, weights[..., 0].to(wide), 0).sum((0, 2)),
        )

    def __add__(self, other: "AttentionMoments") -> "AttentionMoments":
        return AttentionMoments(
            self.count + other.count, self.entropy + other.entropy, self.first + other.first
        )

    def attention_entropy(self) -> Float[Tensor, ""]:
        """Mean entropy over heads and queries; see the function of this name."""
        return (self.entropy / self.count).mean()

    def sink_rate(self, threshold: float = 0.3) -> Float[Tensor, ""]:
        """Fraction of heads that rest on the first token; see the function of this name."""
        attention = self.first / self.count
        rate = (attention > threshold).to(attention.dtype).mean()
        return torch.where(attention.isnan().any(), torch.nan, rate)


def attention_entropy(
    weights: Float[Tensor, "batch heads queries keys"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Entropy in nats of the softmax weights, before any shaping gain, averaged over all queries.

    H = mean_{b,h,i} (−Σ_j A_ij log A_ij),  0 log 0 = 0

    Range [0, log T]: 0 when every query attends to one key. For uniform causal attention, as at
    initialisation with small logits, mean_i log(i + 1), i = 0 … T−1. NaN without queries.

    Shapes: weights (batch, heads, queries, keys), mask (batch, queries) -> ().
    Raises: InputError for a mask of another shape.
    Holds: exactly.
    Source: He, Noci, Paliotta, Schlag, Hofmann 2024, arXiv 2405.19279 (entropy collapse).
    """
    return AttentionMoments.of(weights, mask).attention_entropy()


def sink_rate(
    weights: Float[Tensor, "batch heads queries keys"], threshold: float = 0.3, mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Fraction of heads whose attention to token 0, averaged over batch and queries, exceeds a threshold.

    mean_h [ mean_{b,i} A_i0 > threshold ]

    Range [0, 1]. The average over sequences and queries is taken first, the threshold after. No query
    is excluded: under a causal mask query 0 always looks at token 0, which adds 1/T. Uniform causal
    attention gives mean_i 1/(i+1), about (log T + .58)/T: below .3 for T ≥ 9. NaN for NaN weights.

    Shapes: weights (batch, heads, queries, keys), mask (batch, queries) -> ().
    Raises: InputError for a mask of another shape.
    Holds: exactly.
    Source: Gu et al. 2024, arXiv 2410.10781 (sink metric with threshold .3).
    """
    return AttentionMoments.of(weights, mask).sink_rate(threshold)
