"""Multi-head attention whose mixing of tokens is a part: softmax, soft-capped softmax, or shaped."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gramian.errors import InputError
from gramian.nn.norms import Norm, identity

Heads = Float[Tensor, "batch heads tokens head_width"]
Values = Float[Tensor, "batch heads tokens value_width"]
Weights = Float[Tensor, "batch heads tokens tokens"]


class SoftmaxMixing(nn.Module):
    """Scaled dot-product attention.

        O = A V,   A = softmax(Q Kᵀ / √d_k + M),   M causal or zero

    Shapes: q, k, v (batch, heads, tokens, d_k) -> (batch, heads, tokens, d_k).
    Holds: exactly.
    """

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal

    def logits(self, q: Heads, k: Heads) -> Weights:
        """Return Q Kᵀ/√d_k with −∞ at the keys that a query may not see: an explicit T×T matrix."""
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return self._masked(logits)

    def _masked(self, logits: Weights) -> Weights:
        if not self.causal:
            return logits
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        return logits.masked_fill(hidden, -math.inf)

    def weights(self, q: Heads, k: Heads) -> Weights:
        """Return A, an explicit T×T matrix: for observation, not for training."""
        return self.logits(q, k).softmax(-1)

    def forward(self, q: Heads, k: Heads, v: Values) -> Values:
        """Mix the values with fused attention."""
        return scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=self.causal)


class SoftCapMixing(SoftmaxMixing):
    """Softmax attention whose logits are kept within ±cap.

        A = softmax(c · tanh(Q Kᵀ / (c √d_k)) + M)

    It forms the T×T matrix: fused attention offers no hook on the logits for training on every device.

    Shapes: q, k, v (batch, heads, tokens, d_k) -> (batch, heads, tokens, d_k).
    Raises: InputError unless cap > 0.
    Holds: exactly.
    Source: He et al. 2024, arXiv 2405.19279, section 4 (entropy control, cap 30).
    """

    def __init__(self, cap: float = 30.0, causal: bool = True) -> None:
        super().__init__(causal)
        if not cap > 0:
            raise InputError(f"the cap on attention logits must be positive, got {cap:g}")
        self.cap = cap

    def logits(self, q: Heads, k: Heads) -> Weights:
        """Return the capped logits with −∞ at hidden keys."""
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return self._masked(self.cap * torch.tanh(logits / self.cap))

    def forward(self, q: Heads, k: Heads, v: Values) -> Values:
        """Mix the values with the explicit matrix."""
        return self.weights(q, k).to(v.dtype) @ v


def uniform_mean(
    v: Float[Tensor, "*batch tokens width"], causal: bool, gain: Float[Tensor, "heads 1 1"] | None = None
) -> Float[Tensor, "*batch #tokens width"]:
    """Return γ C V, with C V what attention gives when every logit is zero, without the matrix C.

        causal        (C V)_i = (1/i) Σ_{j≤i} v_j        (i = 1…T)
        bidirectional (C V)_i = (1/T) Σ_j v_j            (one row, to be broadcast)

    Sums are kept in float32 or better and returned in the dtype of v; γ is 1 when not given.

    Shapes: (…, T, width) -> (…, T, width) causal, (…, 1, width) otherwise; gain one number a leading index.
    Holds: exactly.
    Source: He & Hofmann 2024, arXiv 2311.01906, section 3 (centring by the uniform matrix).
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    gain = torch.ones((), dtype=exact, device=v.device) if gain is None else gain.to(exact)
    if not causal:
        return (gain * v.mean(-2, keepdim=True, dtype=exact)).to(v.dtype)
    count = torch.arange(1, v.shape[-2] + 1, dtype=exact, device=v.device)
    return (gain / count[:, None] * v.cumsum(-2, dtype=exact)).to(v.dtype)


class ShapedMixing(SoftmaxMixing):
    """Shaped attention: the identity at the start, drifting to softmax attention as its gains learn.

        O_h = α_h V_h + β_h A_h V_h − γ_h C V_h

    C is the value of A at zero logits (`uniform_mean`), so zero queries with β = γ, α = 1 give O = V.
    Without `centre` the last term is left out (Value-SkipInit). No T×T matrix is formed: A V is fused
    attention and C V a running mean.

    Shapes: q, k, v (batch, heads, tokens, d_k) -> (batch, heads, tokens, d_k).
    Raises: InputError unless heads ≥ 1.
    Holds: identity at zero queries up to rounding.
    Source: Noci et al. 2023, arXiv 2306.17759; He & Hofmann 2024, arXiv 2311.01906, Eq. 4.
    """

    def __init__(
        self, heads: int, causal: bool = True, *, alpha: float = 1.0, beta: float = 1.0, centre: bool = True
    ) -> None:
        super().__init__(causal)
        if heads < 1:
            raise InputError(f"attention needs at least one head, got {heads}")
        self.alpha = nn.Parameter(torch.full((heads,), float(alpha)))
        self.beta = nn.Parameter(torch.full((heads,), float(beta)))
        self.gamma = nn.Parameter(torch.full((heads,), float(beta))) if centre else None

    def forward(self, q: Heads, k: Heads, v: Values) -> Values:
        """Mix the values by αI + βA − γC."""
        v = v.to(q.dtype)
        alpha, beta = (gain.to(v.dtype)[:, None, None] for gain in (self.alpha, self.beta))
        mixed = torch.addcmul(alpha * v, beta, super().forward(q, k, v))
        if self.gamma is None:
            return mixed
        return mixed - uniform_mean(v, self.causal, self.gamma[:, None, None])


class Attention(nn.Module):
    """Multi-head self-attention composed of a mixing and the maps around it.

        q_h = N_Q(x W_Q + b_Q)_h,   k_h = N_K(x W_K + b_K)_h,   v = V(x)
        y = P(concat_h mixing(q_h, k_h, v_h))

    N_Q and N_K act on each head's d_k features. `value` and `projection` are modules width -> width; the
    identity makes the simplified blocks. Queries start at zero where the mixing is centred, so that it starts
    at the identity.

    Shapes: (batch, tokens, width) -> (batch, tokens, width).
    Raises: InputError when heads does not divide width.
    Holds: exactly.
    Source: Vaswani et al. 2017, arXiv 1706.03762; He & Hofmann 2024, arXiv 2311.01906.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mixing: nn.Module,
        *,
        value: nn.Module | None = None,
        projection: nn.Module | None = None,
        query_key_norm: Norm = identity,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise InputError(
                f"width must be a positive multiple of heads, got width {width} and heads {heads}"
            )
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.query_norm, self.key_norm = query_key_norm(width // heads), query_key_norm(width // heads)
        self.value = nn.Linear(width, width, bias=False) if value is None else value
        self.projection = nn.Linear(width, width, bias=False) if projection is None else projection
        self.mixing = mixing

    def initialise_(self, generator: torch.Generator) -> None:
        """Set W_Q = 0 under a centred mixing."""
        if isinstance(self.mixing, ShapedMixing) and self.mixing.gamma is not None:
            nn.init.zeros_(self.query.weight)

    def _split(self, x: Float[Tensor, "batch tokens width"]) -> Heads:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Attend."""
        q = self.query_norm(self._split(self.query(x)))
        k = self.key_norm(self._split(self.key(x)))
        mixed = self.mixing(q, k, self._split(self.value(x)))
        return self.projection(mixed.transpose(1, 2).flatten(-2))
