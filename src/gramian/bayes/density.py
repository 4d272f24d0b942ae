"""A log density and its gradient, at one position of each of several chains."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from gramian.bayes.flat import Flat
from gramian.bayes.trajectory import Density
from gramian.errors import InputError


class LogDensity:
    """ln π(θ)/T and its gradient at one position of each chain.

    Chains go through `torch.func.vmap` together; a density that it cannot run goes chain by chain.

    Shapes: positions, each (dim) -> pairs of a number and (dim).
    Raises: InputError for a density that is not one differentiable number.
    Holds: exactly.
    """

    def __init__(
        self, log_density: Callable[[Any], Tensor], flat: Flat, temperature: float, vectorised: bool
    ) -> None:
        self.log_density, self.flat, self.temperature = log_density, flat, temperature
        self.vectorised = vectorised

    def __call__(self, positions: Sequence[Tensor]) -> list[Density]:
        """Return value and gradient at every position."""
        if self.vectorised:
            try:
                return self._together(torch.stack(list(positions)))
            except (RuntimeError, InputError):  # control flow that depends on data, or an unknown operation
                self.vectorised = False
        return [self._alone(position) for position in positions]

    def _together(self, positions: Tensor) -> list[Density]:
        with warnings.catch_warnings():  # of operations that vmap knows no rule for, only a slow way
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            values, gradients = _differentiated(vmap(self._value), positions)
        return list(zip(values.double().tolist(), gradients, strict=True))

    def _alone(self, position: Tensor) -> Density:
        value, gradient = _differentiated(self._value, position)
        return float(value), gradient

    def _value(self, position: Tensor) -> Tensor:
        value = self.log_density(self.flat.unpack(position))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"log_density has to return one floating number as a tensor, but gave {found}")
        return value.reshape(()) / self.temperature


def _differentiated(function: Callable[[Tensor], Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Give values and their gradients; chains are independent, so the sum's gradient is that of each."""
    with torch.enable_grad():
        leaf = positions.detach().requires_grad_()
        values = function(leaf)
        if not values.requires_grad:
            raise InputError("log_density has to be differentiable by torch, but has lost its gradient")
        (gradients,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradients
