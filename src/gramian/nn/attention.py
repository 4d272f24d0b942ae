"""Multi-head attention around a mixing of tokens, with the maps before it and an optional gate after it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.mixing import ShapedMixing, SoftCapMixing, SoftmaxMixing, shared, uniform_mean
from gramian.nn.norms import Norm, identity
from gramian.nn.prescribed import PrescribedMixing
from gramian.nn.view import View, positions

__all__ = [
    "Attention",
    "Gate",
    "ShapedMixing",
    "SoftCapMixing",
    "SoftmaxMixing",
    "shared",
    "uniform_mean",
]


class Gate(nn.Linear):
    """The logits of a gate on what attention has mixed; `Attention` takes their σ.

        G(x) = x Wᵀ + b,   σ(b) = opening at the start

    `features` is the number of heads (one gate a head) or the width (one a feature). With small weights
    the gates start near the opening.

    Shapes: (…, width) -> (…, features).
    Raises: InputError unless both are positive and 0 < opening < 1.
    Holds: exactly.
    Source: Bondarenko et al. 2023, arXiv 2306.12929 (opening 0.25); Qiu et al. 2025, arXiv 2505.06708.
    """

    def __init__(self, width: int, features: int, opening: float = 0.5) -> None:
        if width < 1 or features < 1:
            raise InputError(f"a gate needs a positive width and number of gates, got {width}, {features}")
        if not 0 < opening < 1:
            raise InputError(f"a gate starts opened by more than 0 and less than 1, got {opening:g}")
        self.opening = opening
        super().__init__(width, features)

    def initialise_(self, generator: torch.Generator) -> None:
        """Set the bias to the logit of the opening."""
        nn.init.constant_(self.bias, math.log(self.opening / (1 - self.opening)))


class Attention(nn.Module):
    """Multi-head self-attention composed of a mixing and the maps around it.

        q_h = N_Q(x W_Q + b_Q)_h,   k_h = N_K(x W_K + b_K)_h,   v = V(x)
        y = P(concat_h σ(G(x))_h ⊙ mixing(q_h, k_h, v_h))

    N_Q and N_K act on each head's d_k features. `value` and `projection` are modules on features; the
    identity makes the simplified blocks. `gate`, when given, is a module that returns the logits of one gate
    a head or a feature (`Gate`). `rotary`, when given, rotates normed queries and keys by their position
    (`Rotary`). Queries and keys are one product. `key_heads` below `heads` lets groups of queries share keys,
    and values too where the value map gives as many features. Queries start at zero where the mixing wants
    them to: a centred one then starts at the identity, a prescribed one, whose keys start at N(0, 1/width),
    at its prescription. Rows of padding come out as zero.

    Shapes: (batch, tokens, width) -> (batch, tokens, width).
    Raises: InputError when heads does not divide width or key_heads does not divide heads, and for a gate
    of another number of features.
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
        gate: nn.Module | None = None,
        rotary: nn.Module | None = None,
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
        self.gate = gate
        self.rotary = rotary

    def initialise_(self, generator: torch.Generator) -> None:
        """Set W_Q = 0 under a mixing that starts there, and W_K under a prescribed one."""
        width, weight = self.sizes[0], self.query_key.weight
        if getattr(self.mixing, "zero_queries", False):
            nn.init.zeros_(weight[:width])
        if isinstance(self.mixing, PrescribedMixing):
            nn.init.normal_(weight[width:], std=width**-0.5, generator=generator)

    def _heads(
        self, x: Float[Tensor, "batch tokens features"]
    ) -> Float[Tensor, "batch heads tokens head_width"]:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], view: View | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """Attend."""
        q, k = self.query_key(x).split(self.sizes, -1)
        mixed = self._mix(q, k, self.value(x), view or View())
        return self.projection(mixed if self.gate is None else self._gated(mixed, self.gate(x)))

    def _gated(self, mixed: Tensor, gates: Tensor) -> Tensor:
        """Multiply every head, or every feature, by the σ of its gate."""
        count, width = gates.shape[-1], mixed.shape[-1]
        if count not in (width // self.head_width, width):
            raise InputError(
                f"a gate returns one number for each of {width // self.head_width} heads or of {width} "
                f"features, got {count}"
            )
        opened = gates.sigmoid().to(mixed.dtype)[..., None]
        return (mixed.unflatten(-1, (count, -1)) * opened).flatten(-2)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
        """Mix the values: features (batch, tokens, ·) to features."""
        past, real = view.past, view.real
        if past is not None:
            total, before = past.total, past.length
            queries, keys = self._placed(q, k, real, before)
            new = None if real is None else real[:, -k.shape[1] :]
            keys, values = past.append(keys, self._heads(v), new)
            if before:
                mixed = self.mixing(queries, keys, values, real, total)
                return _zeroed(mixed.transpose(1, 2).flatten(-2), real)
        if not view.rows:
            return _zeroed(self._attend(q, k, v, real), real)
        mixed = [self._attend(rows.take(q), rows.take(k), rows.take(v), rows.real) for rows in view.rows]
        return _zeroed(view.restored(mixed), real)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """Mix within one batch of sequences that begin with their first token."""
        q, k = self._placed(q, k, real)
        return self.mixing(q, k, self._heads(v), real).transpose(1, 2).flatten(-2)

    def _placed(self, q: Tensor, k: Tensor, real: Tensor | None, before: int = 0) -> tuple[Tensor, Tensor]:
        """Return the heads of queries and keys, normed and rotated; `before` tokens lie in a cache."""
        q, k = self.query_norm(self._heads(q)), self.key_norm(self._heads(k))
        if self.rotary is None:
            return q, k
        places = positions(View(real), before, q.shape[2], None, q.device)
        return self.rotary(q, places), self.rotary(k, places)


def _zeroed(x: Tensor, real: Tensor | None) -> Tensor:
    """Return features with zeros at padding, so that they are defined whatever the padding holds."""
    return x if real is None else x * real[:, -x.shape[1] :, None]
