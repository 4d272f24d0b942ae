"""From a random mask to a fixed one: by probability, by rank, or the best of some draws.

What the certificate of a stochastic predictor says does not hold for these.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gramian.compress.density import Scope, keep_highest
from gramian.compress.masks import Units, masks_of
from gramian.compress.structures import Patterns
from gramian.errors import InputError


@torch.no_grad()
def probable(model: nn.Module) -> Units:
    """Return the units with λ > ½, and of patterns the most probable one.

    The minimum of the expected loss over λ is at such a mask, because it is linear in each λ_j.

    Raises: InputError when the model has no masks.
    Holds: exactly.
    """
    return {name: mask.structure.best(mask.logits) for name, mask in masks_of(model).items()}


@torch.no_grad()
def most_probable(model: nn.Module, density: float, scope: Scope = "model") -> Units:
    """Return the units of largest λ at a density, the first of equal ones.

    Raises: InputError as `density.keep_highest`.
    Holds: exactly.
    """
    scores = {
        name: mask.probabilities if isinstance(mask.structure, Patterns) else mask.logits
        for name, mask in masks_of(model).items()
    }
    return keep_highest(model, scores, density, scope)


@torch.no_grad()
def best_of(
    model: nn.Module, loss: Callable[[nn.Module], Tensor | float], draws: int, generator: torch.Generator
) -> Units:
    """Return the mask of lowest loss among some draws and the mask of λ > ½; the first of equal ones.

    `loss` is called with the model under each mask: take training data. The model's masks are left as they
    were.

    Raises: InputError for fewer than one draw, and when no loss is a number.
    Holds: exactly.
    """
    if draws < 1:
        raise InputError(f"at least one draw is needed, got {draws}")
    masks = masks_of(model)
    before = {name: (mask.mode, mask.kept) for name, mask in masks.items()}
    best, lowest = None, torch.inf
    try:
        for k in range(draws + 1):
            units = probable(model) if k == 0 else _drawn(model, generator)
            for name, mask in masks.items():
                mask.mode, mask.kept = "kept", units[name]
            value = float(loss(model))
            if value < lowest:
                best, lowest = units, value
    finally:
        for name, mask in masks.items():
            mask.mode, mask.kept = before[name]
    if best is None:
        raise InputError("no mask has a loss that is a number; look at the data and the learning rate")
    return best


def _drawn(model: nn.Module, generator: torch.Generator) -> Units:
    units = {}
    for name, mask in masks_of(model).items():
        noise = torch.rand(mask.logits.shape, generator=generator, device=mask.logits.device)
        units[name] = mask.structure.hard(mask.logits, noise)
    return units
