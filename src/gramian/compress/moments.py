"""Moment matching: the Gaussian noise that a random mask gives to the pre-activations of a layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gramian.compress.structures import Rows, Weights


def add_noise(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mean: Tensor) -> Tensor:
    """Add the noise of the pre-activations to their mean; a forward hook that is idle in other modes.

    mean_i = Σ_j λ_ij w_ij x_j + b_i,   var_i = Σ_j [λ_ij (1 − λ_ij) w_ij² + λ_ij σ_ij²] x_j²
    and for masks on rows  var_i = λ_i (1 − λ_i) (Σ_j w_ij x_j)² + λ_i Σ_j σ_ij² x_j²

    One normal number a unit, example and position; for rows one a unit and example, as the mask has it.

    Shapes: pre-activations of the layer -> the same.
    Holds: mean and variance exactly, for each pre-activation of an example on its own; the Gaussian shape and
    the independence between positions approximately.
    Source: Kingma, Salimans, Welling 2015, arXiv 1506.02557; Wang & Manning 2013 (fast dropout).
    """
    mask = layer.parametrizations.weight[0]
    if mask.mode != "moments" or mask.given is not None:
        return mean
    x = args[0] if args else kwargs["input"]
    weight = layer.parametrizations.weight.original
    chance, std = mask.probabilities, mask.log_std
    variance = None if std is None else mask.spread(chance, weight) * (2 * std).exp()
    if isinstance(mask.structure, Rows):
        deviation = mask.spread(
            (chance * (1 - chance)).clamp(min=torch.finfo(chance.dtype).tiny).sqrt(), weight
        )
        part = product(layer, x, deviation * weight)
        mean = torch.addcmul(mean, part, _row_noise(layer, mask, part, weight))
    else:
        masked = mask.spread(chance * (1 - chance), weight) * weight.square()
        variance = masked if variance is None else variance + masked
    if variance is not None:
        spread = product(layer, x.square(), variance).clamp(min=torch.finfo(mean.dtype).tiny).sqrt()
        mean = torch.addcmul(mean, spread, _normal(spread.shape, mask, mean))
    return mean


def product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a linear or convolutional layer computes with another weight and without its bias."""
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight)
    if isinstance(layer, nn.modules.conv._ConvNd):
        convolve: Any = layer._conv_forward
        return convolve(x, weight, None)
    return x @ weight


def can_match(layer: nn.Module, structure: Weights) -> bool:
    """Tell whether the mean and variance of a layer's pre-activations are known."""
    hidden = isinstance(layer, nn.modules.conv._ConvTransposeNd | NonDynamicallyQuantizableLinear)
    return not hidden and (type(structure) in (Weights, Rows))


def _row_noise(layer: Any, mask: Any, like: Tensor, weight: Tensor) -> Tensor:
    """Return one normal number for every example and unit, copied to all that the unit covers."""
    units = mask.logits.shape[0]
    channel_last = not isinstance(layer, nn.modules.conv._ConvNd)
    positions = 0 if channel_last else weight.ndim - 2
    batched = like.ndim > positions + 1
    shape = (like.shape[0], units) if batched else (units,)
    noise = _normal(shape, mask, like).repeat_interleave(mask.structure.group, -1)
    if channel_last:
        return noise.reshape(*noise.shape[:-1], *[1] * (like.ndim - noise.ndim), noise.shape[-1])
    return noise.reshape(*noise.shape, *[1] * positions)


def _normal(shape: Any, mask: Any, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=mask.generator, dtype=like.dtype, device=like.device)
