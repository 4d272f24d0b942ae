"""Stochastic differential equations: Brownian paths that can be refined, two schemes, paths that may stop."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gramian.errors import InputError

Field = Callable[[Tensor], Tensor]
"""A drift: from states to velocities, whole batches at once."""

Diffusion = Callable[[Tensor, Tensor], Tensor]
"""From states and Brownian increments to increments of the state, linear in the latter."""

Step = Callable[[Tensor, float, Any], Tensor]
"""From states, the length of a step and its noise to the states after it."""

TOLERANCE = 1e-8
"""How far below zero, in units of its largest entry, a PSD matrix's eigenvalues may be."""


@dataclass(frozen=True)
class Brownian:
    """Increments of independent Brownian motions on a grid that can be refined.

        W(t + h) − W(t) ~ N(0, h);   halving a step:  W(t + h/2) − W(t) = (W(t + h) − W(t))/2 + √h/2 · z

    Iterating gives pairs (h, increment) over `steps` · 2^`refinement` steps of equal length; each increment
    has the given shape. A finer grid goes through the same points: its increments sum to those of a coarser.

    Raises: InputError unless end > 0, steps ≥ 1 and refinement ≥ 0.
    Holds: exactly.
    """

    seed: int
    shape: tuple[int, ...]
    end: float
    steps: int
    refinement: int = 0
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not 0 < self.end < math.inf:
            raise InputError(f"a Brownian path ends at a positive, finite time, not at {self.end:g}")
        if self.steps < 1 or self.refinement < 0:
            raise InputError(
                "a Brownian path has at least 1 step and is refined 0 times or more, got "
                f"{self.steps} and {self.refinement}"
            )

    def refined(self, times: int = 1) -> "Brownian":
        """Return the same path on a grid that is 2^times as fine."""
        return replace(self, refinement=self.refinement + times)

    def __len__(self) -> int:
        return self.steps * 2**self.refinement

    def __iter__(self) -> Iterator[tuple[float, Tensor]]:
        root = torch.Generator().manual_seed(self.seed)
        levels = []  # a stream for each level, so that finer ones leave the coarser as they are
        for _ in range(self.refinement + 1):
            seed = int(torch.randint(2**62, (), generator=root))
            levels.append(torch.Generator(self.device).manual_seed(seed))
        h = self.end / self.steps
        for _ in range(self.steps):
            yield from self._halved(h, math.sqrt(h) * self._normal(levels[0]), levels[1:])

    def _halved(
        self, h: float, increment: Tensor, levels: Sequence[torch.Generator]
    ) -> Iterator[tuple[float, Tensor]]:
        if not levels:
            yield h, increment
            return
        first = increment / 2 + math.sqrt(h) / 2 * self._normal(levels[0])
        for half in (first, increment - first):
            yield from self._halved(h / 2, half, levels[1:])

    def _normal(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator, dtype=self.dtype, device=self.device)


def euler_maruyama(drift: Field, diffusion: Diffusion) -> Step:
    """Return the Euler–Maruyama step of the Itô equation dX = b(X) dt + σ(X) dW.

        X' = X + b(X) h + σ(X) ΔW

    Holds: weakly with error O(h), strongly with O(√h), under the usual smoothness.
    Source: Kloeden, Platen 1992, "Numerical Solution of Stochastic Differential Equations", section 10.2.
    """

    def step(x: Tensor, h: float, noise: Tensor) -> Tensor:
        return x + h * drift(x) + diffusion(x, noise)

    return step


def heun(drift: Field, diffusion: Diffusion) -> Step:
    """Return the Heun step of the Stratonovich equation dX = b(X) dt + σ(X) ∘ dW.

        X̃ = X + b(X) h + σ(X) ΔW,   X' = X + (b(X) + b(X̃)) h/2 + (σ(X) + σ(X̃)) ΔW/2

    An Itô drift b is b − ½ Σ_j (σ_j·∇) σ_j here.

    Holds: weakly with error O(h); strongly too where the noise commutes, as a single one does, else with
    O(√h).
    Source: Kloeden, Platen 1992, "Numerical Solution of Stochastic Differential Equations".
    """

    def step(x: Tensor, h: float, noise: Tensor) -> Tensor:
        velocity, moved = drift(x), diffusion(x, noise)
        guess = x + h * velocity + moved
        return x + h / 2 * (velocity + drift(guess)) + (moved + diffusion(guess, noise)) / 2

    return step


@dataclass(frozen=True, eq=False)
class Paths:
    """States of many paths at some times, and when those that left the region stopped.

    A path that left stays at its last state within. `stopped` is inf for those that never left.

    Shapes: times (records), states (records, paths, …), stopped, exploded, indefinite (paths).
    """

    times: Float[Tensor, " records"]
    states: Tensor
    stopped: Float[Tensor, " paths"]
    exploded: Bool[Tensor, " paths"]
    indefinite: Bool[Tensor, " paths"]

    @property
    def lasting(self) -> Bool[Tensor, " paths"]:
        """The paths that never left."""
        return self.stopped.isinf()


def joined(parts: Sequence[Paths]) -> Paths:
    """Return paths that were computed in parts, as one."""
    names = ("stopped", "exploded", "indefinite")
    rest = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Paths(parts[0].times, torch.cat([part.states for part in parts], 1), **rest)


