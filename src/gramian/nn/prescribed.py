"""Attention whose matrices are prescribed at the start, so that tokens neither collapse nor lose variance."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from gramian.core.moments import accumulator
from gramian.errors import InputError
from gramian.nn.mixing import Keys, Mixed, Queries, Real, SoftmaxMixing, Values, Weights, fused, shared

Logits = Float[Tensor, "rows queries keys"]
RowSums = Float[Tensor, "rows queries"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of attention stand; one row a sequence, or one for all alike."""

    places: Int[Tensor, "rows keys"]
    """Position of every key, counted over real tokens from 0; the queries are the last ones."""
    seen: Bool[Tensor, "rows queries keys"]
    """Which keys each query sees: always itself."""
    own: Bool[Tensor, "queries keys"]
    """Which key is the query's own token."""

    @property
    def of_queries(self) -> Int[Tensor, "rows queries"]:
        """Position of every query."""
        return self.places[:, -len(self.own) :]


Prescription = Callable[[Layout], tuple[Tensor, Tensor]]
"""Returns B (rows, queries, keys) and D (rows, queries) in float64 for what attention is at zero queries,
A = D softmax(B), D the row sums of A; B need not be set where a key is not seen."""


def decay_rates(depth: int, final: float = 0.005) -> list[float]:
    """Return the rates γ_0 = ∞, γ_1, …, γ_L of E-SPA's targets Σ_l = exp(−γ_l |i − j|).

        a(γ) = √(1 − e^{−2γ}),   a(γ_l) = a(γ_L)^{l/L}

    Raises: InputError unless depth ≥ 1 and 0 < γ_L < ∞.
    Holds: exactly; A_l then has the diagonal a(γ_L)^{1/L}, but for the first entry, in every layer.
    Source: He et al. 2023, arXiv 2302.10322 (γ_L = 0.005).
    """
    _check_depth(depth)
    if not 0 < final < math.inf:
        raise InputError(f"the decay rate of E-SPA must be positive and finite, got {final:g}")
    squared = _log_one_minus_exp(-2 * final)
    return [math.inf] + [-0.5 * _log_one_minus_exp(squared * layer / depth) for layer in range(1, depth + 1)]


def uniform_correlations(depth: int, final: float = 0.8) -> list[float]:
    """Return the correlations ρ_0 = 0, ρ_1, …, ρ_L of U-SPA's targets Σ_l = (1 − ρ_l) I + ρ_l 1 1ᵀ.

        1 − ρ_l = (1 − ρ_L)^{l/L}

    Raises: InputError unless depth ≥ 1 and 0 < ρ_L < 1.
    Holds: exactly; the geometric schedule keeps the diagonals of the A_l of long sequences nearly equal.
    Source: He et al. 2023, arXiv 2302.10322; ρ_L = 0.8 and the schedule are this library's choice.
    """
    _check_depth(depth)
    if not 0 < final < 1:
        raise InputError(f"the correlation of U-SPA must lie between 0 and 1, got {final:g}")
    return [-math.expm1(math.log1p(-final) * layer / depth) for layer in range(depth + 1)]


@dataclass(frozen=True)
class CausalExponential:
    """E-SPA for a decoder: A = chol(Σ) chol(Σ')⁻¹ between the targets e^{−γ|i−j|} and e^{−γ'|i−j|}.

        B_ii = 0,   B_ij = −γ (i − j) + log(1 − q),   B_i0 = −γ i + log((1 − k q) / k)
        D_0 = 1,   D_i = (1 − k q) e^{−γi} + k (1 + (1 − q) (1 − e^{−γ(i−1)}) / (e^γ − 1))

    with positions from 0, q = e^{γ−γ'} and k = a(γ)/a(γ'), a(γ) = √(1 − e^{−2γ}). The first column is
    apart: the first row of a Cholesky factor has no a. Any length will do.

    Holds: exactly.
    Source: He et al. 2023, arXiv 2302.10322 (the target); the closed form is this library's.
    """

    rate: float
    """γ, after the layer."""
    before: float
    """γ' > γ, before it; infinite where the tokens are uncorrelated."""

    def __call__(self, layout: Layout) -> tuple[Logits, RowSums]:
        """Return B and D."""
        rate, closer = self.rate, self.rate - self.before
        log_k = 0.5 * (_log_one_minus_exp(-2 * rate) - _log_one_minus_exp(-2 * self.before))
        rest, first = _log_one_minus_exp(closer), _log_one_minus_exp(log_k + closer)
        keys, rows = _exact(layout.places), _exact(layout.of_queries)
        column = rate * keys + rest + (first - log_k - rest) * _exact(layout.places == 0)
        bias = (column[:, None] - rate * rows[:, :, None]).masked_fill(layout.own, 0)
        decayed = -torch.expm1(-rate * (rows - 1)) / math.expm1(rate)
        sums = math.exp(first) * torch.exp(-rate * rows) + math.exp(log_k) * (1 + math.exp(rest) * decayed)
        return bias, torch.where(layout.of_queries == 0, 1, sums)


