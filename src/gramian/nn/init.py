"""Initial weights from one explicit seed, and linear maps that are re-parametrised around their start."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.residual import Gain, trainable


class Reparametrised(nn.Module):
    """A square linear map that starts at a fixed matrix and learns the difference to it.

        y = α x W₀ᵀ + β x ΔWᵀ,   ΔW = 0 at the start

    W₀ is the identity (never stored, no product), a random orthogonal or a Gaussian matrix (variance
    1/width); a random one is a buffer of the state dict. β² multiplies the learning rate of W under SGD,
    β under Adam.

    Shapes: (…, width) -> (…, width).
    Raises: InputError when `base` is unknown.
    Holds: exactly.
    Source: He & Hofmann 2024, arXiv 2311.01906, section 4.2.
    """

    def __init__(
        self, width: int, base: str = "identity", alpha: Gain | None = None, beta: Gain | None = None
    ):
        super().__init__()
        if base not in ("identity", "orthogonal", "gaussian"):
            raise InputError(f"unknown base matrix {base!r}; choose identity, orthogonal or gaussian")
        self.alpha: Gain = trainable(1.0) if alpha is None else alpha
        self.beta: Gain = trainable(1.0) if beta is None else beta
        self.delta = nn.Linear(width, width, bias=False)
        self.base: Tensor | None
        self.register_buffer("base", None if base == "identity" else torch.empty(width, width))
        self._orthogonal = base == "orthogonal"

    def initialise_(self, generator: torch.Generator) -> None:
        """Draw W₀ and set ΔW = 0."""
        nn.init.zeros_(self.delta.weight)
        if self.base is not None and self._orthogonal:
            nn.init.orthogonal_(self.base, generator=generator)
        elif self.base is not None:
            nn.init.normal_(self.base, std=self.base.shape[0] ** -0.5, generator=generator)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply αW₀ + βΔW."""
        start = x if self.base is None else nn.functional.linear(x, self.base)
        return self.alpha * start + self.beta * self.delta(x)


class OrthogonalProjection(nn.Linear):
    """A square linear map that starts as a random rotation or reflection, and is then as free as any other.

        y = x Wᵀ,   W Wᵀ = I at the start

    Shapes: (…, width) -> (…, width).
    Holds: lengths and angles are kept, exactly, at the start.
    Source: Park et al. 2025, arXiv 2506.19697 (after the embedding and before the unembedding).
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)

    def initialise_(self, generator: torch.Generator) -> None:
        """Draw an orthogonal matrix."""
        nn.init.orthogonal_(self.weight, generator=generator)


class ScaledOrthogonal(nn.Linear):
    """A linear map that starts as a random rotation, scaled so that entries keep their mean square.

        y = x Wᵀ + b,   W = max(√(out/in), 1) Q,   b = 0,   Q with orthonormal rows or columns

    Shapes: (…, in) -> (…, out).
    Raises: InputError unless both numbers of features are positive.
    Holds: mean y² = mean x², exactly for out ≥ in, otherwise on average over Q; at the start.
    Source: Martens et al. 2021, arXiv 2110.01765 (scaled-corrected uniform orthogonal).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        if in_features < 1 or out_features < 1:
            raise InputError(
                f"a linear map needs positive numbers of features, got {in_features}, {out_features}"
            )
        super().__init__(in_features, out_features, bias)

    def initialise_(self, generator: torch.Generator) -> None:
        """Draw a scaled orthogonal matrix."""
        gain = max(math.sqrt(self.out_features / self.in_features), 1.0)
        nn.init.orthogonal_(self.weight, gain, generator=generator)


class ZeroLinear(nn.Linear):
    """A linear map without a bias that starts at zero.

        y = x Wᵀ,   W = 0 at the start

    Shapes: (…, in) -> (…, out).
    Holds: exactly.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def initialise_(self, generator: torch.Generator) -> None:
        """Set W = 0."""
        nn.init.zeros_(self.weight)


def fan_in_std(width: int) -> float:
    """Return the standard deviation that keeps the published start, 0.02 at width 768, at another width.

        σ(d) = 0.02 √(768 / d)

    Holds: exactly; pre-activations then start equally large at every width.
    Source: He & Hofmann 2024, arXiv 2311.01906, appendix (0.02 at width 768).
    """
    return 0.02 * math.sqrt(768 / width)


def initialise_(model: nn.Module, seed: int, std: float = 0.02) -> nn.Module:
    """Fill a model's weights in place, as a function of the seed alone.

    Linear and embedding weights are N(0, std²) and biases 0; then every module with a method `initialise_`
    (a query that starts at zero, a re-parametrised map) sets what differs.

    Raises: InputError when std is negative.
    Holds: equal seeds give equal weights on the same device type.
    Source: He & Hofmann 2024, arXiv 2311.01906, appendix (N(0, 0.02²), W_Q = 0).
    """
    if std < 0:
        raise InputError(f"the standard deviation of initial weights cannot be negative, got {std:g}")
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():
        special = getattr(module, "initialise_", None)
        if callable(special):
            special(generator)
    return model
