"""The unit of architecture, skip·x + gain·branch(x), and the depth rules that choose its gains."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.errors import InputError
from gramian.nn.view import View

Gain = float | nn.Parameter
"""A constant of the architecture (a float) or a trainable scalar (a 0-d parameter)."""


def trainable(value: float) -> nn.Parameter:
    """Return a trainable gain that starts at `value`: a 0-d parameter, never decayed."""
    return nn.Parameter(torch.tensor(float(value)))


def through(part: nn.Module, x: Tensor, view: View | None) -> Tensor:
    """Return part(x, view) for a part that mixes tokens or holds one that does, part(x) for any other.

    A part that takes the view says so by an attribute `mixes_tokens`.
    """
    return part(x, view) if getattr(part, "mixes_tokens", False) else part(x)


def _reached(*parts: nn.Module) -> None:
    """Raise InputError when a part hides an attention where the view would not reach it."""
    for part in parts:
        reached = getattr(part, "mixes_tokens", False)
        if not reached and any(getattr(inner, "mixes_tokens", False) for inner in part.modules()):
            raise InputError(
                f"{type(part).__name__} would keep padding and caches from the attention in it; use Chain, "
                "Residual or Sum"
            )


class Chain(nn.Sequential):
    """Parts one after the other.

    Shapes: (batch, tokens, width) -> (batch, tokens, width).
    Raises: InputError when a part hides an attention from the view.
    Holds: exactly.
    """

    mixes_tokens = True

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        _reached(*parts)

    def forward(
        self, input: Float[Tensor, "*batch width"], view: View | None = None
    ) -> Float[Tensor, "*batch width"]:
        """Apply the parts in turn."""
        for part in self:
            input = through(part, input, view)
        return input


class Residual(nn.Module):
    """A branch with its skip and its gain.

        R(x) = skip · x + gain · branch(x)

    `skip` 0.0 leaves the skip out; 1.0 costs nothing.

    Shapes: (…, width) -> (…, width).
    Raises: InputError when the branch hides an attention from the view.
    Holds: exactly.
    """

    mixes_tokens = True
    skip: Gain
    gain: Gain

    def __init__(self, branch: nn.Module, skip: Gain = 1.0, gain: Gain = 1.0) -> None:
        super().__init__()
        _reached(branch)
        self.branch, self.skip, self.gain = branch, skip, gain

    def forward(
        self, x: Float[Tensor, "*batch width"], view: View | None = None
    ) -> Float[Tensor, "*batch width"]:
        """Add the skip and the branch."""
        y = through(self.branch, x, view)
        if isinstance(self.skip, float) and self.skip == 0.0:
            return _scaled(self.gain, y)
        skip = _scaled(self.skip, x)
        if isinstance(self.gain, nn.Parameter):
            return torch.addcmul(skip, self.gain.to(y.dtype), y)  # one pass over memory
        return skip + _scaled(self.gain, y)


def _scaled(gain: Gain, x: Tensor) -> Tensor:
    """Multiply by a gain, at no cost when it is the constant one."""
    return x if isinstance(gain, float) and gain == 1.0 else gain * x


class Sum(nn.Module):
    """Branches side by side on the same input, Σ_i branch_i(x).

    Shapes: (…, width) -> (…, width).
    Raises: InputError when a branch hides an attention from the view.
    Holds: exactly.
    """

    mixes_tokens = True

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        _reached(*branches)
        self.branches = nn.ModuleList(branches)

    def forward(
        self, x: Float[Tensor, "*batch width"], view: View | None = None
    ) -> Float[Tensor, "*batch width"]:
        """Add the branches."""
        first, *rest = (through(branch, x, view) for branch in self.branches)
        for y in rest:
            first = first + y
        return first


def uniform_gain(depth: int) -> float:
    """Return the branch gain 1/√L that keeps the variance of L residual blocks bounded.

    Raises: InputError unless depth ≥ 1.
    Holds: Σ_l λ² = 1, exactly.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    _check_depth(depth)
    return 1 / math.sqrt(depth)


def decreasing_gain(layer: int) -> float:
    """Return the branch gain of block l (l = 1, 2, …) that is square-summable without knowing the depth.

        λ_l = 1 / (√l · log(l + 1))

    Raises: InputError unless layer ≥ 1.
    Holds: Σ_l λ_l² < 3.39 for every depth.
    Source: Hayou et al. 2021, arXiv 2010.12859.
    """
    _check_depth(layer)
    return 1 / (math.sqrt(layer) * math.log(layer + 1))


def down_weighted_gain(depth: int, gain: float, reference_depth: int = 18) -> float:
    """Return a gain that was tuned at one depth, carried to another by the rule O(1/√L).

        β(L) = β₀ √(L₀ / L)

    Raises: InputError unless depth ≥ 1.
    Holds: empirically.
    Source: He & Hofmann 2024, arXiv 2311.01906, section 4.
    """
    _check_depth(depth)
    return gain * math.sqrt(reference_depth / depth)


def normalised_skip(gain: float) -> float:
    """Return the skip λ with λ² + γ² = 1 for a branch gain γ, which keeps a sum's variance.

    Raises: InputError unless 0 ≤ γ ≤ 1.
    Holds: exactly, for independent branches of equal variance.
    Source: Noci et al. 2023, arXiv 2306.17759.
    """
    if not 0 <= gain <= 1:
        raise InputError(f"the branch gain must lie in [0, 1] for λ² + γ² = 1, got {gain:g}")
    return math.sqrt(1 - gain * gain)


def _check_depth(depth: int) -> None:
    if depth < 1:
        raise InputError(f"a depth must be at least 1, got {depth}")
