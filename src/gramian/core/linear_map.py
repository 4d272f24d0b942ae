"""A linear map of which the adjoint is known, with derivatives of every kind."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
"""A linear map of tensors that takes any leading axes."""


def mapped(x: Tensor, apply: Map, adjoint: Map) -> Tensor:
    """Return apply(x), and have its derivatives made by the two maps alone.

        ⟨apply(x), y⟩ = ⟨x, adjoint(y)⟩

    It can be differentiated any number of times, forwards and backwards, and goes through `torch.func.vmap`.
    Neither map sees a graph, so both may use whatever is fast.

    Holds: exactly, where the maps are each other's adjoints.
    """
    return _Product.apply(x, apply, adjoint)


class _Product(torch.autograd.Function):
    """A linear map as its own derivative, in every mode."""

    @staticmethod
    def forward(x: Tensor, apply: Map, adjoint: Map) -> Tensor:
        return apply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Map, Map], output: Tensor) -> None:
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        apply, adjoint = ctx.maps
        return _Product.apply(grads[0], adjoint, apply), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Product.apply(tangents[0], *ctx.maps)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        x, *maps = args
        return _Product.apply(x.movedim(in_dims[0], 0), *maps), 0
