"""Simulated int8: static per-tensor W8A8 of every linear layer of any network."""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gramian.errors import InputError


def _widened(values: Tensor) -> Tensor:
    """Return the values in single precision at least, where every eight-bit integer is exact."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of a tensor, or a running estimate of them."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Float[Tensor, "..."], percentile: float = 100.0) -> "Range":
        """Return the percentiles (100 − p, p) of all entries; p = 100 is the minimum and the maximum.

        Shapes: (…), at least one entry -> two numbers.
        Holds: exactly; between two entries the percentile is interpolated linearly.
        """
        if percentile == 100:
            low, high = torch.aminmax(values.detach())
            return cls(float(low), float(high))
        low, high = np.percentile(_widened(values).cpu().numpy(), (100 - percentile, percentile))
        return cls(float(low), float(high))

    def moved(self, batch: "Range", momentum: float) -> "Range":
        """Return the running range after one more batch: m·self + (1 − m)·batch, at both ends."""
        return Range(
            momentum * self.low + (1 - momentum) * batch.low,
            momentum * self.high + (1 - momentum) * batch.high,
        )


@dataclass(frozen=True)
class Grid:
    """Equally spaced values s (q − z) for integers lowest ≤ q ≤ highest, so that zero is on the grid.

    q(x) = clamp(round(x/s) + z, lowest, highest);   x̂ = s (q(x) − z)
    A scale is one number, or a tensor that broadcasts against x and gives its rows a grid each.
    Shapes: (…) -> (…), in the dtype of x.
    Holds: exactly: |x − x̂| ≤ s/2 inside the range, the nearest end outside, 0̂ = 0.
    Source: Bondarenko, Nagel, Blankevoort 2023, arXiv 2306.12929.
    """

    scale: float | Tensor
    zero: int | Tensor
    lowest: int
    highest: int

    @classmethod
    def symmetric(
        cls, weight: Float[Tensor, "..."], bits: int = 8, rows: tuple[int, ...] | None = None
    ) -> "Grid":
        """Return the signed grid of a weight: s = max|w| / (2^(b−1) − 1), z = 0, −2^(b−1) ≤ q < 2^(b−1).

        The maximum is over the dimensions `rows`, or over all: eight bits have s = max|w| / 127.
        """
        half = 2 ** (bits - 1)
        return cls(scale_of(weight, half - 1, rows), 0, -half, half - 1)

    @classmethod
    def asymmetric(cls, seen: Range, bits: int = 8) -> "Grid":
        """Return the unsigned grid of a range stretched to contain 0, with 2^b − 1 = 255 steps of eight bits.

        s = (hi − lo) / 255,  z = round(−lo/s),  0 ≤ q ≤ 255
        """
        low, high, steps = min(seen.low, 0.0), max(seen.high, 0.0), 2**bits - 1
        scale = _positive((high - low) / steps)
        return cls(scale, round(-low / scale), 0, steps)

    @classmethod
    def per_token(cls, x: Float[Tensor, "..."], bits: int = 8) -> "Grid":
        """Return the unsigned grid of every row of x (its last dimension), from that row's own range."""
        wide, steps = _widened(x), 2**bits - 1
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / steps).clamp(min=_TINY)
        return cls(scale, torch.round(-low / scale), 0, steps)

    def integers(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return q(x), whole numbers in single precision at least."""
        return (torch.round(_widened(x) / self.scale) + self.zero).clamp(self.lowest, self.highest)

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return x̂, the value on the grid that stands for x."""
        return ((self.integers(x) - self.zero) * self.scale).to(x.dtype)


_TINY = torch.finfo(torch.float32).tiny


def _positive(scale: float) -> float:
    """Return a scale by which single precision can divide: a tensor of zeros has none of its own."""
    return max(scale, _TINY)


def scale_of(
    values: Float[Tensor, "..."], highest: float, rows: tuple[int, ...] | None = None
) -> float | Tensor:
    """Return max|x| / highest, over all entries or over the dimensions `rows`, which are kept with size 1."""
    if rows is None:
        return _positive(float(values.detach().abs().max()) / highest)
    return (_widened(values).abs().amax(rows, keepdim=True) / highest).clamp(min=_TINY)


def _called(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: torch's fused encoder layer calls a layer with a hook, and only reads others' weights."""


class QuantisedLinear(nn.Module):
    """A linear layer with input and weight on fixed eight-bit grids; the sum itself is in floating point.

    y = x̂ Ŵᵀ + b
    Shapes: (…, in) -> (…, out).
    Holds: exactly equal, up to rounding of the sum, to s_x s_w (Σ q_x q_w − z_x Σ q_w) + b in integers.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, inputs: Grid):
        super().__init__()
        self.inputs = inputs
        self.weights = Grid.symmetric(linear.weight)
        self.register_buffer("weight", self.weights(linear.weight).detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.register_forward_pre_hook(_called)

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:  # noqa: D102
        return nn.functional.linear(self.inputs(input), self.weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        out_features, in_features = self.weight.shape
        return f"{in_features} -> {out_features}, inputs={self.inputs}, weights={self.weights}"


def quantise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    skip: Collection[str] = ("head",),
    momentum: float = 0.9,
    percentile: float = 100.0,
) -> nn.Module:
    """Return a copy of a network, in evaluation mode, whose linear layers compute with int8 values (W8A8).

    weights      one symmetric grid a layer:   s = max|w| / 127
    inputs       one asymmetric grid a layer:  s = (hi − lo)/255, z = round(−lo/s), frozen here;
                 the first batch sets (lo, hi), then  lo <- m lo + (1 − m) min(batch), the same for hi

    `batches` is the calibration text: the copy is called as `copy(batch)` for each (4 to 16 are usual).
    `skip` lists layers to leave alone, by full dotted name or by its last part. `percentile` replaces the
    minimum and maximum of each batch by its percentiles (100 − p, p); 99.999 is published for OPT.
    The model given is not changed. A quantised layer gets its own weight, so a matrix shared with an
    embedding stays exact in the embedding. Integers are simulated in floating point on any device.

    This quantises linear layers only. It is milder than the published recipe, which also quantises norms,
    softmax and residual additions (`gramian.compress.simulate`): report it as linear-only.

    Shapes: the model's own.
    Raises: InputError when there is no linear layer or no batch, when a setting is out of range, and when a
    layer (named) was never called, overrides nn.Linear.forward, or has a weight or input that is not finite.
    Holds: exactly: grids do not change after calibration.
    Source: Bondarenko, Nagel, Blankevoort 2023, arXiv 2306.12929; running range and percentile as in the
    authors' published code.
    """
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must be at least 0 and less than 1, got {momentum}")
    if not 50 < percentile <= 100:
        raise InputError(f"percentile must be more than 50 and at most 100, got {percentile}")
    if isinstance(skip, str):
        raise InputError(f"skip must be a collection of layer names, got the one name {skip!r}")
    quantised = copy.deepcopy(model).eval()
    layers = {
        name: module
        for name, module in quantised.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not {name, name.rpartition(".")[2]} & set(skip)
    }
    if not layers:
        raise InputError(
            f"the model has no linear layer to quantise beyond those skipped ({', '.join(skip)})"
        )
    for name, linear in layers.items():
        if type(linear).forward is not nn.Linear.forward:
            kind = type(linear).__name__
            raise InputError(
                f"layer {name!r} ({kind}) changes how nn.Linear computes; list its name in `skip`"
            )
        if not torch.isfinite(linear.weight).all():
            raise InputError(f"layer {name!r} has a weight that is not finite, so it has no int8 scale")

    names = {linear: name for name, linear in layers.items()}
    ranges = _calibrate(quantised, names, batches, momentum, percentile)
    unseen = [name for linear, name in names.items() if linear not in ranges]
    if unseen:
        listed = ", ".join(map(repr, unseen))
        raise InputError(
            f"calibration never called {listed}; list such layers in `skip` or give other batches"
        )

    replacements = {linear: QuantisedLinear(linear, Grid.asymmetric(seen)) for linear, seen in ranges.items()}
    for name, linear in layers.items():
        if not name:
            return replacements[linear].eval()
        quantised.set_submodule(name, replacements[linear].eval())
    return quantised


def _calibrate(
    model: nn.Module,
    names: dict[nn.Linear, str],
    batches: Iterable[Any],
    momentum: float,
    percentile: float,
) -> dict[nn.Linear, Range]:
    """Return each layer's running range of inputs over the batches."""
    ranges: dict[nn.Linear, Range] = {}

    def watch(linear: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(linear, nn.Linear)
        values: Tensor = args[0] if args else kwargs["input"]
        if not torch.isfinite(values).all():
            raise InputError(f"the input of layer {names[linear]!r} is not finite on a calibration batch")
        if values.numel():
            batch = Range.of(values, percentile)
            ranges[linear] = ranges[linear].moved(batch, momentum) if linear in ranges else batch

    hooks: list[RemovableHandle] = [
        linear.register_forward_pre_hook(watch, with_kwargs=True) for linear in names
    ]
    try:
        count = 0
        with torch.no_grad():
            for batch in batches:
                model(batch)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise InputError("quantising needs at least one calibration batch, got none")
    return ranges
