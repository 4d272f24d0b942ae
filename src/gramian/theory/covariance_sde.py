"""The covariance of tokens in shaped transformers as depth and width grow together: an SDE, and its paths.

V^{ab} = ⟨x_a, x_b⟩/n of m tokens follows dV = b(V) dt + Σ(V)^{1/2} dB, where one block takes the time 1/n.
Each branch of a block is a drift and a diffusion; those of a block's two branches add.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.sde import Brownian, Paths, check_covariance, integrate, joined, square_root
from gramian.errors import InputError

Covariance = Float[Tensor, "*batch m m"]
Noise = Float[Tensor, "*batch noises m m"]

ENTRIES = 2**18
"""Entries of V that are followed at once: what stays in a core's cache."""

LARGEST = 1e100
"""Of a setting: its square, times what is not blown up, is a number still."""


class Branch(ABC):
    """What a block, or a branch of it, does to the covariance of its tokens."""

    noises: ClassVar[int]
    """How many m × m matrices of independent Brownian motions drive it."""

    @abstractmethod
    def drift(self, v: Covariance) -> Covariance:
        """Return b(V)."""

    @abstractmethod
    def diffusion(self, v: Covariance, noise: Noise) -> Covariance:
        """Return Σ(V)^{1/2} dB for increments dB of independent Brownian motions."""

    @abstractmethod
    def step(self, v: Covariance, h: float, noise: Noise) -> Covariance:
        """Return V after a time h, positive semidefinite as V is."""


def linear_noise(v: Covariance, noise: Covariance) -> Covariance:
    """Return an increment of the covariance that a matrix of Gaussian weights makes.

        L H Lᵀ,   L Lᵀ = V,   H = (N + Nᵀ)/√2;   Cov(ab, cd) = V^{ac} V^{bd} + V^{ad} V^{bc}

    Shapes: v (…, m, m), noise (…, m, m), symmetric in no way -> (…, m, m), symmetric.
    Holds: exactly.
    Source: Noci et al. 2023, arXiv 2306.17759; the factor is our algebra.
    """
    root = square_root(v)
    return root @ _symmetric(noise) @ root.mT


def _symmetric(noise: Tensor) -> Tensor:
    return (noise + noise.mT) / math.sqrt(2)


def _growth(noise: Tensor, h: float, rate: float) -> Tensor:
    """Return G with E[G Gᵀ] = I and G Gᵀ = I + √rate · H to first order in √h.

    G = (I + √rate H/2) / √(1 + rate h (m+1)/4), since E H² = h (m+1) I.
    """
    m = noise.shape[-1]
    eye = torch.eye(m, dtype=noise.dtype, device=noise.device)
    return (eye + math.sqrt(rate) / 2 * _symmetric(noise)) / math.sqrt(1 + rate * h * (m + 1) / 4)


