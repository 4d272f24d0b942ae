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
    """Sum over queries of the attention A_if to the first token f."""

    @classmethod
    def of(
        cls,
        weights: Float[Tensor, "batch heads queries keys"],
        mask: Tensor | None = None,
        first: Tensor | None = None,
    ) -> "AttentionMoments":
        """Take the sums of softmax weights; `mask` keeps the queries where it is 1 or true.

        `first` is the key that is the first token of each sequence. Without it that is the first token that
        the mask keeps, where there are as many queries as keys, and otherwise key 0: with padding on the left
        the first token is not in column 0.

        Shapes: weights (batch, heads, queries, keys), mask (batch, queries), first (batch).
        Raises: InputError for a mask of another shape.
        """
        batch, _, queries, _ = weights.shape
        if mask is None:
            mask = torch.ones(batch, queries)
        if mask.shape != (batch, queries):
            raise InputError(f"a mask of shape {tuple(mask.shape)} does not fit {batch} x {queries} queries")
        wide = accumulator(weights.device)
        weights = weights.detach()
        mask = mask.to(weights.device)
        if first is None:
            first = mask.bool().int().argmax(1) if queries == weights.shape[-1] else mask.new_zeros(batch)
        column = first.to(weights.device, torch.int64)[:, None, None, None].expand(*weights.shape[:3], 1)
        entropy = torch.special.entr(weights.float() if weights.itemsize < 4 else weights).sum(-1, dtype=wide)
        kept = mask.bool()[:, None]
        return cls(
            count=kept.sum().to(wide),
            entropy=torch.where(kept, entropy, 0).sum((0, 2)),
            first=torch.where(kept, weights.gather(-1, column)[..., 0].to(wide), 0).sum((0, 2)),
        )

    def __add__(self, other: "AttentionMoments") -> "AttentionMoments":
        if len(self.first) != len(other.first):
            raise InputError(f"attentions of {len(self.first)} and {len(other.first)} heads cannot be merged")
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
    """Fraction of heads whose attention to the first token f, averaged over all queries, exceeds a threshold.

    mean_h [ mean_{b,i} A_if > threshold ]

    Range [0, 1]. f is 0, or the first token that the mask keeps (padding on the left). The average over
    sequences and queries is taken first, the threshold after. No query is excluded: under a causal mask the
    first token always looks at itself, which adds 1/T. Uniform causal attention gives mean_i 1/(i+1), about
    (log T + .58)/T: below .3 for T ≥ 9. NaN for NaN weights.

    Shapes: weights (batch, heads, queries, keys), mask (batch, queries) -> ().
    Raises: InputError for a mask of another shape.
    Holds: exactly.
    Source: Gu et al. 2024, arXiv 2410.10781 (sink metric with threshold .3).
    """
    return AttentionMoments.of(weights, mask).sink_rate(threshold)