@dataclass(frozen=True)
class CausalUniform:
    """U-SPA for a decoder: A = chol(Σ) chol(Σ')⁻¹ between targets of uniform correlation ρ and ρ'.

        A_ii = d_i / d'_i,   A_ij = e_j − ρ' F_i  (j < i),   D_i = (1 − ρ') F_i
        F_i = A_ii / h'_i + G_i,   e_j = c_j / d'_j + ρ' G_{j+1},   G_i = Σ_{m<i} c_m / (d'_m h'_m)

    with positions from 0, h_i = 1 + (i − 1) ρ, and the entries d_i = √((1 − ρ) h_{i+1} / h_i) on and
    c_j = ρ √((1 − ρ) / (h_j h_{j+1})) below the diagonal of the Cholesky factor. Any length will do.

    Holds: exactly.
    Source: He et al. 2023, arXiv 2302.10322 (the target); the closed form is this library's.
    """

    correlation: float
    """ρ, after the layer."""
    before: float
    """ρ' < ρ, before it."""

    def __call__(self, layout: Layout) -> tuple[Logits, RowSums]:
        """Return B and D."""
        place = torch.arange(layout.places.shape[1], device=layout.places.device)
        diagonal, below, _ = _uniform_factor(self.correlation, place)
        earlier, _, height = _uniform_factor(self.before, place)
        ratio, share = diagonal / earlier, below / earlier
        through = (share / height).cumsum(0)  # G_{j+1}
        full = ratio / height + pad(through[:-1], (1, 0))  # F_i
        column = (share + self.before * through)[layout.places]
        queries = layout.of_queries
        rows, own = full[queries], ratio[queries]
        matrix = column[:, None] - self.before * rows[:, :, None]
        matrix = torch.where(layout.own, own[:, :, None], matrix)
        return _log(matrix), (1 - self.before) * rows


@dataclass(frozen=True)
class Exponential:
    """E-SPA for an encoder: A = Σ^{1/2} Σ'^{−1/2} between the targets e^{−γ|i−j|} and e^{−γ'|i−j|}.

    The roots are symmetric, by eigenvalues: O(T³) in float64. Rows and columns of padding are the identity's.

    Holds: exactly; A ≥ 0 empirically.
    Source: He et al. 2023, arXiv 2302.10322.
    """

    rate: float
    """γ, after the layer."""
    before: float
    """γ' > γ, before it; infinite where the tokens are uncorrelated."""

    def __call__(self, layout: Layout) -> tuple[Logits, RowSums]:
        """Return B and D."""
        matrix = _power(self._target(layout, self.rate), 0.5)
        if self.before < math.inf:
            matrix = matrix @ _power(self._target(layout, self.before), -0.5)
        return _log(matrix), matrix.sum(-1)

    def _target(self, layout: Layout, rate: float) -> Logits:
        places = _exact(layout.places)
        target = torch.exp(-rate * (places[:, :, None] - places[:, None]).abs())
        return target * (layout.seen & layout.seen.mT)


@dataclass(frozen=True)
class Uniform:
    """U-SPA for an encoder: A = Σ^{1/2} Σ'^{−1/2} between targets of uniform correlation ρ and ρ'.

        A = a I + ((b − a) / T) 1 1ᵀ,   a = √((1 − ρ) / (1 − ρ')),   b = √((1 + (T−1) ρ) / (1 + (T−1) ρ'))

    T is the number of real tokens of the sequence; every row sums to b.

    Holds: exactly.
    Source: He et al. 2023, arXiv 2302.10322 (the target); the closed form is this library's.
    """

    correlation: float
    """ρ, after the layer."""
    before: float
    """ρ' < ρ, before it."""

    def __call__(self, layout: Layout) -> tuple[Logits, RowSums]:
        """Return B and D."""
        tokens = _exact(layout.places[:, -1:] + 1)
        a = math.sqrt((1 - self.correlation) / (1 - self.before))
        b = torch.sqrt((1 + (tokens - 1) * self.correlation) / (1 + (tokens - 1) * self.before))
        others = (b - a) / tokens
        bias = torch.where(layout.own, 0, _log(others / (a + others))[:, :, None])
        return bias, b.expand_as(layout.places)


