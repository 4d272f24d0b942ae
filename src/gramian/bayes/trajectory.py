"""Hamiltonian trajectories of one chain, written as coroutines.

A coroutine yields the position at which it needs the log density and is sent the pair (value, gradient).
Whoever drives several chains can thus answer all of them by one batched call, however different their trees.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Found = TypeVar("Found")
Density = tuple[float, Tensor]
Asking = Generator[Tensor, Density, Found]
"""Yields positions, is sent log densities with gradients, and returns what it has found."""

DIVERGENT = 1000.0
"""An energy error above this, in nats, is a divergence."""


@dataclass(frozen=True, eq=False)
class Point:
    """A point of phase space with the log density and its gradient at its position."""

    position: Float[Tensor, " dim"]
    momentum: Float[Tensor, " dim"]
    log_density: float
    gradient: Float[Tensor, " dim"]


@dataclass(frozen=True, eq=False)
class Motion:
    """How a chain moves: H(θ, p) = −ln π(θ) + ½ pᵀM⁻¹p with a diagonal M, by steps of ε."""

    step_size: float
    inverse_mass: Float[Tensor, " dim"]
    generator: torch.Generator

    def energy(self, point: Point) -> float:
        """Return H, infinite where it is no number."""
        kinetic = 0.5 * (point.momentum.square() * self.inverse_mass).sum(dtype=torch.float64)
        energy = float(kinetic) - point.log_density
        return energy if math.isfinite(energy) else math.inf

    def kicked(self, point: Point) -> Point:
        """Draw a new momentum p ~ N(0, M)."""
        noise = torch.randn(point.position.shape, generator=self.generator, dtype=point.position.dtype)
        momentum = noise.to(point.position.device) / self.inverse_mass.sqrt()
        return Point(point.position, momentum, point.log_density, point.gradient)

    def uniform(self) -> float:
        """Draw from U(0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def straight(self, left: Point, right: Point, momentum: Tensor) -> bool:
        """Tell whether a stretch with this sum of momenta still runs away from both of its ends."""
        velocity = self.inverse_mass * momentum
        return bool((torch.stack((left.momentum, right.momentum)) @ velocity > 0).all())


@dataclass(frozen=True, eq=False)
class Move:
    """Where a transition has led, and what it cost."""

    point: Point
    acceptance: float
    """Mean of min(1, e^{H₀ − H}), over a tree's points or at a trajectory's end."""
    divergent: bool
    leapfrogs: int


def leapfrog(point: Point, step: float, inverse_mass: Tensor) -> Asking[Point]:
    """Go one step, backwards if it is negative.

        p½ = p + ½ε ∇ln π(θ),   θ' = θ + ε M⁻¹p½,   p' = p½ + ½ε ∇ln π(θ')

    Holds: reversible and of volume 1 exactly; energy error O(ε²) over a fixed time.
    """
    half = point.momentum + 0.5 * step * point.gradient
    position = point.position + step * inverse_mass * half
    log_density, gradient = yield position
    return Point(position, half + 0.5 * step * gradient, log_density, gradient)


def hmc(start: Point, motion: Motion, leapfrogs: int, jitter: float = 0.0) -> Asking[Move]:
    """Make one transition of Hamiltonian Monte Carlo with a fixed number of steps.

        accept (θ', p') with probability min(1, e^{H(θ, p) − H(θ', p')});  step ε U(1 − jitter, 1 + jitter)

    The jitter keeps trajectories from ending again and again where they began.

    Holds: leaves π invariant exactly.
    Source: Duane et al. 1987; Neal 2011, arXiv 1206.1901.
    """
    start = point = motion.kicked(start)
    step = motion.step_size * (1 + jitter * (2 * motion.uniform() - 1))
    before, done = motion.energy(start), 0
    for _ in range(leapfrogs):
        point = yield from leapfrog(point, step, motion.inverse_mass)
        done += 1
        if not math.isfinite(motion.energy(point)):  # the way back would pass here as well
            return Move(start, 0.0, True, done)
    error = motion.energy(point) - before
    acceptance = accepted(error)
    return Move(point if motion.uniform() < acceptance else start, acceptance, error > DIVERGENT, done)


def accepted(error: float) -> float:
    """Return min(1, e^{−error})."""
    return math.exp(min(0.0, -error))


@dataclass(frozen=True, eq=False)
class Tree:
    """A stretch of a trajectory: its ends in time and the point that stands for all of it."""

    left: Point
    right: Point
    chosen: Point
    log_weight: float
    """ln Σ e^{H₀ − H}."""
    momentum: Float[Tensor, " dim"]
    """Sum over its points."""
    acceptance: float
    """Sum over its new points."""
    leapfrogs: int
    divergent: bool = False
    going: bool = True
    """False once a part of it has turned or diverged."""


def nuts(start: Point, motion: Motion, depth: int) -> Asking[Move]:
    """Make one transition of the no-U-turn sampler, multinomial over the points of the trajectory.

    The trajectory is doubled forwards or backwards in time until it turns on itself, diverges or has 2^depth
    points. It has turned when pᵀM⁻¹Σp ≤ 0 at an end, the sum being over its points; the same is asked of its
    halves with the first point of the other. A new half replaces the point with probability min(1, w'/w).

    Holds: leaves π invariant exactly.
    Source: Hoffman, Gelman 2014, arXiv 1111.4246; Betancourt 2017, arXiv 1701.02434, appendix A.
    """
    start = motion.kicked(start)
    energy = motion.energy(start)
    tree = Tree(start, start, start, 0.0, start.momentum, 0.0, 0)
    for level in range(depth):
        forward = motion.uniform() < 0.5
        new = yield from _grown(tree.right if forward else tree.left, motion, energy, level, forward)
        tree = _joined(tree, new, motion, forward, biased=True)
        if not tree.going:
            break
    return Move(tree.chosen, tree.acceptance / max(tree.leapfrogs, 1), tree.divergent, tree.leapfrogs)


def _grown(end: Point, motion: Motion, energy: float, level: int, forward: bool) -> Asking[Tree]:
    """Go 2^level steps on from an end."""
    if level == 0:
        step = motion.step_size if forward else -motion.step_size
        point = yield from leapfrog(end, step, motion.inverse_mass)
        error = motion.energy(point) - energy
        far = not error <= DIVERGENT
        return Tree(point, point, point, -error, point.momentum, accepted(error), 1, far, not far)
    first = yield from _grown(end, motion, energy, level - 1, forward)
    if not first.going:
        return first
    second = yield from _grown(first.right if forward else first.left, motion, energy, level - 1, forward)
    return _joined(first, second, motion, forward, biased=False)


def _joined(old: Tree, new: Tree, motion: Motion, forward: bool, biased: bool) -> Tree:
    """Put two stretches together, the new one after the old one in its direction."""
    a, b = (old, new) if forward else (new, old)
    total = _log_add(old.log_weight, new.log_weight)
    share = new.log_weight - (old.log_weight if biased else total)
    going = new.going and (
        motion.straight(a.left, b.right, a.momentum + b.momentum)
        and motion.straight(a.left, b.left, a.momentum + b.left.momentum)
        and motion.straight(a.right, b.right, a.right.momentum + b.momentum)
    )
    chosen = new.chosen if new.going and motion.uniform() < math.exp(min(0.0, share)) else old.chosen
    return Tree(
        a.left,
        b.right,
        chosen,
        total,
        a.momentum + b.momentum,
        old.acceptance + new.acceptance,
        old.leapfrogs + new.leapfrogs,
        new.divergent,
        going,
    )


def _log_add(a: float, b: float) -> float:
    top = max(a, b)
    return top if math.isinf(top) else top + math.log(math.exp(a - top) + math.exp(b - top))


def workable_step(start: Point, motion: Motion, target: float) -> Asking[float]:
    """Double or halve ε until the acceptance of one step passes the target.

    Holds: empirically; ends between 1e-10 and 1e7 whatever the density.
    Source: Hoffman, Gelman 2014, arXiv 1111.4246, algorithm 4.
    """
    step, way = motion.step_size, 0
    while 1e-10 < step < 1e7:
        kicked = motion.kicked(start)
        point = yield from leapfrog(kicked, step, motion.inverse_mass)
        up = 1 if motion.energy(kicked) - motion.energy(point) > math.log(target) else -1
        if way not in (0, up):
            break
        way = up
        step *= 2.0**way
    return step