@dataclass(frozen=True)
class ShapedAttention(Branch):
    """The residual branch of shaped attention, X' = λX + γ A X W_V with A = I + softmax(Y/τ) − C.

        b = (γ²/τ₀²) (F + (R + Rᵀ)/2),   M = C V,  G = C V Cᵀ,  v = diag V
        F = V ∘ (C (V∘V) Cᵀ − C (M∘M)ᵀ − (M∘M) Cᵀ + G∘G),   R_ab = v_a Σ_n C_an s_an V_nb
        s_an = V_nn − 2 M_an + 2 G_aa − (C v)_a
        noise: √(γ²(2 − γ²)) L H Lᵀ + (γ²/τ₀) (dA V + V dAᵀ),   dA = C ∘ (Z − rowsum(C ∘ Z)),  Z = L N Lᵀ

    C is uniform over all tokens, or, when causal, over those up to the query. τ = τ₀ √(n n_k).

    Raises: InputError unless 0 ≤ γ ≤ 1 and τ₀ > 0.
    Holds: as width → ∞ at a fixed depth/width, locally in time; a step's drift is off by O(width^-1).
    Source: Noci et al. 2023, arXiv 2306.17759; the matrix form and the causal one are our algebra.
    """

    gamma: float
    tau0: float = 1.0
    causal: bool = False

    noises = 2

    def __post_init__(self) -> None:
        _check_gain(self.gamma)
        check_temperature(self.tau0)

    def centring(self, v: Covariance) -> Float[Tensor, "m m"]:
        """Return C, what attention is when every logit is zero."""
        seen = v.new_ones(v.shape[-2:])
        seen = seen.tril() if self.causal else seen
        return seen / seen.sum(-1, keepdim=True)

    def drift(self, v: Covariance) -> Covariance:
        """Return b(V)."""
        spread, pull = self._forces(v)
        moved = pull @ v
        return (self.gamma / self.tau0) ** 2 * (spread + (moved + moved.mT) / 2)

    def _forces(self, v: Covariance) -> tuple[Covariance, Covariance]:
        """Return F, and P with R = P V."""
        c = self.centring(v)
        mean, size = c @ v, v.diagonal(dim1=-2, dim2=-1)
        both = mean @ c.mT
        cross = c @ mean.square().mT
        spread = v * (c @ v.square() @ c.mT - cross - cross.mT + both.square())
        second = size[..., None, :] - 2 * mean
        second = second + (2 * both.diagonal(dim1=-2, dim2=-1) - size @ c.mT)[..., None]
        return spread, size[..., None] * c * second

    def _logits(self, root: Tensor, noise: Tensor) -> Tensor:
        """Return dA, the first order of softmax(Z) − C."""
        c, z = self.centring(root), root @ noise @ root.mT
        return c * (z - (c * z).sum(-1, keepdim=True))

    def diffusion(self, v: Covariance, noise: Noise) -> Covariance:
        """Return Σ(V)^{1/2} dB."""
        root = square_root(v)
        values, logits = noise.unbind(-3)
        mixed = self._logits(root, logits) @ v
        linear = root @ _symmetric(values) @ root.mT
        square = self.gamma**2
        return math.sqrt(square * (2 - square)) * linear + square / self.tau0 * (mixed + mixed.mT)

    def step(self, v: Covariance, h: float, noise: Noise) -> Covariance:
        """Return V after a time h by a scheme of weak order 1 that keeps V positive semidefinite.

        V' = T L G Gᵀ Lᵀ Tᵀ + h (γ²(1 − γ²)/τ₀²) F,   T = I + (γ²/τ₀) dA + h (γ²/2τ₀²) P
        """
        square, root = self.gamma**2, square_root(v)
        values, logits = noise.unbind(-3)
        spread, pull = self._forces(v)
        grown = root @ _growth(values, h, square * (2 - square))
        mixing = square / self.tau0 * self._logits(root, logits) + h * square / (2 * self.tau0**2) * pull
        new = grown + mixing @ grown
        return new @ new.mT + h * square * (1 - square) / self.tau0**2 * spread


@dataclass(frozen=True)
class ShapedMLP(Branch):
    """The residual branch of two matrices around a shaped ReLU, s_± = 1 + c_±/√n.

        b_ab = γ² ν(ρ_ab) √(V_aa V_bb),   ν(ρ) = (c₊ − c₋)²/2π (√(1−ρ²) − ρ arccos ρ)
        noise: √2 γ L H Lᵀ

    Raises: InputError unless 0 ≤ γ ≤ 1 and c± are finite.
    Holds: as width → ∞ at a fixed depth/width; a step's drift is off by O(width^-1/2).
    Source: Noci et al. 2023, arXiv 2306.17759; Li, Nica, Roy 2022, arXiv 2206.02768.
    """

    gamma: float
    positive: float = 0.0
    negative: float = -1.0

    noises = 1

    def __post_init__(self) -> None:
        _check_gain(self.gamma)
        if not all(abs(each) <= LARGEST for each in (self.positive, self.negative)):
            raise InputError(
                f"the c₊ and c₋ of a shaped ReLU must be finite (±{LARGEST:g}), got {self.positive:g} and "
                f"{self.negative:g}"
            )

    def drift(self, v: Covariance) -> Covariance:
        """Return b(V), zero on the diagonal."""
        size = v.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        scale = size[..., None] * size[..., None, :]
        cosine = (v / scale.clamp(min=1e-300)).clamp(-1, 1)
        bend = (1 - cosine.square()).sqrt() - cosine * cosine.arccos()
        moved = (self.gamma * (self.positive - self.negative)) ** 2 / (2 * math.pi) * scale * bend
        moved.diagonal(dim1=-2, dim2=-1).zero_()
        return moved

    def diffusion(self, v: Covariance, noise: Noise) -> Covariance:
        """Return Σ(V)^{1/2} dB."""
        return math.sqrt(2) * self.gamma * linear_noise(v, noise[..., 0, :, :])

    def step(self, v: Covariance, h: float, noise: Noise) -> Covariance:
        """Return V after a time h by a scheme of weak order 1 that keeps V positive semidefinite.

        V' = L G Gᵀ Lᵀ,   L Lᵀ = V + h b(V)
        """
        root = square_root(v + h * self.drift(v))
        new = root @ _growth(noise[..., 0, :, :], h, 2 * self.gamma**2)
        return new @ new.mT


