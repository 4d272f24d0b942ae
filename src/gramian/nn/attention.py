"""Multi-head attention whose mixing of tokens is a part: softmax, soft-capped softmax, or shaped."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gramian.errors import InputError
from gramian.nn.norms import Norm, identity
from gramian.nn.view import View

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
        return (real[:, None, None] & causal) | nn.functional.pad(own, (past, 0))

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
        grouped = k.shape[1] == v.shape[1] != q.shape[1]
        if not grouped:
            k, v = shared(k, q), shared(v, q)
        return scaled_dot_product_attention(
            q,
            k,
            v.to(q.dtype),
            attn_mask=self.seen(queries, keys, real, q.device),
            is_causal=self.causal and queries == keys,
            enable_gqa=grouped,
        )


def shared(x: Tensor, q: Tensor) -> Tensor:
    """Return keys or values repeated for the query heads that share them.

    Shapes: (batch, heads / group, keys, ·) -> (batch, heads, keys, ·).
    """
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


class SoftCapMixing(SoftmaxMixing):
    """Softmax attention whose logits are kept within ±cap.

        A = softmax(c · tanh(Q Kᵀ / (c √d_k)) + M)

    It forms the T×T matrix: fused attention offers no hook on the logits for training on every device.

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

    def forward(
        self, q: Queries, k: Keys, v: Values, real: Real | None = None, total: Tensor | None = None
    ) -> Mixed:
        """Mix the values with the explicit matrix."""
        return self.weights(q, k, real).to(v.dtype) @ shared(v, q)


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


class Attention(nn.Module):
    """Multi-head self-attention composed of a mixing and the maps around it.

        q_h = N_Q(x W_Q + b_Q)_h,   k_h = N_K(x W_K + b_K)_h,   v = V(x)
        y = P(concat_h mixing(q_h, k_h, v_h))

    N_Q and N_K act on each head's d_k features. `value` and `projection` are modules on features; the
    identity makes the simplified blocks. Queries and keys are one product. `key_heads` below `heads` lets
    groups of queries share keys, and values too where the value map gives as many features. Queries start
    at zero where the mixing is centred, so that it starts at the identity. Rows of padding come out as zero.

    Shapes: (batch, tokens, width) -> (batch, tokens, width).
    Raises: InputError when heads does not divide width or key_heads does not divide heads.
    Holds: exactly.
    Source: Vaswani et al. 2017, arXiv 1706.03762; He & Hofmann 2024, arXiv 2311.01906.
    """

    mixes_tokens = True

    def __init__(
        self,
        width: int,
        heads: int,
        mixing: nn.Module,
        *,
        key_heads: int | None = None,
        value: nn.Module | None = None,
        projection: nn.Module | None = None,
        query_key_norm: Norm = identity,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise InputError(
                f"width must be a positive multiple of heads, got width {width} and heads {heads}"
            )
        key_heads = heads if key_heads is None else key_heads
        if key_heads < 1 or heads % key_heads:
            raise InputError(f"key_heads must divide the {heads} heads, got {key_heads}")
        self.head_width = width // heads
        shared_width = key_heads * self.head_width
        self.sizes = [width, shared_width]
        self.query_key = nn.Linear(width, sum(self.sizes))
        self.query_norm, self.key_norm = query_key_norm(self.head_width), query_key_norm(self.head_width)
        self.value = nn.Linear(width, shared_width, bias=False) if value is None else value
        self.projection = nn.Linear(width, width, bias=False) if projection is None else projection
        self.mixing = mixing

    def initialise_(self, generator: torch.Generator) -> None:
        """Set W_Q = 0 under a centred mixing."""
        if isinstance(self.mixing, ShapedMixing) and self.mixing.gamma is not None:
            nn.init.zeros_(self.query_key.weight[: self.sizes[0]])

    def _heads(
        self, x: Float[Tensor, "batch tokens features"]
    ) -> Float[Tensor, "batch heads tokens head_width"]:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], view: View | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """Attend."""
        q, k = self.query_key(x).split(self.sizes, -1)
        return self.projection(self._mix(q, k, self.value(x), view or View()))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        """Mix the values: features (batch, tokens, ·) to features."""
        past, total = view.past, None
        real = view.real
        if past is not None:
            total, started = past.total, past.length > 0
            keys, values = past.append(
                self.key_norm(self._heads(k)),
                self._heads(v),
                None if real is None else real[:, -k.shape[1] :],
            )
            if started:
                mixed = self.mixing(self.query_norm(self._heads(q)), keys, values, real, total)
                return _zeroed(mixed.transpose(1, 2).flatten(-2), real)
        if not view.rows:
            return _zeroed(self._attend(q, k, v, real), real)
        mixed = [self._attend(rows.take(q), rows.take(k), rows.take(v), rows.real) for rows in view.rows]
        return _zeroed(view.restored(mixed), real)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """Mix within one batch of sequences that begin with their first token."""
        q, k = self.query_norm(self._heads(q)), self.key_norm(self._heads(k))
        return self.mixing(q, k, self._heads(v), real).transpose(1, 2).flatten(-2)


def _zeroed(x: Tensor, real: Tensor | None) -> Tensor:
    """Return features with zeros at padding, so that they are defined whatever the padding holds."""
    return x if real is None else x * real[:, -x.shape[1] :, None]
