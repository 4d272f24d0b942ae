"""Multi-layer perceptrons whose prior is known: weights N(0, σ_w²/fan_in), in two parametrisations."""

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.activations import activation as activation_named


class StandardLinear(nn.Linear):
    """A linear map that holds its weights as they act.

        y = x Wᵀ + b,   W ~ N(0, σ_w²/in),   b ~ N(0, σ_b²)

    σ_b = 0 leaves the bias out. Draws come from torch's global generator.

    Shapes: (…, in) -> (…, out).
    Raises: InputError for a number of features below 1, σ_w that is not positive, a negative σ_b.
    Holds: exactly.
    """

    def __init__(self, inputs: int, outputs: int, weight_std: float, bias_std: float) -> None:
        _check(inputs, outputs, weight_std, bias_std)
        super().__init__(inputs, outputs, bias=bias_std > 0)
        self.variances = {"weight": weight_std**2 / inputs, "bias": bias_std**2}
        nn.init.normal_(self.weight, std=math.sqrt(self.variances["weight"]))
        if self.bias is not None:
            nn.init.normal_(self.bias, std=bias_std)


class NTKLinear(nn.Linear):
    """The same map that holds standard normal numbers and scales them as it acts.

        y = (σ_w/√in) x Wᵀ + σ_b b,   W, b ~ N(0, 1)

    σ_b = 0 leaves the bias out. Draws come from torch's global generator.

    Shapes: (…, in) -> (…, out).
    Raises: InputError for a number of features below 1, σ_w that is not positive, a negative σ_b.
    Holds: exactly.
    Source: Jacot, Gabriel, Hongler 2018, arXiv 1806.07572.
    """

    def __init__(self, inputs: int, outputs: int, weight_std: float, bias_std: float) -> None:
        _check(inputs, outputs, weight_std, bias_std)
        super().__init__(inputs, outputs, bias=bias_std > 0)
        self.variances = {"weight": 1.0, "bias": 1.0}
        self.weight_scale, self.bias_scale = weight_std / math.sqrt(inputs), bias_std
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Apply the scaled map."""
        if self.bias is None:
            return nn.functional.linear(input * self.weight_scale, self.weight)
        y = nn.functional.linear(input * (self.weight_scale / self.bias_scale), self.weight, self.bias)
        return self.bias_scale * y  # the parameters meet in one linear map, which kernels of layers know


LAYERS = {"standard": StandardLinear, "ntk": NTKLinear}
"""The linear map of each parametrisation."""


def mlp(
    features: int,
    outputs: int,
    *,
    widths: Sequence[int] = (64, 64),
    activation: str = "relu",
    weight_std: float = 1.5,
    bias_std: float = 0.05,
    parametrisation: str = "standard",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return linear maps with an elementwise function between them, and dropout behind it if asked for.

        f(x) = W_{L+1} φ(W_L … φ(W_1 x + b_1) …) + b_{L+1}

    "standard" and "ntk" make the same law of functions; their Jacobian kernels agree when each counts its
    parameters by their `prior_variances`. Draws come from torch's global generator.

    Shapes: (…, features) -> (…, outputs).
    Raises: InputError for an unknown activation or parametrisation, a width below 1, σ_w that is not
        positive, a negative σ_b, a rate outside [0, 1).
    Holds: exactly.
    """
    if parametrisation not in LAYERS:
        raise InputError(f"unknown parametrisation {parametrisation!r}; choose one of {', '.join(LAYERS)}")
    if not 0 <= dropout < 1:
        raise InputError(f"the rate of dropout must be at least 0 and below 1, got {dropout:g}")
    layer, function = LAYERS[parametrisation], activation_named(activation)
    parts: list[nn.Module] = []
    for inputs, width in pairwise((features, *widths)):
        parts += [layer(inputs, width, weight_std, bias_std), function()]
        parts += [nn.Dropout(dropout)] if dropout else []
    last = widths[-1] if widths else features
    return nn.Sequential(*parts, layer(last, outputs, weight_std, bias_std))


def prior_variances(module: nn.Module) -> dict[str, float]:
    """Return the variance at initialisation of every parameter of an `mlp`, by name.

        Λ_j = σ_w²/fan_in and σ_b² (standard), 1 (ntk)

    Raises: InputError for a parameter that no StandardLinear or NTKLinear holds.
    Holds: exactly.
    """
    found: dict[str, float] = {}
    for name, parameter in module.named_parameters():
        holder, _, own = name.rpartition(".")
        layer = module.get_submodule(holder)
        if not isinstance(layer, StandardLinear | NTKLinear):
            raise InputError(
                f"the prior of {name} (shape {tuple(parameter.shape)}) is known only in a StandardLinear or "
                f"NTKLinear, not in {type(layer).__name__}"
            )
        found[name] = layer.variances[own]
    return found


def _check(inputs: int, outputs: int, weight_std: float, bias_std: float) -> None:
    if inputs < 1 or outputs < 1:
        raise InputError(f"a linear map needs positive numbers of features, got {inputs}, {outputs}")
    if not 0 < weight_std < math.inf or not 0 <= bias_std < math.inf:
        raise InputError(
            f"weights need a positive standard deviation and biases one of at least 0, got {weight_std:g} "
            f"and {bias_std:g}"
        )
