"""The hallmarks of an optimiser's path by name, for tables, figures, files and error bars. Angles in degrees.

Each is a function of the Gram `steps` of a path (`gramian.core.trajectory`); means are over what exists, as
an update of length 0 has no angle. What the motion alone decides has a value for a straight line and for a
random walk of as many checkpoints, in the limit of many dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramian.core import path_angles, path_subspaces, readings, reference_paths, trajectory
from gramian.core.gram import Gram
from gramian.errors import InputError


@dataclass(frozen=True)
class Hallmark:
    """One number, curve or map that is read off a path.

    Attributes:
        function: takes the Gram `steps` to the value.
        unit: of the value: "" for a pure number, "°", or "weight" for lengths in parameter space.
        meaning: one line for a table.
        along: what the entries of a curve or a map's side belong to: "" for one number, "checkpoint",
            "later checkpoint" (all but the first), "update", "turn" (between two updates), "component".
        referenced: whether lines and random walks have a value of their own, whatever their scale and place.
    """

    function: Callable[[Gram], Tensor]
    unit: str
    meaning: str
    along: str = ""
    referenced: bool = True

    def line(self, n: int) -> Tensor | None:
        """Value for a straight line of n checkpoints at constant speed, or None where it has none."""
        return self.function(reference_paths.straight_line(n)) if self.referenced else None

    def walk(self, n: int) -> Tensor | None:
        """Value for a random walk of n checkpoints as p → ∞, or None where it has none."""
        return self.function(reference_paths.random_walk(n)) if self.referenced else None


def _degrees(function: Callable[[Gram], Tensor]) -> Callable[[Gram], Tensor]:
    return lambda steps: function(steps).rad2deg()


def _mean(function: Callable[[Gram], Tensor]) -> Callable[[Gram], Tensor]:
    # a NaN of the path itself is kept, one of an update of length 0 is not
    return lambda steps: function(steps).nanmean(-1) + 0 * trajectory.path_length(steps)


def _of(rows: Callable[[Gram], Gram], function: Callable[[Gram], Tensor]) -> Callable[[Gram], Tensor]:
    return lambda steps: function(rows(steps))


def _moved(steps: Gram) -> Tensor:
    return trajectory.displacement(steps)[..., -1]


def _growth(steps: Gram) -> Tensor:
    norms = trajectory.norms(steps)
    return norms[..., -1] / norms[..., 0]


def _relative_displacement(steps: Gram) -> Tensor:
    return _moved(steps) / trajectory.norms(steps)[..., 0]


def _radial_share(steps: Gram) -> Tensor:
    return path_angles.radial_updates(steps) / trajectory.update_lengths(steps)


def _update_cosines(steps: Gram) -> Tensor:
    return path_angles.update_angles(steps).cos()


def _first_component(steps: Gram) -> Tensor:
    return path_subspaces.explained_variance(steps)[..., 0]


def _at_start(steps: Gram) -> Tensor:
    return path_angles.apex_angles(steps, 0)


def _at_origin(steps: Gram) -> Tensor:
    return path_angles.apex_angles(steps, None)


def _from_start(steps: Gram) -> Tensor:
    return path_angles.angle_map(steps, 0)


SCALARS: dict[str, Hallmark] = {
    "mds": Hallmark(
        _of(trajectory.positions, path_angles.directional_similarity),
        "",
        "mean directional similarity ω of the weights, each checkpoint with itself included",
        referenced=False,
    ),
    "mds_off": Hallmark(
        _of(trajectory.positions, path_angles.directional_similarity_off),
        "",
        "mean directional similarity ω_off of the weights, pairs of different checkpoints only",
        referenced=False,
    ),
    "mds_relative": Hallmark(
        _of(trajectory.displacements, path_angles.directional_similarity),
        "",
        "mean directional similarity ω of the displacements from the start, each with itself included",
    ),
    "mds_relative_off": Hallmark(
        _of(trajectory.displacements, path_angles.directional_similarity_off),
        "",
        "mean directional similarity ω_off of the displacements from the start, pairs of different ones only",
    ),
    "displacement": Hallmark(_moved, "weight", "distance from start to end", referenced=False),
    "relative_displacement": Hallmark(
        _relative_displacement, "", "distance from start to end by the norm at the start", referenced=False
    ),
    "path_length": Hallmark(trajectory.path_length, "weight", "sum of the update lengths", referenced=False),
    "displacement_ratio": Hallmark(
        trajectory.displacement_ratio, "", "straightness: distance from start to end by path length"
    ),
    "norm_growth": Hallmark(_growth, "", "norm at the end by the norm at the start", referenced=False),
    "mean_update_angle": Hallmark(
        _degrees(_mean(path_angles.update_angles)), "°", "mean angle between consecutive updates"
    ),
    "mean_update_cosine": Hallmark(_mean(_update_cosines), "", "mean cosine between consecutive updates"),
    "mean_angle_to_end": Hallmark(
        _degrees(_mean(path_angles.angles_to_end)),
        "°",
        "mean angle of the updates to the way from start to end",
    ),
    "mean_apex_angle_at_start": Hallmark(
        _degrees(_mean(_at_start)), "°", "mean angle under which an update is seen from the start"
    ),
    "mean_apex_angle_at_origin": Hallmark(
        _degrees(_mean(_at_origin)),
        "°",
        "mean angle under which an update is seen from the origin of parameter space",
        referenced=False,
    ),
    "mean_radial_share": Hallmark(
        _mean(_radial_share),
        "",
        "mean part of the updates along the weights, below 0 towards the origin",
        referenced=False,
    ),
    "effective_rank": Hallmark(
        _of(trajectory.centred, readings.effective_rank),
        "",
        "components in use, by the entropy of their shares",
    ),
    "participation_ratio": Hallmark(
        _of(trajectory.centred, readings.participation_ratio),
        "",
        "components in use, by the squares of their shares",
    ),
    "first_component": Hallmark(
        _first_component, "", "share of the first principal component in the variance of the points"
    ),
}
"""Hallmarks that are one number."""

CURVES: dict[str, Hallmark] = {
    "norms": Hallmark(trajectory.norms, "weight", "norm of the weights", "checkpoint", False),
    "displacements": Hallmark(
        trajectory.displacement, "weight", "distance from the start", "checkpoint", False
    ),
    "update_lengths": Hallmark(trajectory.update_lengths, "weight", "length of the updates", "update", False),
    "acceleration_lengths": Hallmark(
        trajectory.acceleration_lengths, "weight", "length of the changes of the update", "turn", False
    ),
    "update_angles": Hallmark(
        _degrees(path_angles.update_angles), "°", "angle between consecutive updates", "turn"
    ),
    "apex_angles_at_start": Hallmark(
        _degrees(_at_start), "°", "angle under which an update is seen from the start", "update"
    ),
    "apex_angles_at_origin": Hallmark(
        _degrees(_at_origin),
        "°",
        "angle under which an update is seen from the origin of parameter space",
        "update",
        False,
    ),
    "angles_to_end": Hallmark(
        _degrees(path_angles.angles_to_end),
        "°",
        "angle of the updates to the way from start to end",
        "update",
    ),
    "angles_to_remainder": Hallmark(
        _degrees(path_angles.angles_to_remainder), "°", "angle of the updates to the remaining way", "update"
    ),
    "radial_updates": Hallmark(
        path_angles.radial_updates, "weight", "part of the updates along the weights", "update", False
    ),
    "tangential_lengths": Hallmark(
        path_angles.tangential_lengths, "weight", "part of the updates across the weights", "update", False
    ),
    "explained_variance": Hallmark(
        path_subspaces.explained_variance,
        "",
        "shares of the principal components in the variance of the points",
        "component",
    ),
}
"""Hallmarks that are one number for each of what `along` says."""

MAPS: dict[str, Hallmark] = {
    "trajectory_map": Hallmark(
        _of(trajectory.positions, readings.cosine), "", "cosines between the weights", "checkpoint", False
    ),
    "relative_map": Hallmark(
        _of(trajectory.displacements, readings.cosine),
        "",
        "cosines between the displacements from the start",
        "later checkpoint",
    ),
    "update_map": Hallmark(
        _of(trajectory.updates, readings.cosine), "", "cosines between the updates", "update"
    ),
    "distance_map": Hallmark(trajectory.distances, "weight", "distances of checkpoints", "checkpoint", False),
    "angle_map": Hallmark(
        _degrees(path_angles.angle_map),
        "°",
        "angles between checkpoints seen from the origin of parameter space",
        "checkpoint",
        False,
    ),
    "relative_angle_map": Hallmark(
        _degrees(_from_start), "°", "angles between checkpoints seen from the start", "checkpoint"
    ),
}
"""Hallmarks that are one number for each pair of what `along` says."""


def hallmarks(steps: Gram) -> dict[str, float]:
    """Read all `SCALARS` of one path; NaN for what it has not enough checkpoints or motion for.

    Raises: InputError for a path of fewer than 2 checkpoints, and for a batch of paths.
    """
    if steps.cross.ndim != 2 or len(steps.cross) < 2:
        raise InputError(f"hallmarks need one path of at least 2 checkpoints, not {list(steps.left.shape)}")
    return {name: float(hallmark.function(steps)) for name, hallmark in SCALARS.items()}


def time_weighted(steps: Gram, times: Sequence[int]) -> dict[str, float]:
    """Mean directional similarity in which every stretch of time counts alike, however crowded.

    ω_w = wᵀCw with the weights of `path_angles.spacing_weights`, the start left out of the relative one

    Returns `mds_by_time` and `mds_relative_by_time`; each checkpoint with itself included.

    Raises: InputError unless there is one time a checkpoint and they increase.
    """
    weights = path_angles.spacing_weights(torch.tensor(times, dtype=torch.float64))
    similarity = path_angles.directional_similarity
    return {
        "mds_by_time": float(similarity(trajectory.positions(steps), weights)),
        "mds_relative_by_time": float(similarity(trajectory.displacements(steps), weights[1:])),
    }
