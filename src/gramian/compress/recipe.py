"""What quantisation a simulation computes: how many bits, which scales, and which parts stay exact."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.compress.quantise import Grid, Range, scale_of
from gramian.errors import InputError

Quantiser = Callable[[Tensor], Tensor]
"""x -> x̂, of the same shape and dtype."""
Rows = tuple[int, ...] | None
"""The dimensions of a weight that one scale covers when every output feature has its own; None for all."""
Number = Literal["int", "fp8_e4m3"]
Activations = Literal["static", "dynamic_token", "none"]
WeightRange = Literal["max", "mse"]


@dataclass(frozen=True)
class Float8:
    """Eight-bit floating point, four bits of exponent and three of mantissa, under a scale.

    x̂ = s · E4M3(clamp(x/s, −448, 448)),   s = max|x| / 448
    Shapes: (…) -> (…), in the dtype of x.
    Holds: exactly: |x − x̂| ≤ |x|/16 where 2⁻⁶ s ≤ |x| ≤ 448 s, and ≤ 2⁻¹⁰ s below.
    Source: Micikevicius et al. 2022, arXiv 2209.05433.
    """

    scale: float | Tensor

    @classmethod
    def of(cls, values: Float[Tensor, "..."], rows: Rows = None) -> "Float8":
        """Return the format that represents the largest entry exactly, over all or over dimensions `rows`."""
        return cls(scale_of(values, _HIGHEST, rows))

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return x̂; what is beyond ±448 s becomes ±448 s."""
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        eight = (wide / self.scale).clamp(-_HIGHEST, _HIGHEST).to(torch.float8_e4m3fn)
        return (eight.to(wide.dtype) * self.scale).to(x.dtype)


_HIGHEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights and activations are quantised; the defaults are the published W8A8 for BERT.

    Published for OPT: percentile=99.999, weight_range="mse", exact=("lm_head",), 4 calibration batches; for
    BERT: exact=("cls",), 16 batches.

    Raises: InputError when a setting is out of range.
    Source: Bondarenko, Nagel, Blankevoort 2023, arXiv 2306.12929, and the authors' published code.
    """

    weight_bits: int = 8
    """Bits of a weight, 2 to 24."""
    activation_bits: int = 8
    """Bits of an activation, 2 to 24."""
    percentile: float = 100.0
    """The range of a batch is its percentiles (100 − p, p); 100 takes its minimum and maximum."""
    momentum: float = 0.9
    """Share of the running range that one more calibration batch leaves: lo <- m lo + (1 − m) min(batch)."""
    exact: Collection[str] = ()
    """Modules left in floating point, all inside them included: full dotted names, or single parts of one."""
    weights_per_row: bool = False
    """One scale for each output feature of a weight, in place of one for the tensor."""
    weight_range: WeightRange = "max"
    """Scale of a weight: its largest entry ("max"), or a hundred shares of it and the least square error."""
    activations: Activations = "static"
    """Ranges frozen after calibration, ranges of each row while it is computed, or exact activations."""
    number: Number = "int"
    """Integers, or eight-bit floating point (E4M3) with one scale a tensor."""
    linear_only: bool = False
    """Only weights and inputs of linear layers: a milder test than the published one."""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if not 2 <= getattr(self, name) <= 24:
                raise InputError(f"{name} must be from 2 to 24, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be at least 0 and less than 1, got {self.momentum}")
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile must be more than 50 and at most 100, got {self.percentile}")
        if isinstance(self.exact, str):
            raise InputError(f"exact must be a collection of module names, got the one name {self.exact!r}")
        choices = {"activations": Activations, "number": Number, "weight_range": WeightRange}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                accepted = ", ".join(get_args(choice))
                raise InputError(f"unknown {name} {getattr(self, name)!r}; choose one of {accepted}")
        if self.number == "fp8_e4m3":
            if (self.weight_bits, self.activation_bits) != (8, 8):
                raise InputError("fp8_e4m3 has 8 bits; leave weight_bits and activation_bits at 8")
            if self.weight_range != "max":
                raise InputError('fp8_e4m3 takes the largest entry; leave weight_range at "max"')

    def weight(self, values: Float[Tensor, "..."], rows: Rows) -> Quantiser:
        """Return the quantiser of a weight; `rows` are the dimensions of one output feature."""
        rows = rows if self.weights_per_row else None
        if self.number == "fp8_e4m3":
            return Float8.of(values, rows)
        grid = Grid.symmetric(values, self.weight_bits, rows)
        return grid if self.weight_range == "max" else _least_squares(values, grid, rows)

    def activation(self, seen: Range) -> Quantiser:
        """Return the quantiser that a range is frozen to."""
        if self.number == "fp8_e4m3":
            return Float8(max(abs(seen.low), abs(seen.high), 1e-30) / _HIGHEST)
        return Grid.asymmetric(seen, self.activation_bits)

    def token(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return x̂ with a scale for every row of x, from that row alone."""
        if self.number == "fp8_e4m3":
            return Float8.of(x, (-1,))(x)
        return Grid.per_token(x, self.activation_bits)(x)


def _least_squares(values: Float[Tensor, "..."], widest: Grid, rows: Rows) -> Grid:
    """Return the grid of least square error among hundredths of the widest one."""
    everything = tuple(range(values.ndim))
    scale = torch.as_tensor(widest.scale, dtype=torch.promote_types(values.dtype, torch.float32))
    best, least = scale, torch.full_like(scale, torch.inf)
    for share in range(1, 101):
        candidate = Grid(scale * (share / 100), 0, widest.lowest, widest.highest)
        error = (candidate(values) - values).square().sum(rows or everything, keepdim=rows is not None)
        best = torch.where(error <= least, candidate.scale, best)
        least = torch.minimum(error, least)
    return Grid(float(best) if rows is None else best, 0, widest.lowest, widest.highest)