@dataclass(frozen=True)
class ShapedBlock(Branch):
    """A block of shaped attention and a shaped MLP, each with its own skip; it takes the time 1/n as a whole.

        b = b_attention + b_MLP,   Σ = Σ_attention + Σ_MLP

    Raises: InputError unless 0 ≤ γ ≤ 1, τ₀ > 0 and c± are finite.
    Holds: as width → ∞ at a fixed depth/width, locally in time.
    Source: Noci et al. 2023, arXiv 2306.17759.
    """

    gamma: float
    tau0: float = 1.0
    causal: bool = False
    positive: float = 0.0
    negative: float = -1.0

    noises = 3

    def __post_init__(self) -> None:
        _ = self.attention, self.mlp  # settings that cannot be used raise

    @property
    def attention(self) -> ShapedAttention:
        """The attention's branch."""
        return ShapedAttention(self.gamma, self.tau0, self.causal)

    @property
    def mlp(self) -> ShapedMLP:
        """The MLP's branch."""
        return ShapedMLP(self.gamma, self.positive, self.negative)

    def drift(self, v: Covariance) -> Covariance:
        """Return b(V)."""
        return self.attention.drift(v) + self.mlp.drift(v)

    def diffusion(self, v: Covariance, noise: Noise) -> Covariance:
        """Return Σ(V)^{1/2} dB."""
        split = ShapedAttention.noises
        attended = self.attention.diffusion(v, noise[..., :split, :, :])
        return attended + self.mlp.diffusion(v, noise[..., split:, :, :])

    def step(self, v: Covariance, h: float, noise: Noise) -> Covariance:
        """Return V after a time h: the attention's step, then that of the MLP."""
        split = ShapedAttention.noises
        attended = self.attention.step(v, h, noise[..., :split, :, :])
        return self.mlp.step(attended, h, noise[..., split:, :, :])


def covariance(branch: Branch, v: Float[Tensor, "m m"]) -> Float[Tensor, "entries entries"]:
    """Return Σ(V), dense, on the m(m+1)/2 entries of the upper triangle, row by row.

    Shapes: (m, m) -> (m(m+1)/2, m(m+1)/2).
    Holds: exactly.
    """
    m = len(v)
    unit = torch.eye(branch.noises * m * m, dtype=v.dtype, device=v.device)
    moved = branch.diffusion(v.expand(len(unit), m, m), unit.unflatten(1, (branch.noises, m, m)))
    rows, columns = torch.triu_indices(m, m, device=v.device).unbind()
    entries = moved[:, rows, columns]
    return entries.mT @ entries


def simulate(
    branch: Branch,
    start: Float[Tensor, "m m"],
    time: float,
    *,
    paths: int,
    steps: int,
    seed: int,
    records: Sequence[float] = (),
    bound: float = 1e4,
    progress: Callable[[int], None] = lambda done: None,
) -> Paths:
    """Follow paths of the covariance from V₀ to a time, depth/width, by steps that keep it semidefinite.

    A path whose largest entry passes `bound` stops there. `progress` is told how many paths are done.

    Shapes: start (m, m) -> states (records, paths, m, m).
    Raises: InputError for a V₀ that is no covariance, and fewer than one path or step.
    Holds: weakly, with error O(time/steps).
    """
    check_covariance(start)
    if paths < 1:
        raise InputError(f"at least one path is needed, got {paths}")
    m, parts, done = len(start), [], 0
    seeds = torch.Generator().manual_seed(seed)
    while done < paths:
        count = min(paths - done, max(1, ENTRIES // (m * m)))
        part = int(torch.randint(2**62, (), generator=seeds))
        shape = (count, branch.noises, m, m)
        brownian = Brownian(part, shape, time, steps, dtype=start.dtype, device=start.device)
        states = start.expand(count, m, m)
        parts.append(integrate(branch.step, states, brownian, bound=bound, records=records))
        done += count
        progress(done)
    return joined(parts)


def _check_gain(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma, the weight of a branch, must lie in [0, 1], got {gamma:g}")


def check_temperature(tau0: float) -> None:
    """Raise InputError unless 0 < τ₀ < ∞, and its square is a number of the same kind."""
    if not 1 / LARGEST <= tau0 <= LARGEST:
        raise InputError(
            f"tau0, the temperature of attention, must be positive and finite, got {tau0:g}; accepted are "
            f"{1 / LARGEST:g} to {LARGEST:g}"
        )
