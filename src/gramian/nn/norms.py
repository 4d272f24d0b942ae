"""Normalisations by name; each is a factory `width -> module`, so that a block takes one as a part."""

from collections.abc import Callable
from functools import partial

from torch import nn

from gramian.errors import InputError

Norm = Callable[[int], nn.Module]


def identity(width: int) -> nn.Module:
    """No normalisation: N(x) = x for every width.

    Shapes: (…, width) -> (…, width).
    Holds: exactly.
    """
    return nn.Identity()


NORMS: dict[str, Norm] = {
    "layernorm": partial(nn.LayerNorm, eps=1e-5),
    "rmsnorm": partial(nn.RMSNorm, eps=1e-6),
    "none": identity,
}
"""layernorm: w (x − mean)/√(var + ε) + b, ε = 1e-5; rmsnorm: w x/√(mean x² + ε), ε = 1e-6 inside the root."""


def norm(name: str) -> Norm:
    """Return the normalisation registered under `name`.

    Raises: InputError when the name is unknown.
    """
    if name not in NORMS:
        raise InputError(f"unknown norm {name!r}; choose one of {', '.join(NORMS)}")
    return NORMS[name]
