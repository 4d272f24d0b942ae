"""Which layers of a module carry masks: linear and convolutional ones, by the patterns of their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gramian.compress.structures import Columns, Weights
from gramian.errors import InputError


def transposed(layer: nn.Module) -> bool:
    """Tell whether the weight is stored as (in, out, …), as in transposed convolutions and GPT-2's Conv1D."""
    return isinstance(layer, nn.modules.conv._ConvTransposeNd) or not isinstance(
        layer, nn.Linear | nn.modules.conv._ConvNd
    )


def maskable(module: nn.Module) -> bool:
    """Tell whether a module is a linear or convolutional layer."""
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return True
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers' linear layer


def chosen(model: nn.Module, wanted: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    """Return the layers to mask by name, those left out whose weight several modules share.

    Raises: InputError when a pattern matches no layer, and when nothing is left.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for value in filter(lambda value: value is not None, module._parameters.values()):
            owners[id(value)] = owners.get(id(value), 0) + 1
    candidates = {name: module for name, module in model.named_modules() if maskable(module)}
    for pattern in [*wanted, *exclude]:
        if candidates and not any(fnmatchcase(name, pattern) for name in candidates):
            shown = ", ".join(list(candidates)[:12])
            raise InputError(f"no linear or convolutional layer matches {pattern!r}; there are {shown}")
    found = {
        name: module
        for name, module in candidates.items()
        if any(fnmatchcase(name, pattern) for pattern in wanted)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
        and owners.get(id(module._parameters.get("weight")), 0) <= 1
    }
    if not found:
        raise InputError(
            "the module has nothing to prune: no linear or convolutional layer with a weight of its own"
            + (" is left" if candidates else "")
        )
    return found


def check_layer(name: str, layer: Any, structure: Weights) -> None:
    """Refuse a layer whose weight cannot carry a mask of the structure.

    Raises: InputError that names the layer.
    """
    if parametrize.is_parametrized(layer, "weight"):
        raise InputError(f"the weight of {name!r} is parametrised already; remove that first")
    if is_lazy(layer.weight) or not layer.weight.is_floating_point():
        raise InputError(f"the weight of {name!r} is not initialised or not of a floating type")
    flipped = transposed(layer)
    if (
        getattr(layer, "groups", 1) != 1
        and (flipped or isinstance(structure, Columns))
        and type(structure) is not Weights
    ):
        raise InputError(f"{name!r} is a grouped convolution, whose weight holds only a part of its features")
    size = tuple(layer.weight.shape)
    structure.check((size[1], size[0], *size[2:]) if flipped else size, name)
