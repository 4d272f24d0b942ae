"""What the end of an optimiser's path does, in plain words: straight, exploring, oscillating or at rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.path_angles import directional_similarity, update_angles
from gramian.core.reference_paths import random_walk
from gramian.core.trajectory import (
    combined,
    displacement,
    displacement_ratio,
    displacements,
    path_length,
    squared_distances,
    steps_from_positions,
    subpath,
    update_lengths,
    updates,
)
from gramian.errors import InputError

WINDOW = 0.25
"""Share of the updates that are the end of a path."""
LEAST = 4
"""Updates that an end has at least; a path has at least twice as many."""
REST_SPEED = 0.01
"""An end slower than this share of the path's mean speed, both in length by time, can be at rest ..."""
REST_DISPLACEMENT = 0.02
"""... and is if it displaces by less than this share of the farthest distance from the start before."""
ROUNDING = 0.5
"""Share of expected rounding noise in the squared update lengths above which they are mostly that."""
STRAIGHT = 0.7
"""Displacement ratio from which an end goes straight: that of two updates at right angles."""
BOUNDED = 2 / 3
"""Squared distances below this share of those of uncorrelated updates show a motion that is held back ..."""
REVERSING = -0.25
"""... as does a mean update cosine below this, half of what jitter about a point has."""


@dataclass(frozen=True)
class Phase:
    """What the end of a path does.

    Attributes:
        name: "going straight", "exploring", "oscillating", "dead end", "rounding" or "too short".
        sentence: the same in plain words with the numbers that decided.
        evidence: the numbers by name; empty for "too short".
    """

    name: str
    sentence: str
    evidence: dict[str, float]


def phase(steps: Gram, times: Sequence[int], noise: Float[Tensor, " t"] | None = None) -> Phase:
    """Name what the last quarter of a path does, at least 4 updates of it.

    The first that holds is named:

    - dead end: its speed is below 1 % of the mean speed, and its displacement below 2 % of the farthest
      distance from the start;
    - rounding: more than half of its squared lengths is the noise expected;
    - going straight: its displacement is at least 70 % of its length;
    - oscillating: updates turn back on each other, or its points stay nearer to each other than uncorrelated
      updates would leave them, one by one or, to see slow oscillations, in strides of a quarter of the end;
    - exploring: all else, as a random walk.

    The bounds are constants of this module; the last three are read after the expected noise is taken out.

    Args:
        steps: Gram of the path.
        times: of its checkpoints, as optimiser steps.
        noise: squared length of the rounding noise expected in each update, from the number format of the
            stored weights; None for none.

    Shapes: steps (n, n), noise (T).
    Raises: InputError unless there is one increasing time a checkpoint, one noise an update, and all of the
        Gram is finite.
    Holds: empirically; random walks of 100 dimensions and more are told apart. An attractor is seen
        once the end is about three of its relaxation times, an oscillation once it is more than a period.
    """
    n = steps.cross.shape[-1]
    _check(steps, times, noise)
    if n <= 2 * LEAST:
        needed = f"{n - 1} updates are too few to say what the path does; it takes {2 * LEAST}"
        return Phase("too short", f"Too short to tell: {needed}.", {})
    width = max(LEAST, math.ceil(WINDOW * (n - 1)))
    found = _evidence(steps, times, torch.zeros(n - 1) if noise is None else noise, width)
    if not path_length(steps):
        return Phase("dead end", "At a dead end: no weight has changed from start to end.", found)
    name = _name(found)
    return Phase(name, _SENTENCES[name].format(**found), found)


def diffusion_ratio(steps: Gram) -> Float[Tensor, ""]:
    """Squared distances of checkpoints by those that uncorrelated updates of the same lengths would give.

    Σ |θ_j − θ_i|² / Σ Σ_{i≤t<j} ℓ_t²,  over all pairs with j − i ≥ T/2

    Range [0, T]; 1 for a random walk whatever its speed and spacing, about j − i for a line and 1/(j − i)
    for jitter.

    Shapes: steps (n, n) -> ().
    Holds: exactly; for the walk as p → ∞, error O(p^-1/2).
    """
    squared = squared_distances(steps)
    walked = torch.nn.functional.pad(updates(steps).left.cumsum(-1), (1, 0))
    uncorrelated = walked[None, :] - walked[:, None]
    lag = len(walked) // 2
    return squared.triu(lag).sum() / uncorrelated.triu(lag).sum()


