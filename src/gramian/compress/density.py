"""How many weights are kept: exact counts by score, expected density, its projection and its schedule."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.compress.masks import StochasticMask, Units, masks_of, originals_of
from gramian.compress.structures import Patterns, weights_per_unit
from gramian.errors import InputError

Scope = Literal["model", "layer"]
"""Scores compete over the whole model, or within each layer, which then all have the same density."""

HALVINGS = 200
"""Bisections of a root in double precision, more than it can use."""


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Return how many weights one unit of each layer covers.

    Raises: InputError when the model has no masks.
    """
    weights = originals_of(model)
    return {
        name: weights_per_unit(mask.structure, mask.size_of(weights[name]))
        for name, mask in masks_of(model).items()
    }


def density_of(model: nn.Module) -> float:
    """Return the share of the masked weights that the modes of the masks keep on average now.

    Raises: InputError when the model has no masks.
    Holds: exactly, for the mask that was drawn where the mode draws one.
    """
    sizes = sizes_of(model)
    counts = {
        name: (mask.current().detach().double().sum() * sizes[name], mask.kept.numel() * sizes[name])
        for name, mask in masks_of(model).items()
    }
    return float(sum(kept for kept, _ in counts.values())) / sum(total for _, total in counts.values())


def check_density(density: float) -> None:
    """Refuse what is no share of weights that can be kept.

    Raises: InputError unless 0 < density ≤ 1.
    """
    if not 0 < density <= 1:
        raise InputError(f"the density must be more than 0 and at most 1, got {density}")


def highest(scores: Units, sizes: Mapping[str, int], density: float, name: str = "the model") -> Units:
    """Keep the units of highest score, in order, as long as they hold at most round(density · p) weights.

    Equal scores are kept in the order of the layers and of their units. With single weights exactly
    round(density · p) are kept.

    Raises: InputError for a density that is out of range or keeps no unit, and a score that is not a number.
    Holds: exactly.
    """
    check_density(density)
    flat = torch.cat([value.detach().flatten() for value in scores.values()])
    if flat.isnan().any():
        raise InputError("a score is not a number; lower the learning rate or look at the data")
    cost = torch.cat([torch.full((v.numel(),), sizes[k], device=flat.device) for k, v in scores.items()])
    budget = round(density * int(cost.sum()))
    order = flat.sort(descending=True, stable=True).indices
    count = int((cost[order].cumsum(0) <= budget).sum())
    if count == 0:
        raise InputError(
            f"a density of {density:g} keeps no unit of {name}: of {int(cost.sum())} weights it allows "
            f"{budget}, and the best unit has {int(cost[order[0]])}"
        )
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    chosen[order[:count]] = True
    parts = chosen.split([value.numel() for value in scores.values()])
    return {k: part.reshape(v.shape) for (k, v), part in zip(scores.items(), parts, strict=True)}


def keep_highest(model: nn.Module, scores: Units, density: float, scope: Scope = "model") -> Units:
    """Return the units of highest score at a density, under the structure of the model's masks.

    Layers of n:m patterns keep the n highest of every m.

    Raises: InputError as `highest`, for scores of other shapes than the masks', and for a density other than
        n/m where there are patterns.
    Holds: exactly.
    """
    masks, sizes = masks_of(model), sizes_of(model)
    if scope not in get_args(Scope):
        raise InputError(f"unknown scope {scope!r}; choose one of {', '.join(get_args(Scope))}")
    check_density(density)
    check_units(masks, scores)
    kept: Units = {}
    for name, mask in masks.items():
        if isinstance(mask.structure, Patterns):
            _check_pattern(name, mask.structure, density)
            kept[name] = mask.structure.top(scores[name])
    rest = {name: scores[name] for name in masks if name not in kept}
    if scope == "layer":
        for name, value in rest.items():
            kept |= highest({name: value}, sizes, density, repr(name))
    elif rest:
        kept |= highest(rest, sizes, density)
    return {name: kept[name] for name in masks}


