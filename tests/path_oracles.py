"""Paths with closed-form answers, and every hallmark straight from their points, definition by definition."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(n: int, p: int, seed: int = 0) -> Tensor:
    times = torch.arange(n, dtype=torch.float64)[:, None]
    return normal(1, p, seed=seed) + times * normal(1, p, seed=seed + 1) / 7


def walk(n: int, p: int, seed: int = 0) -> Tensor:
    return normal(n, p, seed=seed).cumsum(0)


def jittering(n: int, p: int, seed: int = 0) -> Tensor:
    return 3 * normal(1, p, seed=seed + 1) + normal(n, p, seed=seed)


def plane(xy: Tensor, p: int, seed: int = 0) -> Tensor:
    """Points of a plane put into p dimensions, away from the origin."""
    return normal(1, p, seed=seed) + xy @ torch.linalg.qr(normal(p, 2, seed=seed + 1)).Q.T


def circle(n: int, p: int, period: float, seed: int = 0) -> Tensor:
    angles = torch.arange(n, dtype=torch.float64) * 2 * math.pi / period
    return plane(torch.stack([angles.cos(), angles.sin()], 1), p, seed)


def spiral(n: int, p: int, turn: float = 0.4, growth: float = 0.93, seed: int = 0) -> Tensor:
    """Logarithmic spiral: each update is the one before, turned and scaled."""
    times = torch.arange(n, dtype=torch.float64)
    angles = turn * times
    return plane(growth ** times[:, None] * torch.stack([angles.cos(), angles.sin()], 1), p, seed)


def angle(u: Tensor, v: Tensor) -> float:
    """Degrees between two vectors, exact for tiny angles too (Kahan); NaN where one is 0."""
    if not u.any() or not v.any():
        return math.nan
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def cosine(u: Tensor, v: Tensor) -> float:
    return float(u @ v / (u.norm() * v.norm()))


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def constant(n: int, value: float) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def pairs(rows: Tensor, function: Callable[[Tensor, Tensor], float]) -> Tensor:
    return torch.stack([numbers([function(u, v) for v in rows]) for u in rows])


def mean_off(square: Tensor) -> Tensor:
    return square[~torch.eye(len(square), dtype=torch.bool)].mean()


def variances(points: Tensor) -> Tensor:
    squares = torch.linalg.svdvals(points - points.mean(0)).square()
    return squares / squares.sum()


def direct_curves(points: Tensor) -> dict[str, Tensor]:
    updates = points[1:] - points[:-1]
    start, end, origin = points[0], points[-1], torch.zeros_like(points[0])
    turns = range(len(updates) - 1)
    radial = numbers([float(u @ x / x.norm()) for u, x in zip(updates, points[:-1], strict=True)])
    shares = variances(points)

    def seen_from(apex: Tensor) -> Tensor:
        return numbers([angle(x - apex, x + u - apex) for x, u in zip(points[:-1], updates, strict=True)])

    return {
        "norms": points.norm(dim=1),
        "displacements": (points - start).norm(dim=1),
        "update_lengths": updates.norm(dim=1),
        "acceleration_lengths": (updates[1:] - updates[:-1]).norm(dim=1),
        "update_angles": numbers([angle(updates[t], updates[t + 1]) for t in turns]),
        "apex_angles_at_start": seen_from(start),
        "apex_angles_at_origin": seen_from(origin),
        "angles_to_end": numbers([angle(u, end - start) for u in updates]),
        "angles_to_remainder": numbers(
            [angle(u, end - x) for u, x in zip(updates, points[:-1], strict=True)]
        ),
        "radial_updates": radial,
        "tangential_lengths": (
            updates - radial[:, None] * points[:-1] / points[:-1].norm(dim=1)[:, None]
        ).norm(dim=1),
        "explained_variance": torch.nn.functional.pad(shares, (0, len(points) - len(shares))),
    }


def direct_maps(points: Tensor) -> dict[str, Tensor]:
    return {
        "trajectory_map": pairs(points, cosine),
        "relative_map": pairs(points[1:] - points[0], cosine),
        "update_map": pairs(points[1:] - points[:-1], cosine),
        "distance_map": pairs(points, lambda u, v: float((u - v).norm())),
        "angle_map": pairs(points, angle),
        "relative_angle_map": pairs(points - points[0], angle),
    }


def direct_scalars(points: Tensor) -> dict[str, Tensor]:
    curves, maps = direct_curves(points), direct_maps(points)
    updates = points[1:] - points[:-1]
    cosines = numbers([cosine(u, v) for u, v in pairwise(updates)])
    shares = variances(points)
    moved = (points[-1] - points[0]).norm()
    return {
        "mds": maps["trajectory_map"].mean(),
        "mds_off": mean_off(maps["trajectory_map"]),
        "mds_relative": maps["relative_map"].mean(),
        "mds_relative_off": mean_off(maps["relative_map"]),
        "displacement": moved,
        "relative_displacement": moved / points[0].norm(),
        "path_length": updates.norm(dim=1).sum(),
        "displacement_ratio": moved / updates.norm(dim=1).sum(),
        "norm_growth": points[-1].norm() / points[0].norm(),
        "mean_update_angle": curves["update_angles"].mean(),
        "mean_update_cosine": cosines.mean(),
        "mean_angle_to_end": curves["angles_to_end"].mean(),
        "mean_apex_angle_at_start": curves["apex_angles_at_start"][1:].mean(),
        "mean_apex_angle_at_origin": curves["apex_angles_at_origin"].mean(),
        "mean_radial_share": (curves["radial_updates"] / updates.norm(dim=1)).mean(),
        "effective_rank": torch.special.entr(shares).sum().exp(),
        "participation_ratio": 1 / shares.square().sum(),
        "first_component": shares[0],
    }


def direct(points: Tensor) -> dict[str, Tensor]:
    return direct_scalars(points) | direct_curves(points) | direct_maps(points)