class PrescribedMixing(SoftmaxMixing):
    """Softmax attention with a constant bias and constant row sums, which prescribe it at zero queries.

        O = D softmax(Q Kᵀ / √d_k + B + M) V

    B and D come from the `prescription` by the positions of the real tokens, in float64, and are cast last.
    Fused attention takes B as its mask, made anew in every pass; only roots of matrices are kept, for one
    length at a time. D ≥ 1.

    Shapes: as `SoftmaxMixing`.
    Holds: exactly; A is the prescribed matrix at zero queries.
    Source: He et al. 2023, arXiv 2302.10322.
    """

    zero_queries = True

    def __init__(self, prescription: Prescription, causal: bool = True) -> None:
        super().__init__(causal)
        self.prescription = prescription
        self._kept: tuple[object, tuple[Tensor, Tensor]] | None = None

    def matrix(self, tokens: int) -> Float[Tensor, "tokens tokens"]:
        """Return A at zero queries for a sequence without padding, in float64."""
        bias, sums = self._prescribed(tokens, tokens, None, torch.device("cpu"))
        return (sums * bias.softmax(-1))[0, 0]

    def logits(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return Q Kᵀ/√d_k + B with −∞ at hidden keys: an explicit matrix."""
        bias, _ = self._prescribed(q.shape[2], k.shape[2], real, q.device)
        return q @ shared(k, q).transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias.to(q.dtype)

    def weights(self, q: Queries, k: Keys, real: Real | None = None) -> Weights:
        """Return A, an explicit matrix whose rows sum to D: for observation, not for training."""
        _, sums = self._prescribed(q.shape[2], k.shape[2], real, q.device)
        return sums.to(q.dtype) * self.logits(q, k, real).softmax(-1)

    def forward(
        self, q: Queries, k: Keys, v: Values, real: Real | None = None, total: Tensor | None = None
    ) -> Mixed:
        """Mix the values with fused attention."""
        bias, sums = self._prescribed(q.shape[2], k.shape[2], real, q.device)
        return sums.to(q.dtype) * fused(q, k, v.to(q.dtype), bias.to(q.dtype), causal=False)

    def _prescribed(
        self, queries: int, keys: int, real: Real | None, device: torch.device
    ) -> tuple[Float[Tensor, "rows 1 queries keys"], Float[Tensor, "rows 1 queries 1"]]:
        """Return B with −∞ at hidden keys and D, to be broadcast over heads."""
        keep = isinstance(self.prescription, Exponential) and real is None
        key = (keys, device)
        if keep and self._kept is not None and self._kept[0] == key and not torch.compiler.is_compiling():
            return self._kept[1]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            layout = _layout(queries, keys, real, self.causal, device)
            bias, sums = self.prescription(layout)
            found = bias.masked_fill(~layout.seen, -math.inf)[:, None], sums[:, None, :, None]
        if keep and not torch.compiler.is_compiling():
            self._kept = (key, found)
        return found


def _layout(queries: int, keys: int, real: Real | None, causal: bool, device: torch.device) -> Layout:
    """Return where tokens stand; the real ones come first where causal queries are as many as keys."""
    past = keys - queries
    own = pad(torch.eye(queries, dtype=torch.bool, device=device), (past, 0))
    seen = torch.ones(1, queries, keys, dtype=torch.bool, device=device)
    seen = seen.tril(past) if causal else seen
    if real is None or (causal and not past):
        return Layout(torch.arange(keys, device=device)[None], seen, own)
    places = (real.long().cumsum(1) - 1).clamp(min=0)
    return Layout(places, (seen & real[:, None]) | own, own)


def _uniform_factor(correlation: float, place: Int[Tensor, " tokens"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return d, c and h of the Cholesky factor of a uniform correlation: on and below the diagonal."""
    height = 1 + (_exact(place) - 1) * correlation
    above = height + correlation
    diagonal = torch.sqrt((1 - correlation) * above / height)
    below = correlation * torch.sqrt((1 - correlation) / (height * above))
    return diagonal, below, height


def _power(matrix: Float[Tensor, "*rows n n"], exponent: float) -> Float[Tensor, "*rows n n"]:
    """Return a power of a symmetric positive matrix, by its eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT


def _exact(places: Tensor) -> Tensor:
    """Return positions as numbers of the greatest precision that the device has."""
    return places.to(accumulator(places.device))


def _log(matrix: Tensor) -> Tensor:
    """Return the logarithm, finite at zero and at what rounding leaves below it."""
    return matrix.clamp(min=torch.finfo(matrix.dtype).tiny).log()


def _log_one_minus_exp(x: float) -> float:
    """Return log(1 − e^x) for x < 0 without loss at either end; 0 at −∞."""
    return math.log1p(-math.exp(x)) if x < -math.log(2) else math.log(-math.expm1(x))


def _check_depth(depth: int) -> None:
    if depth < 1:
        raise InputError(f"a depth must be at least 1, got {depth}")