def check_units(masks: Mapping[str, StochasticMask], units: Units) -> None:
    """Refuse units that are not those of the masks.

    Raises: InputError when a layer is missing or has another shape.
    """
    for name, mask in masks.items():
        if name not in units or units[name].shape != mask.kept.shape:
            raise InputError(f"{name!r} needs a score for each of its {tuple(mask.kept.shape)} units")


@torch.no_grad()
def start_from(model: nn.Module, kept: Units, high: float = 0.9, low: float = 0.1) -> None:
    """Set every λ to one of two values: `high` where the unit is kept, `low` where it is not.

    Raises: InputError unless 0 < low ≤ high < 1, and for units of other shapes.
    Holds: exactly for independent units; a pattern gets the probability of these under the condition n of m.
    """
    if not 0 < low <= high < 1:
        raise InputError(f"start probabilities need 0 < low ≤ high < 1, got {low} and {high}")
    masks = masks_of(model)
    check_units(masks, kept)
    for name, mask in masks.items():
        start = torch.where(kept[name], high, low).to(mask.logits)
        mask.logits.copy_(mask.structure.start(start))


@torch.no_grad()
def start_smoothly(
    model: nn.Module, scores: Units, density: float, width: float = 0.1, clamp: float = 0.01
) -> None:
    """Set λ by the rank of the score, the mean λ over weights being the density.

    λ_j = clip(σ((r_j − c) / width), clamp, 1 − clamp),  r_j the rank of the score in (0, 1), c by bisection

    Ranks stand for the scores, whose scale differs by orders of magnitude between kinds of score.

    Raises: InputError for a density that the clamp or patterns do not allow, and for scores of other shapes.
    Holds: exactly, to the rounding of the logits.
    """
    check_density(density)
    masks, sizes = masks_of(model), sizes_of(model)
    check_units(masks, scores)
    if not clamp < density < 1 - clamp:
        raise InputError(f"λ within [{clamp:g}, {1 - clamp:g}] cannot have the mean {density:g}")
    for name, mask in masks.items():
        if isinstance(mask.structure, Patterns):
            raise InputError(f"the patterns of {name!r} have a fixed density; start them by start_from")
    flat = torch.cat([scores[name].detach().flatten() for name in masks])
    ranks = torch.empty(len(flat), dtype=torch.float64, device=flat.device)
    order = flat.sort(descending=True, stable=True).indices
    ranks[order] = 1 - (torch.arange(len(flat), dtype=torch.float64, device=flat.device) + 0.5) / len(flat)
    share = _shares({name: scores[name] for name in masks}, sizes)

    def chance(cut: float) -> Tensor:
        return ((ranks - cut) / width).sigmoid().clamp(clamp, 1 - clamp)

    reach = 1 + 40 * width
    cut = bisect(lambda c: float(chance(c) @ share) - density, -reach, reach)
    parts = chance(cut).logit().split([mask.logits.numel() for mask in masks.values()])
    for mask, part in zip(masks.values(), parts, strict=True):
        mask.logits.copy_(part.reshape(mask.logits.shape))


@torch.no_grad()
def project(
    probabilities: Float[Tensor, " p"], density: float, sizes: Float[Tensor, " p"] | None = None
) -> Float[Tensor, " p"]:
    """Return the nearest probabilities whose mean over weights is at most the density.

    λ'_j = clip(λ_j − v, 0, 1),  v = min{v ≥ 0 : Σ_j c_j λ'_j ≤ density Σ_j c_j},  c_j the weights of unit j

    Nearest in Σ_j c_j (λ'_j − λ_j)².

    Raises: InputError unless 0 < density ≤ 1.
    Holds: exactly, to rounding in double precision.
    Source: Zhou et al. 2021 (ProbMask), whose published code does it by bisection.
    """
    check_density(density)
    wide = probabilities.double()
    share = torch.ones_like(wide) if sizes is None else sizes.double()
    share = share / share.sum()
    if float(wide.clamp(0, 1) @ share) <= density:
        return probabilities.clamp(0, 1)
    excess = bisect(lambda v: float((wide - v).clamp(0, 1) @ share) - density, -1.0, float(wide.max()) + 1)
    return (wide - excess).clamp(0, 1).to(probabilities.dtype)


