"""Views that are one another's quarter turn or mirror image, so that one of them is enough of a matrix.

With (f∘R)(x, y) = f(−y, x) and (f∘M)(x, y) = f(−x, y), every beam around the image's centre has

    p_f(θ + 90°, s) = p_{f∘R}(θ, s),   p_f(−θ, −s) = p_{f∘M}(θ, s)

and a parallel beam also p_f(θ + 180°, s) = p_f(θ, −s).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.imaging.geometry import Beam, ParallelBeam

Symmetry = Literal["none", "turns", "all"]

SAME = 1e-10
"""Angles that differ by less, in radians, are one."""

WASTE = 1.5
"""A symmetry is used while the views it computes are at most so many times those that are asked for."""


@dataclass(frozen=True)
class Pose:
    """A turn by quarters of the image, after a mirror or not."""

    quarters: int
    mirrored: bool

    def of(self, x: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch _ _"]:
        """Return the image f∘R^q, or f∘M∘R^q."""
        x = x.flip(-1) if self.mirrored else x
        return torch.rot90(x, self.quarters, (-2, -1)) if self.quarters else x

    def undo(self, x: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch _ _"]:
        """Return the image of which this is the pose."""
        x = torch.rot90(x, -self.quarters, (-2, -1)) if self.quarters else x
        return x.flip(-1) if self.mirrored else x


@dataclass(frozen=True)
class Folding:
    """The views that a matrix holds, and how those that are asked for follow from them.

    View v is the held view `held[v]` of pose `pose[v]` of the image, with its detectors in reverse where
    `reverse[v]`.
    """

    geometry: Beam
    poses: tuple[Pose, ...]
    held: tuple[int, ...]
    pose: tuple[int, ...]
    reverse: tuple[bool, ...]

    @property
    def work(self) -> int:
        """Views that one product with the matrix computes."""
        return len(self.geometry.angles) * len(self.poses)

    def subset(self, views: Sequence[int]) -> tuple["Folding", list[int]]:
        """Return the folding of some views, and the numbers of the held views that it takes."""
        held, pose = ([names[v] for v in views] for names in (self.held, self.pose))
        kept, posed = sorted(set(held)), sorted(set(pose))
        folding = Folding(
            replace(self.geometry, angles=[self.geometry.angles[v] for v in kept]),
            tuple(self.poses[p] for p in posed),
            tuple(map(kept.index, held)),
            tuple(map(posed.index, pose)),
            tuple(self.reverse[v] for v in views),
        )
        return folding, kept

    def rows(self) -> Tensor:
        """Return the place of every (view, detector) among (held view, detector, pose)."""
        detectors = self.geometry.detectors
        k = torch.arange(detectors)
        k = torch.where(torch.tensor(self.reverse)[:, None], detectors - 1 - k, k)
        held, pose = torch.tensor(self.held)[:, None], torch.tensor(self.pose)[:, None]
        return ((held * detectors + k) * len(self.poses) + pose).flatten()


def fold(geometry: Beam, symmetry: Symmetry = "all") -> Folding:
    """Return the smallest matrix's views, by quarter turns (`turns`) or by mirrors as well (`all`).

    The image has to be square and to turn around its centre; reversed detectors need an offset of 0. Where
    too few views are partners nothing is folded.

    Holds: exactly, for discretisations with the symmetry of the square.
    """
    views = len(geometry.angles)
    whole = Folding(geometry, (Pose(0, False),), tuple(range(views)), (0,) * views, (False,) * views)
    square = geometry.shape[0] == geometry.shape[1] and geometry.centre_mm == (0, 0)
    if symmetry == "none" or not square:
        return whole
    mirrors = symmetry == "all" and (isinstance(geometry, ParallelBeam) or not geometry.offset_mm)
    foldings = [_folded(geometry, mirrored) for mirrored in ((False, True) if mirrors else (False,))]
    worth = [folding for folding in foldings if folding.work <= WASTE * views]
    return min([whole, *worth], key=lambda folding: (len(folding.geometry.angles), folding.work))


def _folded(geometry: Beam, mirrors: bool) -> Folding:
    """Turn every view to 45°–135°, or 45°–90° by mirrors: there rays run along rows, which lie in memory."""
    ways = [_canonical(geometry, theta, mirrors) for theta in geometry.theta.tolist()]
    angles, held = _distinct([angle for angle, _, _ in ways])
    poses = sorted({pose for _, pose, _ in ways}, key=lambda pose: (pose.mirrored, pose.quarters))
    return Folding(
        replace(geometry, angles=angles),
        tuple(poses),
        tuple(held),
        tuple(poses.index(pose) for _, pose, _ in ways),
        tuple(reverse for _, _, reverse in ways),
    )


def _canonical(geometry: Beam, theta: float, mirrors: bool) -> tuple[float, Pose, bool]:
    """Return the angle, pose and reversal that give the view θ, with as few different poses as may be."""
    parallel = isinstance(geometry, ParallelBeam)
    end = math.pi / 2 + SAME if mirrors else 3 * math.pi / 4 - SAME
    for mirrored, quarters, half in product((False, True), range(4), (False, True)):
        reverse = mirrored != half
        if (mirrored and not mirrors) or (half and not parallel) or (reverse and geometry.offset_mm):
            continue
        angle = (-theta if mirrored else theta) - quarters * math.pi / 2 - half * math.pi
        angle = math.remainder(angle, 2 * math.pi)
        if math.pi / 4 - SAME <= angle <= end:
            return angle, Pose(quarters, mirrored), reverse
    raise AssertionError("quarter turns reach every angle")


def _distinct(angles: Sequence[float]) -> tuple[list[float], list[int]]:
    """Return the different angles in order, and which of them each one is."""
    order = sorted(range(len(angles)), key=angles.__getitem__)
    distinct: list[float] = []
    which = [0] * len(angles)
    for place in order:
        if not distinct or angles[place] - distinct[-1] > SAME:
            distinct.append(angles[place])
        which[place] = len(distinct) - 1
    return distinct, which
