"""Physically smaller networks: features that are constant or unused are taken out of a chain of layers."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from gramian.compress.chains import ELEMENTWISE
from gramian.compress.masks import remove_masks
from gramian.errors import InputError

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
MEAN_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
PADDED_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@torch.no_grad()
def shrink(model: nn.Sequential) -> nn.Sequential:
    """Return a copy without the features that zero weights have made constant or unused.

    A row of zeros gives a constant feature, b_j through what follows; its share of the next layer goes to
    that layer's bias: b' = b + Σ_j W_{·j} φ(b_j). A feature whose next column is zero is dropped. A layer
    keeps at least one feature. Names of modules stay. Masks, if there are any, are applied in the mode they
    are in.

    Raises: InputError for a model that is no chain of linear and convolutional layers with elementwise
        functions, pooling, batch norms and flattening between them, and for one in training.
    Holds: exactly, to rounding, in evaluation. A constant channel other than 0 before a convolution that pads
    by zeros stays, as its border differs from its inside.
    """
    if type(model) is not nn.Sequential:
        raise InputError(f"only a chain (nn.Sequential) of layers can shrink, not {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise InputError("a model shrinks in evaluation; call model.eval() first")
    small = deepcopy(model)
    if any(parametrize.is_parametrized(module) for module in small.modules()):
        remove_masks(small, apply=True)
    links = _links(small)
    for link in links:
        constant = _constants(link)
        _drop(link, (link.layer.weight.flatten(1) == 0).all(1) & _foldable(link, constant), constant)
    for link in reversed(links):
        unused = (_columns(link) == 0).flatten(2).all(2).all(0)
        _drop(link, unused, torch.zeros_like(unused, dtype=link.layer.weight.dtype))
    return small


@dataclass(frozen=True)
class _Link:
    """A layer, the modules after it, and the layer that reads them."""

    layer: Any
    between: tuple[Any, ...]
    following: Any


def _links(model: nn.Sequential) -> list[_Link]:
    leaves = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is not nn.Sequential
    ]
    links, between = [], []
    last, seen = None, set()
    for name, module in leaves:
        if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            between.append((name, module))
            continue
        if id(module) in seen or getattr(module, "groups", 1) != 1:
            raise InputError(f"{name!r} is used twice or a grouped convolution, which cannot shrink")
        seen.add(id(module))
        if last is not None:
            for inner, other in between:
                _check_between(inner, other)
            links.append(_Link(last, tuple(other for _, other in between), module))
        last, between = module, []
    if last is None:
        raise InputError("the model has no linear or convolutional layer to shrink")
    return links


def _check_between(name: str, module: nn.Module) -> None:
    flat = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    pooled = isinstance(module, MAX_POOLS + MEAN_POOLS + DROPOUTS) or (
        isinstance(module, PADDED_POOLS) and not any(_numbers(module.padding))
    )
    norm = isinstance(module, _BatchNorm) and module.running_mean is not None
    if not (type(module) in ELEMENTWISE or flat or pooled or norm):
        raise InputError(
            f"{name!r} ({type(module).__name__}) may mix features; a chain shrinks through elementwise "
            f"functions, pooling without padding, batch norms with statistics and flattening"
        )


def _constants(link: _Link) -> Float[Tensor, " out"]:
    """Return what each feature comes to at the next layer when its weights are zero."""
    weight = link.layer.weight
    value = weight.new_zeros(len(weight)) if link.layer.bias is None else link.layer.bias.clone()
    for module in link.between:
        if isinstance(module, _BatchNorm):
            value = _normalised(module, value)
        elif type(module) in ELEMENTWISE:
            value = module(value)
    return value


def _normalised(norm: Any, value: Tensor) -> Tensor:
    value = (value - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    return value * norm.weight + norm.bias if norm.affine else value


def _columns(link: _Link) -> Float[Tensor, "next out ..."]:
    """Return the next layer's weight by the features of this one; flattening gives each several columns."""
    weight = link.following.weight
    return weight.reshape(len(weight), len(link.layer.weight), -1, *weight.shape[2:])


def _foldable(link: _Link, constant: Tensor) -> Bool[Tensor, " out"]:
    convolution = not isinstance(link.following, nn.Linear)
    padded = convolution and link.following.padding not in ("valid", 0)
    if padded and link.following.padding_mode == "zeros" and any(_numbers(link.following.padding)):
        return (constant == 0) | (_columns(link) == 0).flatten(2).all(2).all(0)
    return torch.ones_like(constant, dtype=torch.bool)


def _drop(link: _Link, dead: Bool[Tensor, " out"], constant: Float[Tensor, " out"]) -> None:
    """Take features out of both layers and the norms between, and add what they came to to the bias."""
    if dead.all():
        dead = dead.clone()
        dead[0] = False
    if not dead.any():
        return
    columns, following = _columns(link), link.following
    added = columns.flatten(2).sum(-1)[:, dead] @ constant[dead]
    if following.bias is not None:
        following.bias.add_(added)
    elif (added != 0).any():
        following.bias = nn.Parameter(added)
    _resize_inputs(following, columns[:, ~dead].flatten(1, 2))
    _resize_outputs(link.layer, ~dead)
    for norm in link.between:
        if isinstance(norm, _BatchNorm):
            _resize_norm(norm, ~dead)


def _resize_inputs(layer: Any, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", weight.shape[1])


def _resize_outputs(layer: Any, alive: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[alive].clone(), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[alive].clone(), requires_grad=layer.bias.requires_grad)
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", int(alive.sum()))


def _resize_norm(norm: Any, alive: Tensor) -> None:
    norm.num_features = int(alive.sum())
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[alive].clone())
    if norm.affine:
        for name in ("weight", "bias"):
            setattr(norm, name, nn.Parameter(getattr(norm, name)[alive].clone()))


def _numbers(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