@torch.no_grad()
def shift(
    logits: Float[Tensor, " p"], density: float, sizes: Float[Tensor, " p"] | None = None
) -> Float[Tensor, " p"]:
    """Return logits moved by one number so that the mean of λ over weights equals the density.

    s'_j = s_j − v,  Σ_j c_j σ(s'_j) = density Σ_j c_j

    The probabilities of that mean which are nearest in Σ_j c_j kl(λ'_j ‖ λ_j), and no λ reaches 0 or 1.

    Raises: InputError unless 0 < density < 1.
    Holds: exactly, to rounding in double precision.
    """
    check_density(density)
    if density == 1:
        raise InputError("a density of 1 needs infinite logits; take no masks instead")
    wide = logits.double()
    share = torch.ones_like(wide) if sizes is None else sizes.double()
    share = share / share.sum()
    reach = float(wide.abs().max()) + 50
    v = bisect(lambda v: float((wide - v).sigmoid() @ share) - density, -reach, reach)
    return (wide - v).to(logits.dtype)


@torch.no_grad()
def project_model(model: nn.Module, density: float, clamp: float = 1e-4) -> None:
    """Project the λ of all masks together to a density, as `project`, and keep them off 0 and 1 by `clamp`.

    Raises: InputError unless 0 < density ≤ 1, and when there are patterns of another density.
    Holds: exactly, but for the clamp, which moves the mean by at most itself.
    """
    check_density(density)
    masks, sizes = masks_of(model), sizes_of(model)
    for name, mask in masks.items():
        if isinstance(mask.structure, Patterns):
            _check_pattern(name, mask.structure, density)
    free = {name: mask for name, mask in masks.items() if not isinstance(mask.structure, Patterns)}
    if not free:
        return
    chances = {name: mask.probabilities.double() for name, mask in free.items()}
    flat = torch.cat([value.flatten() for value in chances.values()])
    projected = project(flat, density, _shares(chances, sizes)).clamp(clamp, 1 - clamp)
    parts = projected.logit().split([value.numel() for value in chances.values()])
    for mask, part in zip(free.values(), parts, strict=True):
        mask.logits.copy_(part.reshape(mask.logits.shape))


def cubic(step: int, begin: int, end: int, first: float, last: float) -> float:
    """Return the density of a step under the cubic schedule, constant before `begin` and after `end`.

    d(t) = d_last + (d_first − d_last) (1 − (t − begin)/(end − begin))³

    Raises: InputError unless begin < end and both densities are in (0, 1].
    Holds: exactly.
    Source: Zhu & Gupta 2017, arXiv 1710.01878, Eq. 1.
    """
    check_density(first)
    check_density(last)
    if not begin < end:
        raise InputError(f"the schedule must begin before it ends, got {begin} and {end}")
    left = 1 - min(max((step - begin) / (end - begin), 0.0), 1.0)
    return last + (first - last) * left**3


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of a decreasing function between two numbers, the upper side of the last bracket."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return high


def _shares(units: Units, sizes: Mapping[str, int]) -> Float[Tensor, " p"]:
    cost = torch.cat([torch.full((v.numel(),), float(sizes[k]), device=v.device) for k, v in units.items()])
    return cost.double() / cost.double().sum()


def _check_pattern(name: str, structure: Patterns, density: float) -> None:
    if abs(density - structure.n / structure.m) > 1e-12:
        raise InputError(
            f"{name!r} keeps {structure.n} of every {structure.m} weights; a density of {density:g} is out "
            f"of reach, only {structure.n / structure.m:g} is not"
        )