def without_noise(steps: Gram, noise: Float[Tensor, " t"]) -> Gram:
    """Take the expected part of independent errors of the points out of a path's Gram.

    ⟨δ_t, δ_t⟩ − σ_t² − σ_{t+1}²,  ⟨δ_t, δ_{t+1}⟩ + σ_{t+1}²,  noise_t = σ_t² + σ_{t+1}²

    The σ_t² are half the mean noise of the updates before and after. Squared lengths below 0 become 0.

    Shapes: steps (n, n), noise (T) -> (n, n).
    Holds: exactly for errors of one size throughout, in expectation.
    """
    before, after = torch.cat([noise[:1], noise]), torch.cat([noise, noise[-1:]])
    points = (before + after).to(steps.cross) / 4
    expected = steps_from_positions(Gram(points.diag(), points, points))
    return combined(Gram(steps.cross - expected.cross, steps.left, steps.right), torch.eye(len(points)))


def _check(steps: Gram, times: Sequence[int], noise: Tensor | None) -> None:
    n = steps.cross.shape[-1]
    if len(times) != n or any(late <= early for early, late in pairwise(times)):
        raise InputError(f"{n} checkpoints need {n} increasing times, not {list(times)}")
    if not bool(steps.cross.isfinite().all()):
        raise InputError("the Gram of the path has a number that is not finite")
    if noise is not None and len(noise) != n - 1:
        raise InputError(f"{n - 1} updates need the noise of each, not {len(noise)} numbers")


def _evidence(steps: Gram, times: Sequence[int], noise: Tensor, width: int) -> dict[str, float]:
    n = steps.cross.shape[-1]
    end = subpath(steps, range(n - width - 1, n))
    clean = subpath(without_noise(steps, noise), range(n - width - 1, n))
    walk, stride = random_walk(width + 1), width // LEAST
    share_of_time = (times[-1] - times[-1 - width]) / (times[-1] - times[0])
    found = {
        "updates": torch.tensor(width),
        "relative_speed": path_length(end) / path_length(steps) / share_of_time,
        "relative_displacement": displacement(end)[-1] / displacement(steps).max(),
        "noise_share": noise[-width:].sum() / update_lengths(end).square().sum(),
        "displacement_ratio": displacement_ratio(clean),
        "walk_displacement_ratio": displacement_ratio(walk),
        "mean_update_angle": update_angles(clean).nanmean().rad2deg(),
        "mean_update_cosine": update_angles(clean).cos().nanmean(),
        "diffusion_ratio": diffusion_ratio(clean),
        "stride": torch.tensor(stride),
        "coarse_diffusion_ratio": diffusion_ratio(subpath(clean, range(width % stride, width + 1, stride))),
        "mds_relative": directional_similarity(displacements(clean)),
        "walk_mds_relative": directional_similarity(displacements(walk)),
    }
    return {name: float(value) for name, value in found.items()}


def _name(found: dict[str, float]) -> str:
    moves = found["relative_speed"] >= REST_SPEED or found["relative_displacement"] >= REST_DISPLACEMENT
    if not moves:
        return "dead end"
    if found["noise_share"] > ROUNDING:
        return "rounding"
    if found["displacement_ratio"] >= STRAIGHT:
        return "going straight"
    covered = min(found["diffusion_ratio"], found["coarse_diffusion_ratio"])
    if found["mean_update_cosine"] < REVERSING or covered < BOUNDED:
        return "oscillating"
    return "exploring"


_WANDERING = (
    "the last {updates:.0f} updates turn by {mean_update_angle:.0f}° on average, go {diffusion_ratio:.2f} "
    "times as far, in squared distance, as a random walk of their lengths ({coarse_diffusion_ratio:.2f} "
    "times in strides of {stride:.0f}), and move at {relative_speed:.1%} of the path's mean speed."
)

_SENTENCES = {
    "dead end": (
        "At a dead end: the last {updates:.0f} updates move at {relative_speed:.2%} of the mean speed of the "
        "path and end {relative_displacement:.2%} of its extent from where they began."
    ),
    "rounding": (
        "Not to be told: {noise_share:.0%} of the squared length of the last {updates:.0f} updates is what "
        "rounding of the stored weights alone would give."
    ),
    "going straight": (
        "Going straight: the last {updates:.0f} updates end {displacement_ratio:.0%} of their length from "
        "where they began (a random walk: {walk_displacement_ratio:.0%}) and turn by "
        "{mean_update_angle:.0f}° on average."
    ),
    "oscillating": "Oscillating: " + _WANDERING,
    "exploring": "Exploring: " + _WANDERING,
}
