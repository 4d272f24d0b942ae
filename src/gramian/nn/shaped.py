"""The shaped transformer: attention and activation that act the less on one block the wider the stream is.

At the start a block moves the covariance of tokens by O(1/width), so that depth and width may grow together:
the covariance then follows a stochastic differential equation whose time is blocks / width.
"""

import math

import torch
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.init import ZeroLinear
from gramian.nn.mixing import (
    Keys,
    Mixed,
    Queries,
    Real,
    SoftmaxMixing,
    Values,
    Weights,
    fused,
    shared,
    uniform_mean,
)
from gramian.nn.parts import Parts, attention_of
from gramian.nn.residual import Chain, Residual, normalised_skip
from gramian.nn.skipless import Modulated, input_norm
from gramian.nn.tailored import TailoredLeakyReLU


def shaped_slopes(width: int, positive: float = 0.0, negative: float = -1.0) -> tuple[float, float]:
    """Return the slopes s± = 1 + c±/√n of a shaped ReLU above and below zero.

    Raises: InputError unless the width is positive, both numbers are finite and s₊ > 0.
    Holds: exactly.
    Source: Li, Nica, Roy 2022, arXiv 2206.02768.
    """
    if width < 1:
        raise InputError(f"a shaped ReLU needs the width of the stream, at least 1, got {width}")
    if not (math.isfinite(positive) and math.isfinite(negative)):
        raise InputError(f"the c₊ and c₋ of a shaped ReLU must be finite, got {positive:g}, {negative:g}")
    above, below = 1 + positive / math.sqrt(width), 1 + negative / math.sqrt(width)
    if above <= 0:
        raise InputError(
            f"the slope 1 + c₊/√n of a shaped ReLU must be positive, got c₊ = {positive:g}, n = {width}"
        )
    return above, below


class ShapedReLU(TailoredLeakyReLU):
    """A leaky ReLU that comes nearer to the identity as the stream widens, and keeps the mean square.

        φ(x) = √c (s₊ max(x, 0) + s₋ min(x, 0)),   s± = 1 + c±/√n,   1/c = (s₊² + s₋²)/2

    n is the width of the stream, not that of the MLP. c₊ and c₋ are `positive` and `negative`; φ is the leaky
    ReLU of slope s₋/s₊ below zero, times √c s₊.

    Shapes: (…) -> (…).
    Raises: InputError as `shaped_slopes`.
    Holds: E φ(√q z)² = q for every q, exactly.
    Source: Noci et al. 2023, arXiv 2306.17759; Li, Nica, Roy 2022, arXiv 2206.02768.
    """

    def __init__(self, width: int, positive: float = 0.0, negative: float = -1.0) -> None:
        above, below = shaped_slopes(width, positive, negative)
        super().__init__(below / above)


class CentredMixing(SoftmaxMixing):
    """Shaped attention: the identity, and what softmax attention has beyond the mean of what a token sees.

        O = (I + softmax(Q Kᵀ / (τ₀ √(n n_k)) + M) − C) V,   n = heads · n_k

    C is the value of the softmax at zero logits (`uniform_mean`). Queries and keys of unit mean square give
    logits of size 1/(τ₀ √n): softmax attention's with a further 1/√n. No T×T matrix is formed.

    Shapes: as `SoftmaxMixing`.
    Raises: InputError unless τ₀ is positive and finite.
    Holds: exactly; the identity up to rounding at zero queries.
    Source: Noci et al. 2023, arXiv 2306.17759; causal C as in He & Hofmann 2024, arXiv 2311.01906.
    """

    def __init__(self, temperature: float = 1.0, causal: bool = True) -> None:
        super().__init__(causal)
        if not 0 < temperature < math.inf:
            raise InputError(f"the temperature of attention must be positive and finite, got {temperature:g}")
        self.temperature = temperature

    def scale(self, q: Queries) -> float:
        """Return 1/(τ₀ √(n n_k)), what Q Kᵀ is multiplied by."""
        return 1 / (self.temperature * math.sqrt(q.shape[1]) * q.shape[-1])

    def logits(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return the scaled logits with −∞ at hidden keys: an explicit matrix."""
        return self._masked(self.scale(q) * (q @ shared(k, q).transpose(-2, -1)), real)

    def forward(
        self, q: Queries, k: Keys, v: Values, real: Real | None = None, total: Tensor | None = None
    ) -> Mixed:
        """Mix the values by I + A − C."""
        v, queries, keys = v.to(q.dtype), q.shape[2], k.shape[2]
        seen = self.seen(queries, keys, real, q.device)
        attended = fused(q, k, v, seen, self.causal and queries == keys, self.scale(q))
        sums, count = uniform_mean(v, queries, self.causal, real, total)
        kept = v[:, :, -queries:] - (sums / count).transpose(1, 2)
        return attended + shared(kept.to(v.dtype), q)


class FanInLinear(nn.Linear):
    """A linear map without a bias whose weights start Gaussian and keep the mean square of what it reads.

        y = x Wᵀ,   W ~ N(0, 1/in) at the start

    Shapes: (…, in) -> (…, out).
    Holds: mean y² = mean x² on average over W, exactly, at the start.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def initialise_(self, generator: torch.Generator) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5, generator=generator)


def shaped(parts: Parts) -> nn.Module:
    """Shaped transformer block, without norms: X' = λX + γ MHA(X), out = λX' + γ MLP(X'), λ² + γ² = 1.

        MHA(X) = concat_h (I + softmax(Q_h K_hᵀ / (τ₀ √(n n_k))) − C) X W_V,   MLP(X) = φ(X W_up) W_down

    φ is the shaped ReLU, the only activation that this block takes; γ and τ₀ are constants of the
    architecture (`branch_gain`, `attention_temperature`). All weights start at N(0, 1/fan_in), and the first
    block divides its input by its RMS. A gated MLP multiplies by 1 + x W_gate, W_gate = 0 at the start.

    Source: Noci et al. 2023, arXiv 2306.17759.
    """
    return Chain(
        input_norm(parts), _weighed(parts, _centred_attention(parts)), _weighed(parts, _shaped_mlp(parts))
    )


def _weighed(parts: Parts, branch: nn.Module) -> Residual:
    """Return λx + γ branch(x)."""
    return Residual(branch, skip=normalised_skip(parts.branch_gain), gain=parts.branch_gain)


def _centred_attention(parts: Parts) -> nn.Module:
    mixing = CentredMixing(parts.attention_temperature, parts.causal)
    features = parts.width // parts.heads * (parts.key_heads or parts.heads)
    value = FanInLinear(parts.width, features)
    attention = attention_of(parts, mixing, value=value, projection=nn.Identity())
    attention.query_key = FanInLinear(parts.width, sum(attention.sizes))
    return attention


def _shaped_mlp(parts: Parts) -> nn.Module:
    if not isinstance(parts.activation(), nn.ReLU):
        raise InputError("the shaped block shapes the activation relu for its width, and takes no other")
    hidden = parts.mlp_width // 2 if parts.gated else parts.mlp_width
    up: nn.Module = nn.Sequential(FanInLinear(parts.width, hidden), ShapedReLU(parts.width))
    if parts.gated:
        up = Modulated(up, ZeroLinear(parts.width, hidden))
    return nn.Sequential(up, FanInLinear(hidden, parts.width))
