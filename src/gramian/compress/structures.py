"""Which weights share one mask variable: single weights, output or input features, and n:m patterns.

Every structure sees a weight as (out, in, …), whatever the layer stores. Its mask variables, the units, have
a shape of their own; `spread` copies them to their weights and `gather`, its adjoint, sums over the weights
of each. Leading batch dimensions of units go through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from gramian.errors import InputError

Size = tuple[int, ...]
Sampler = Callable[[int, torch.Generator | None], Tensor]
"""How many draws, and the generator -> the units that each keeps, (count, …)."""
NOISE_EDGE = 1e-7
"""Uniform noise is kept this far from 0 and 1 where its logarithm is taken."""


@dataclass(frozen=True)
class Weights:
    """One Bernoulli variable a weight.

    m_j = 1[u_j < λ_j],  λ = σ(s),  u_j uniform;  relaxed: z = σ((s − ln u + ln(1 − u)) / τ)

    Shapes: units and logits (out, in, …), as the weight.
    Holds: exactly, up to the 2⁻²⁴ of a uniform number in single precision.
    Source: Maddison, Mnih, Teh 2017, arXiv 1611.00712 (the relaxation).
    """

    def check(self, size: Size, name: str) -> None:
        """Refuse a weight that the structure does not divide."""

    def units(self, size: Size) -> Size:
        """Return the shape of the mask variables."""
        return size

    def variables(self, size: Size) -> Size:
        """Return the shape of the logits."""
        return self.units(size)

    def spread(self, units: Shaped[Tensor, "..."], size: Size) -> Shaped[Tensor, "..."]:
        """Copy every unit to its weights, in a shape that broadcasts to the weight's."""
        return units

    def gather(self, values: Shaped[Tensor, "..."], size: Size) -> Shaped[Tensor, "..."]:
        """Sum values of the weight's shape over the weights of each unit."""
        return values

    def probabilities(self, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return λ of every unit."""
        return logits.sigmoid()

    def start(self, probabilities: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return logits with the given λ."""
        return probabilities.logit()

    def hard(self, logits: Float[Tensor, "..."], noise: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return the units that uniform noise keeps."""
        return noise < logits.sigmoid()

    def straight_through(
        self, logits: Float[Tensor, "..."], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Return the hard units of the noise, which are differentiated as if they were λ."""
        return _StraightThrough.apply(self.probabilities(logits), noise)

    def sampler(self, logits: Float[Tensor, "..."]) -> Sampler:
        """Return a function that draws many units at once, of the logits as they are now.

            m_j = 1[256 λ_j > b_j + v_j],  b_j a uniform byte,  v_j uniform over [0, 1)

        v_j matters, and is drawn, only where b_j = ⌊256 λ_j⌋: for one unit in 256.

        Holds: exactly, up to the 2⁻⁵³ of v_j.
        """
        scaled = logits.detach().sigmoid().double().flatten() * 256
        whole = scaled.floor().clamp(max=255)
        rest, first = scaled - whole, whole.to(torch.uint8)

        def draw(count: int, generator: torch.Generator | None) -> Bool[Tensor, "..."]:
            drawn = _bytes(count * len(first), generator, logits.device).view(count, len(first))
            kept, equal = drawn < first, (drawn == first).flatten().nonzero()[:, 0]
            more = torch.rand(len(equal), generator=generator, dtype=rest.dtype, device=rest.device)
            kept.view(-1)[equal] = more < rest[equal % len(first)]
            return kept.view(count, *logits.shape)

        return draw

    def soft(
        self, logits: Float[Tensor, "..."], noise: Float[Tensor, "..."], temperature: float
    ) -> Float[Tensor, "..."]:
        """Return the relaxed units of the same noise; they tend to the hard ones as τ → 0."""
        return (logits - noise.logit(NOISE_EDGE)).div_(temperature).sigmoid_()

    def best(self, logits: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return the most probable units, λ > ½."""
        return logits > 0


@dataclass(frozen=True)
class Rows(Weights):
    """One Bernoulli variable for `group` consecutive output features: neurons, channels, heads.

    m_ij… = m_{⌊i/group⌋}

    Shapes: units and logits (out/group,).
    Raises: InputError when the group does not divide the output features.
    Holds: exactly; the bias of a row is not masked.
    """

    group: int = 1
    axis = 0
    _side = "output"

    def __post_init__(self) -> None:
        if self.group < 1:
            raise InputError(f"a group needs at least one {self._side} feature, got {self.group}")

    def check(self, size: Size, name: str) -> None:
        """Refuse a layer whose features the group does not divide."""
        if size[self.axis] % self.group:
            raise InputError(
                f"the {size[self.axis]} {self._side} features of {name!r} are not a multiple of the "
                f"group of {self.group}"
            )

    def units(self, size: Size) -> Size:
        """Return (features/group,)."""
        return (size[self.axis] // self.group,)

    def spread(self, units: Shaped[Tensor, "..."], size: Size) -> Shaped[Tensor, "..."]:
        """Copy every unit to the features of its group."""
        broadcast = [1] * len(size)
        broadcast[self.axis] = size[self.axis]
        return units.repeat_interleave(self.group, -1).reshape(*units.shape[:-1], *broadcast)

    def gather(self, values: Shaped[Tensor, "..."], size: Size) -> Shaped[Tensor, "..."]:
        """Sum over the features of each group and over everything else."""
        return values.movedim(self.axis, 0).reshape(*self.units(size), -1).sum(-1)


@dataclass(frozen=True)
class Columns(Rows):
    """One Bernoulli variable for `group` consecutive input features.

    m_ij… = m_{⌊j/group⌋}

    The head width as group, on the projection that follows attention, gives one variable a head: with its
    columns gone a head counts for nothing.

    Shapes: units and logits (in/group,).
    Raises: InputError when the group does not divide the input features.
    Holds: exactly.
    """

    axis = 1
    _side = "input"


@dataclass(frozen=True)
class Patterns(Weights):
    """Exactly n of every m consecutive input features of a weight, as one categorical variable.

    m_g = e_k with probability q_gk = softmax_k(s_g),  e_k the k-th of the C = (m choose n) patterns
    λ_gj = Σ_k q_gk e_kj

    Shapes: units (out, …, in/m, m), logits (out, …, in/m, C).
    Raises: InputError unless 1 ≤ n < m, and when m does not divide the input features.
    Holds: exactly.
    Source: Fang et al. 2024, arXiv 2409.17481 (MaskLLM: patterns as categories, Gumbel noise).
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise InputError(f"an n:m pattern needs 1 ≤ n < m, got {self.n}:{self.m}")

    def check(self, size: Size, name: str) -> None:
        """Refuse a layer whose input features are no multiple of m."""
        if size[1] % self.m:
            raise InputError(
                f"the {size[1]} input features of {name!r} are not a multiple of the {self.m} of "
                f"{self.n}:{self.m}"
            )

    def table(self, like: Tensor) -> Float[Tensor, "c m"]:
        """Return the patterns, one a row."""
        kept = list(combinations(range(self.m), self.n))
        rows = torch.zeros(len(kept), self.m, dtype=like.dtype, device=like.device)
        return rows.scatter_(1, torch.tensor(kept, device=like.device), 1)

    def units(self, size: Size) -> Size:
        """Return (out, …, in/m, m)."""
        return (size[0], *size[2:], size[1] // self.m, self.m)

    def variables(self, size: Size) -> Size:
        """Return (out, …, in/m, C)."""
        return (*self.units(size)[:-1], len(list(combinations(range(self.m), self.n))))

    def spread(self, units: Shaped[Tensor, "..."], size: Size) -> Shaped[Tensor, "..."]:
        """Lay the groups along the input features."""
        flat = units.flatten(-2)
        return flat.movedim(-1, 1 - len(size))

    def gather(self, values: Shaped[Tensor, "..."], size: Size) -> Shaped[Tensor, "..."]:
        """Cut the input features into groups; a unit is one weight."""
        return values.movedim(1, -1).reshape(self.units(size))

    def probabilities(self, logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the probability that each weight is kept."""
        return logits.softmax(-1) @ self.table(logits)

    def start(self, probabilities: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the logits of independent weights conditioned on n kept: s_gk = Σ_j e_kj ln(λ_j/(1−λ_j))."""
        return probabilities.logit() @ self.table(probabilities).mT

    def hard(self, logits: Float[Tensor, "..."], noise: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return the pattern that Gumbel noise picks."""
        return self.table(logits)[(logits + _gumbel(noise)).argmax(-1)] > 0

    def straight_through(
        self, logits: Float[Tensor, "..."], noise: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Return the pattern of the noise, differentiated as if it were λ."""
        chance = self.probabilities(logits)
        return self.hard(logits.detach(), noise) + (chance - chance.detach())

    def sampler(self, logits: Float[Tensor, "..."]) -> Sampler:
        """Return a function that draws many patterns at once, of the logits as they are now."""
        fixed = logits.detach().clone()

        def draw(count: int, generator: torch.Generator | None) -> Bool[Tensor, "..."]:
            noise = torch.rand(count, *fixed.shape, generator=generator, device=fixed.device)
            return self.hard(fixed, noise)

        return draw

    def soft(
        self, logits: Float[Tensor, "..."], noise: Float[Tensor, "..."], temperature: float
    ) -> Float[Tensor, "..."]:
        """Return the mixture of patterns under Gumbel softmax."""
        return ((logits + _gumbel(noise)) / temperature).softmax(-1) @ self.table(logits)

    def best(self, logits: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return the most probable pattern of each group, the first of equal ones."""
        return self.table(logits)[logits.argmax(-1)] > 0

    def top(self, scores: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return the n highest of every m scores, the first of equal ones."""
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.n]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def weights_per_unit(structure: Weights, size: Size) -> int:
    """Return how many weights one unit covers."""
    return prod(size) // prod(structure.units(size))


class _StraightThrough(torch.autograd.Function):
    """1[u < λ], differentiated as if it were λ, in no more passes over the weights than that takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(chance: Tensor, noise: Tensor) -> Tensor:
        return (noise - chance).lt_(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _bytes(count: int, generator: torch.Generator | None, device: torch.device) -> Shaped[Tensor, " count"]:
    """Return uniform bytes, eight from each draw of 64 bits, which costs least."""
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:count]


def _gumbel(noise: Tensor) -> Tensor:
    return -(-noise.clamp(NOISE_EDGE, 1 - NOISE_EDGE).log()).log()