def integrate(
    step: Step,
    start: Float[Tensor, "paths ..."],
    path: Iterable[tuple[float, Any]],
    *,
    bound: float = 1e4,
    semidefinite: bool = False,
    records: Sequence[float] = (),
) -> Paths:
    """Follow paths to the end of a noise, or to where they leave the region: max |X| ≤ bound, or X ⪰ 0 too.

    `path` gives the length and the noise of each step. States are recorded at the first step that reaches
    each of the `records`, in increasing order; at the end alone when there are none.

    Shapes: start (paths, …), matrices (paths, m, m) where they are to stay semidefinite.
    Raises: InputError for records that decrease, or lie beyond the end, and a start outside the region.
    Holds: exactly, for the step given.
    """
    wanted, times, states = list(records), [], []
    if wanted != sorted(wanted) or (wanted and wanted[0] < 0):
        raise InputError(f"times to record increase from 0 on, got {wanted}")
    too_large, negative = _left(start, bound, semidefinite)
    if bool((too_large | negative).any()):
        raise InputError(f"paths start with entries within ±{bound:g}, matrices positive semidefinite")
    x, frozen, time = start, start.clone(), 0.0
    stopped = torch.full_like(too_large, math.inf, dtype=torch.float64)
    exploded, indefinite = torch.zeros_like(too_large), torch.zeros_like(too_large)

    def record() -> None:
        times.append(time)
        states.append(_where(stopped.isinf(), x, frozen))

    for h, noise in path:
        while wanted and time >= wanted[0] - 1e-9 * h:
            wanted.pop(0)
            record()
        time += h
        y = step(x, h, noise)
        too_large, negative = _left(y, bound, semidefinite)
        leaving = (too_large | negative) & stopped.isinf()
        if bool(leaving.any()):
            frozen = _where(leaving, x, frozen)
            stopped = torch.where(leaving, time, stopped)
            exploded, indefinite = exploded | (leaving & too_large), indefinite | (leaving & ~too_large)
        x = (
            y if bool(stopped.isinf().all()) else _where(stopped.isinf(), y, start)
        )  # stopped ones stay harmless
    if any(each > time * (1 + 1e-9) for each in wanted):
        raise InputError(f"times to record lie within the path, which ends at {time:g}, got {wanted[-1]:g}")
    for _ in wanted or ([] if records else [time]):
        record()
    return Paths(torch.tensor(times, dtype=torch.float64), torch.stack(states), stopped, exploded, indefinite)


def check_covariance(v: Tensor) -> None:
    """Raise InputError unless V is a covariance of two tokens or more: square, symmetric, finite, PSD."""
    if v.ndim != 2 or v.shape[0] != v.shape[1]:
        raise InputError(f"a covariance of tokens must be a square matrix, got shape {tuple(v.shape)}")
    if len(v) < 2:
        raise InputError("a covariance needs at least two tokens, got one: correlations are between two")
    if not bool(v.isfinite().all()):
        raise InputError("a covariance of tokens must be finite, and this one has NaN or infinity")
    scale = v.diagonal().amax().clamp(min=1e-300)
    if not bool((v - v.mT).abs().amax() <= 1e-9 * scale) or bool((v.diagonal() <= 0).any()):
        raise InputError("a covariance of tokens must be symmetric with a positive diagonal")
    least = torch.linalg.eigvalsh(v)[0].item()
    if least < -1e-9 * scale.item():
        raise InputError(
            f"a covariance of tokens must be positive semidefinite, got a smallest eigenvalue of {least:.3g}"
        )


def _where(which: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _left(x: Tensor, bound: float, semidefinite: bool) -> tuple[Tensor, Tensor]:
    """Return which states are too large or not finite, and which of the others are not semidefinite."""
    too_large = ~(x.reshape(len(x), -1).abs().amax(1) <= bound)
    if not semidefinite:
        return too_large, torch.zeros_like(too_large)
    safe = _where(too_large, torch.zeros_like(x), x)
    room = TOLERANCE * safe.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
    lifted = safe + room[:, None, None] * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return too_large, torch.linalg.cholesky_ex(lifted).info > 0


def square_root(v: Float[Tensor, "*batch m m"]) -> Float[Tensor, "*batch m m"]:
    """Return L with L Lᵀ = V for symmetric positive semidefinite matrices, those of lower rank included.

    L is the Cholesky factor, or, where V is not definite to rounding, Q √Λ⁺ from V = Q Λ Qᵀ with negative
    eigenvalues as zero. A V that is not finite gives an L that is not.

    Shapes: (…, m, m) -> (…, m, m).
    Holds: to rounding; for an indefinite V, L Lᵀ is the nearest semidefinite matrix.
    """
    factor, info = torch.linalg.cholesky_ex(v)
    failed = info > 0
    if not bool(failed.any()):
        return factor
    factor = torch.where(failed[..., None, None], math.nan, factor)
    failed = failed & v.isfinite().all(-1).all(-1)  # what eigh would refuse stays NaN
    values, vectors = torch.linalg.eigh(v[failed])
    factor[failed] = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return factor
