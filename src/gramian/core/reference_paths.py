"""Paths that need no optimiser, to read others against: their Grams `steps`, in the limit of many dimensions.

Any hallmark of these Grams is the value that the path has on average as p → ∞, at this number of
checkpoints. The updates have length 1, and the origin of parameter space is the start.
"""

import torch

from gramian.core.gram import Gram
from gramian.core.trajectory import steps_from_positions
from gramian.errors import InputError


def straight_line(n: int) -> Gram:
    """Gram of a path at constant speed in one direction.

    θ_t = tδ,  ⟨δ_s, δ_t⟩ = 1

    Raises: InputError for fewer than 1 checkpoint.
    Holds: exactly.
    """
    return _path(torch.outer(_times(n), _times(n)))


def random_walk(n: int) -> Gram:
    """Gram of a path of independent updates.

    ⟨δ_s, δ_t⟩ = 1 for s = t, else 0

    Raises: InputError for fewer than 1 checkpoint.
    Holds: as p → ∞, error O(p^-1/2).
    """
    return _path(torch.minimum(_times(n)[:, None], _times(n)))


def jitter(n: int) -> Gram:
    """Gram of independent points about one, from which they are seen.

    θ_t = ξ_t,  ⟨ξ_s, ξ_t⟩ = ½ for s = t, else 0

    Raises: InputError for fewer than 1 checkpoint.
    Holds: as p → ∞, error O(p^-1/2).
    """
    return _path(torch.eye(len(_times(n)), dtype=torch.float64) / 2)


def _times(n: int) -> torch.Tensor:
    if n < 1:
        raise InputError(f"a path needs at least one point, not {n}")
    return torch.arange(n, dtype=torch.float64)


def _path(cross: torch.Tensor) -> Gram:
    norms = cross.diagonal()
    return steps_from_positions(Gram(cross, norms, norms))
