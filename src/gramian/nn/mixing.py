"""How attention mixes tokens: softmax, soft-capped, clipped, with a sink, or shaped."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from gramian.errors import InputError

Queries = Float[Tensor, "batch heads queries head_width"]
Keys = Float[Tensor, "batch key_heads keys head_width"]
Values = Float[Tensor, "batch value_heads keys value_width"]
Mixed = Float[Tensor, "batch heads queries value_width"]
Weights = Float[Tensor, "batch heads queries keys"]
Real = Bool[Tensor, "batch keys"]


class SoftmaxMixing(nn.Module):
    """Scaled dot-product attention.

        O = A V,   A = softmax(Q Kᵀ / √d_k + M),   M hides padding and, when causal, the future

    The queries are those of the last tokens: all, or the new ones where a cache holds those before. `real`
    says which keys are no padding; where a causal mixing gets as many queries as keys, the real ones must
    come first in every row (`View` lays them out so), and no mask is needed. A query that sees nothing sees
    itself. Groups of query heads may share a key or value head.

    Shapes: q (batch, heads, queries, d_k), k, v (batch, heads/group, keys, ·) -> (batch, heads, queries, ·).
    Holds: exactly.
    """

    zero_queries = False
    """Whether queries are to start at zero."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal

    def seen(self, queries: int, keys: int, real: Real | None, device: torch.device) -> Tensor | None:
        """Return which keys each query sees, to be broadcast to (batch, heads, queries, keys); None for all.

        The plain causal mask, of as many queries as keys, is left to `is_causal`.
        """
        past = keys - queries
        if not self.causal:
            if real is None:
                return None
            return (real | ~real.any(1, keepdim=True))[:, None, None]
        if not past or (queries == 1 and real is None):
            return None
        causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past)
        if real is None:
            return causal
        own = torch.eye(queries, dtype=torch.bool, device=device)
        return (real[:, None, None] & causal) | pad(own, (past, 0))

    def logits(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return Q Kᵀ/√d_k with −∞ at the keys that a query may not see: an explicit matrix."""
        return self._masked(q @ shared(k, q).transpose(-2, -1) / math.sqrt(q.shape[-1]), real)

    def _masked(self, logits: Weights, real: Real | None) -> Weights:
        queries, keys = logits.shape[-2:]
        if self.causal and queries == keys:
            hidden = torch.ones(queries, keys, dtype=torch.bool, device=logits.device).triu(1)
            return logits.masked_fill(hidden, -math.inf)
        seen = self.seen(queries, keys, real, logits.device)
        return logits if seen is None else logits.masked_fill(~seen, -math.inf)

    def weights(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return A, an explicit matrix: for observation, not for training."""
        return self.logits(q, k, real).softmax(-1)

    def forward(
        self, q: Queries, k: Keys, v: Values, real: Real | None = None, total: Tensor | None = None
    ) -> Mixed:
        """Mix the values with fused attention; `total` is for mixings that need a mean over the past."""
        queries, keys = q.shape[2], k.shape[2]
        seen = self.seen(queries, keys, real, q.device)
        return fused(q, k, v.to(q.dtype), seen, self.causal and queries == keys)


def fused(
    q: Queries, k: Keys, v: Values, seen: Tensor | None, causal: bool, scale: float | None = None
) -> Mixed:
    """Return softmax(scale · Q Kᵀ + M) V by torch's fused attention; the scale is 1/√d_k when not given."""
    grouped = k.shape[1] == v.shape[1] != q.shape[1]
    if not grouped:
        k, v = shared(k, q), shared(v, q)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def shared(x: Tensor, q: Tensor) -> Tensor:
    """Return keys or values repeated for the query heads that share them.

    Shapes: (batch, heads / group, keys, ·) -> (batch, heads, keys, ·).
    """
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


class ExplicitMixing(SoftmaxMixing):
    """A mixing that forms the T×T matrix A of its `weights`: fused attention offers no hook on them.

        O = A V

    Shapes: as `SoftmaxMixing`.
    Holds: exactly.
    """

    def forward(
        self, q: Queries, k: Keys, v: Values, real: Real | None = None, total: Tensor | None = None
    ) -> Mixed:
        """Mix the values with the explicit matrix."""
        return self.weights(q, k, real).to(v.dtype) @ shared(v, q)


class SoftCapMixing(ExplicitMixing):
    """Softmax attention whose logits are kept within ±cap.

        A = softmax(c · tanh(Q Kᵀ / (c √d_k)) + M)

    It forms the T×T matrix.

    Shapes: as `SoftmaxMixing`.
    Raises: InputError unless cap > 0.
    Holds: exactly.
    Source: He et al. 2024, arXiv 2405.19279, section 4 (entropy control, cap 30).
    """

    def __init__(self, cap: float = 30.0, causal: bool = True) -> None:
        super().__init__(causal)
        if not cap > 0:
            raise InputError(f"the cap on attention logits must be positive, got {cap:g}")
        self.cap = cap

    def logits(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return the capped logits with −∞ at hidden keys."""
        logits = q @ shared(k, q).transpose(-2, -1) / math.sqrt(q.shape[-1])
        return self._masked(self.cap * torch.tanh(logits / self.cap), real)


class ClippedSoftmaxMixing(ExplicitMixing):
    """Softmax attention, stretched downwards and clipped, so that a head can attend to nothing at all.

        A = clip((ζ − g) softmax(Q Kᵀ / √d_k + M) + g, 0, 1),   ζ = 1,   g = −α / T

    T is `length`, one number for all queries: the tokens that a training sequence has, not the keys that a
    query happens to see. A weight up to α / (T + α) becomes exactly zero and takes no gradient: a query that
    attends equally to T/α + 1 keys or more gets nothing. It forms the T×T matrix. Rows sum to at most 1.

    Shapes: as `SoftmaxMixing`.
    Raises: InputError unless length ≥ 1 and α ≥ 0.
    Holds: exactly; softmax attention at α = 0.
    Source: Bondarenko et al. 2023, arXiv 2306.12929, section 4.1 (α = 12 for OPT-125m).
    """

    def __init__(self, length: int, alpha: float = 12.0, causal: bool = True) -> None:
        super().__init__(causal)
        if length < 1:
            raise InputError(f"clipped softmax needs the length of a sequence, at least 1, got {length}")
        if not 0 <= alpha < math.inf:
            raise InputError(f"the α of clipped softmax must be zero or above, got {alpha:g}")
        self.offset = -alpha / length

    def weights(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return A, whose rows sum to at most 1."""
        softmax = super().weights(q, k, real)
        return ((1 - self.offset) * softmax + self.offset).clamp(0, 1)


class SinkMixing(SoftmaxMixing):
    """Softmax attention with a sink: a logit s_h beside the keys', whose value is zero.

        A_ij = e^{z_ij} / (e^{s_h} + Σ_j e^{z_ij}) = softmax(z)_ij σ(lse_i − s_h),   z = Q Kᵀ / √d_k + M

    A head that finds nothing pays the sink instead of a token: rows sum to less than 1. `sink` is a number
    for all heads or a parameter of one number a head; 0 is softmax-1. Fused attention computes it, with a
    key of zeros before the others (and, where plain causality needs as many queries as keys, an idle query),
    and another feature that carries s_h unless it is the number 0; no T×T matrix is formed.

    Shapes: as `SoftmaxMixing`; sink (heads).
    Raises: InputError for a number that is not finite, or a parameter that is not one row.
    Holds: exactly; the parameter's s_h √d_k is rounded to the type of q.
    Source: Miller 2023, "Attention is off by one"; Kaul et al. 2024, arXiv 2410.17174 (softmax-1); OpenAI
    2025, arXiv 2508.10925 (learned sinks).
    """

    sink: float | nn.Parameter

    def __init__(self, sink: float | nn.Parameter = 0.0, causal: bool = True) -> None:
        super().__init__(causal)
        if isinstance(sink, nn.Parameter):
            if sink.ndim != 1:
                raise InputError(f"learned sinks are one row, a number a head, got {tuple(sink.shape)}")
        elif not math.isfinite(sink):
            raise InputError(f"the logit of an attention sink must be finite, got {sink:g}")
        self.sink = sink

    def weights(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return A without the sink's column, an explicit matrix: rows sum to less than 1."""
        logits = self.logits(q, k, real)
        sink = self._logit(logits)[:, None, None].expand(*logits.shape[:3], 1)
        return torch.cat((sink, logits), -1).softmax(-1)[..., 1:]

    def forward(
        self, q: Queries, k: Keys, v: Values, real: Real | None = None, total: Tensor | None = None
    ) -> Mixed:
        """Mix the values with fused attention."""
        causal, scale, width = self.causal and q.shape[2] == k.shape[2], q.shape[-1] ** -0.5, v.shape[-1]
        seen = self.seen(q.shape[2], k.shape[2], real, q.device)
        seen = None if seen is None else pad(seen, (1, 0), value=True)
        q, k, v = self._with_sink(q, k, v.to(q.dtype))
        mixed = fused(pad(q, (0, 0, 1, 0)) if causal else q, k, v, seen, causal, scale)
        return mixed[:, :, int(causal) :, :width]

    def _with_sink(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values with the sink as the first key."""
        if not isinstance(self.sink, nn.Parameter) and self.sink == 0:
            return q, pad(k, (0, 0, 1, 0)), pad(v, (0, 0, 1, 0))
        width = q.shape[-1]
        room = 8 - width % 8  # one feature, and more to a multiple that fused kernels take as it is
        feature = pad(self._logit(q, math.sqrt(width))[:, None], (0, room - 1))[:, None]
        sink = pad(k.new_ones(1), (width, room - 1)).expand(*k.shape[:2], 1, -1)
        q = torch.cat((q, feature.expand(len(q), q.shape[1], q.shape[2], -1)), -1)
        k = torch.cat((sink, pad(k, (0, room))), 2)
        return q, k, pad(v, (0, max(0, width + room - v.shape[-1]), 1, 0))

    def _logit(self, like: Tensor, factor: float = 1.0) -> Float[Tensor, " heads"]:
        """Return s times a factor as one number, or one a head, of the type of another tensor."""
        if isinstance(self.sink, nn.Parameter):
            return (factor * self.sink).to(like.dtype)
        return like.new_full((1,), factor * self.sink)


def uniform_mean(
    v: Values, queries: int, causal: bool, real: Real | None = None, total: Tensor | None = None
) -> tuple[Float[Tensor, "batch rows value_heads value_width"], Float[Tensor, "..."]]:
    """Return C V as sums and counts, with C what attention is when every logit is zero, without the matrix C.

        causal        (C V)_i = Σ_{j≤i} w_j v_j / max(Σ_{j≤i} w_j, 1)
        bidirectional (C V)_i = Σ_j w_j v_j / max(Σ_j w_j, 1)        (one row, to be broadcast)

    w_j is 1 at real tokens, 0 at padding. `total`, the sum over the real values before those of the queries,
    saves reading them. Sums are kept in float32 or better. Padding stands last where there are as many
    queries as keys and the mean is causal.

    Shapes: v (batch, heads, keys, width) -> sums (batch, queries, heads, width), counts to be broadcast;
    one query when bidirectional.
    Holds: exactly.
    Source: He & Hofmann 2024, arXiv 2311.01906, section 3 (centring by the uniform matrix).
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    v, keys = v.transpose(1, 2), v.shape[2]
    weight = None if real is None else real.to(exact)[:, :, None, None]
    if not causal:
        sums = (v if weight is None else v * weight).sum(1, keepdim=True, dtype=exact)
        count = sums.new_full((1, 1, 1, 1), keys) if weight is None else weight.sum(1, keepdim=True)
        return sums, count.clamp(min=1)
    past = keys - queries
    count = torch.arange(1, keys + 1, dtype=exact, device=v.device)[None, :, None, None]
    if not past:
        return v.cumsum(1, dtype=exact), count
    if weight is not None:
        v, count = v * weight, weight.cumsum(1).clamp(min=1)
    before = v[:, :past].sum(1, keepdim=True, dtype=exact) if total is None else total.transpose(1, 2)
    return before + v[:, past:].cumsum(1, dtype=exact), count[:, past:]


class ShapedMixing(SoftmaxMixing):
    """Shaped attention: the identity at the start, drifting to softmax attention as its gains learn.

        O_h = b (α_h V_h + β_h A_h V_h − γ_h C V_h)

    C is the value of A at zero logits (`uniform_mean`), so zero queries with β = γ, α = 1 give O = V.
    Without `centre` the last term is left out (Value-SkipInit). No T×T matrix is formed: A V is fused
    attention and C V a running mean, over real tokens alone. b is the `gain` of the whole branch, where
    nothing stands between the mixing and the sum that the branch ends in: merged into α, β and γ it costs no
    pass over the activations.

    Shapes: as `SoftmaxMixing`.
    Raises: InputError unless heads ≥ 1.
    Holds: identity at zero queries up to rounding.
    Source: Noci et al. 2023, arXiv 2306.17759; He & Hofmann 2024, arXiv 2311.01906, Eq. 4.
    """

    def __init__(
        self,
        heads: int,
        causal: bool = True,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        centre: bool = True,
        gain: nn.Parameter | None = None,
    ) -> None:
        super().__init__(causal)
        if heads < 1:
            raise InputError(f"attention needs at least one head, got {heads}")
        self.alpha = nn.Parameter(torch.full((heads,), float(alpha)))
        self.beta = nn.Parameter(torch.full((heads,), float(beta)))
        self.gamma = nn.Parameter(torch.full((heads,), float(beta))) if centre else None
        self.zero_queries = centre
        self.gain = gain

    def forward(
        self, q: Queries, k: Keys, v: Values, real: Real | None = None, total: Tensor | None = None
    ) -> Mixed:
        """Mix the values by αI + βA − γC."""
        v, queries, group = v.to(q.dtype), q.shape[2], q.shape[1] // v.shape[1]
        attended = super().forward(q, k, v, real).transpose(1, 2)
        own = v[:, :, -queries:].transpose(1, 2)
        own = own if group == 1 else own.repeat_interleave(group, 2)
        alpha, beta = self._merged(self.alpha), self._merged(self.beta)
        mixed = torch.addcmul(alpha.to(v.dtype) * own, beta.to(v.dtype), attended)
        if self.gamma is not None:
            sums, count = uniform_mean(v, queries, self.causal, real, total)
            sums = sums if group == 1 else sums.repeat_interleave(group, 2)
            mixed = mixed - (self._merged(self.gamma).to(sums.dtype) / count * sums).to(v.dtype)
        return mixed.transpose(1, 2)

    def _merged(self, gains: Float[Tensor, " heads"]) -> Float[Tensor, "heads 1"]:
        """Return gains per head times that of the branch."""
        return (gains if self.gain is None else self.gain * gains)[:, None]
