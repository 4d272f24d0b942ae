"""Parameters as one vector, a module as a function of them, and Gaussian priors on them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from gramian.core.jacobian import Function, Parameters, Weights, function, scales
from gramian.errors import InputError

Values = Tensor | Parameters
"""One tensor, or several by name."""

Std = float | Weights
"""Standard deviations of parameters: one number, or by name, or by a function of name and value."""

Call = Callable[..., Tensor]
"""A module under given parameters: called with what the module is called with."""

LogLikelihood = Callable[[Call], Tensor]
"""ln p(data | θ) in nats, summed over the data, given the module under θ."""


@dataclass(frozen=True)
class Flat:
    """The order in which tensors lie in one vector; a single tensor goes by no name.

    Holds: exactly.
    """

    shapes: Mapping[str, tuple[int, ...]]
    single: bool

    @classmethod
    def of(cls, values: Values, leading: int = 0) -> "Flat":
        """Read names and shapes off, without the first `leading` axes.

        Raises: InputError for nothing, other things than floating tensors, too few axes, mixed dtypes.
        """
        parts = {"": values} if isinstance(values, Tensor) else dict(values)
        if not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts.values()):
            raise InputError("unknowns have to be one floating tensor, or a dict of them by name")
        if any(part.ndim < leading for part in parts.values()) or not sum(p.numel() for p in parts.values()):
            raise InputError(f"unknowns have to hold numbers, below {leading} leading axes")
        if len({(part.dtype, part.device, part.shape[:leading]) for part in parts.values()}) != 1:
            raise InputError("unknowns have to be of one dtype, on one device and of the same leading axes")
        shapes = {name: tuple(part.shape[leading:]) for name, part in parts.items()}
        return cls(shapes, isinstance(values, Tensor))

    @property
    def size(self) -> int:
        """Number of unknowns."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pack(self, values: Values) -> Float[Tensor, "*leading dim"]:
        """Return the tensors as a vector, or as many as their leading axes hold."""
        parts = {"": values} if isinstance(values, Tensor) else values
        rows = [
            parts[name].reshape(*parts[name].shape[: parts[name].ndim - len(shape)], -1)
            for name, shape in self.shapes.items()
        ]
        return torch.cat(rows, -1)

    def unpack(self, vector: Float[Tensor, "*leading dim"]) -> Values:
        """Return the tensors that `pack` has put together."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = {
            name: part.reshape(*vector.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), vector.split(sizes, -1), strict=True)
        }
        return parts[""] if self.single else parts


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Independent Gaussians N(m, s²) over the trainable parameters of a module, as broadcasting tensors."""

    mean: Parameters
    std: Parameters

    def log_density(self, parameters: Parameters) -> Float[Tensor, ""]:
        """Return Σ ln N(θ; m, s²).

        Holds: exactly.
        """
        terms = []
        for name, value in parameters.items():
            z = (value - self.mean[name]) / self.std[name]
            spread = self.std[name].log().expand_as(z).sum()
            terms.append(-0.5 * z.square().sum() - spread - 0.5 * z.numel() * math.log(2 * math.pi))
        return torch.stack(terms).sum()


def gaussian_prior(f: Function, std: Std, mean: Parameters | None = None) -> GaussianPrior:
    """Return the prior N(mean, std²) of a module's trainable parameters; mean 0 unless it is given.

    Raises: InputError for standard deviations that are not finite and above 0, and a parameter without one.
    """
    found = scales(f, std if isinstance(std, Mapping) or callable(std) else dict.fromkeys(f.parameters, std))
    for name, value in found.items():
        if not (value > 0).all():
            raise InputError(f"the prior of {name} needs a standard deviation above 0")
    centre = {name: torch.zeros_like(p) for name, p in f.parameters.items()} if mean is None else mean
    if {name: p.shape for name, p in centre.items()} != {name: p.shape for name, p in f.parameters.items()}:
        raise InputError("the prior's mean needs one tensor for each trainable parameter, of its shape")
    return GaussianPrior(centre, found)


def under(f: Function, parameters: Parameters) -> Call:
    """Return the module under these parameters, its buffers and frozen parameters as they are."""

    def call(*inputs: Tensor) -> Tensor:
        return functional_call(f.module, {**f.constants, **parameters}, inputs)

    return call


def log_posterior(
    module: nn.Module, log_likelihood: LogLikelihood, prior: Std, mean: Parameters | None = None
) -> Callable[[Parameters], Tensor]:
    """Return the log density of a module's trainable parameters given data, to sample from.

        ln p(θ | data) = ln p(data | θ) + Σ ln N(θ; m, s²) + constant

    `prior` gives the standard deviations s: a number, or one for every parameter by name or by a function of
    its name and value.

    Raises: InputError as `gaussian_prior`.
    Holds: exactly.
    """
    f = function(module)
    law = gaussian_prior(f, prior, mean)
    return lambda parameters: log_likelihood(under(f, parameters)) + law.log_density(parameters)
