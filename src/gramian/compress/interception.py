"""Where a network's forward pass is quantised: every call to torch is seen, and its numbers are followed.

A tensor is a weight, an activation or neither (a mask, positions), and an activation is on a grid, off it, or
holds scores behind a mask. What keeps values as they are (a view, a transpose, a slice, dropout, a scalar
factor) keeps the state; any other function takes an activation off the grid.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gramian.compress.calls import (
    KINDS,
    PARTS,
    QUERIES,
    REFUSED,
    VIEWS,
    floating,
    name_of,
    rows_of,
    sides,
    unit_of,
)
from gramian.compress.recipe import Rows
from gramian.errors import InputError


class Point(NamedTuple):
    """A place where values are quantised: the n-th call of its kind in one call of a module.

    Kinds of weights: weight (of a linear layer), embedding, gain (of a norm). Kinds of activations: input (of
    a linear layer), linear (its output), norm, activation, operand (of a product of activations), scores,
    probabilities, context, sum.
    """

    module: str
    """Full dotted name of the innermost module; "" for the model itself."""
    kind: str
    call: int = 0

    def __str__(self) -> str:
        return f"{self.module}:{self.kind}" + (f"[{self.call}]" if self.call else "")


Quantise = Callable[[Point, Tensor, Rows], Tensor | None]
"""Returns x̂ at a point, or None where nothing is quantised; the rows are those of a weight."""


class State(IntEnum):
    """What is known of a tensor; that of several is the largest."""

    CONSTANT = 0
    WEIGHT = 1
    GRID = 2
    RAW = 3
    MASKED = 4


@dataclass(frozen=True)
class Tag:
    """A tensor's state, and the point that its values come from unchanged."""

    state: State
    source: Point | None = None


@dataclass
class Frame:
    """One call of a module that is under way."""

    name: str
    unit: str | None
    exact: bool
    counts: Counter[str] = field(default_factory=Counter)

    def point(self, kind: str) -> Point:
        """Return the next point of a kind."""
        self.counts[kind] += 1
        return Point(self.name, kind, self.counts[kind] - 1)


class Interception(TorchFunctionMode):
    """Calls `quantise` at every point of a model's forward passes, while it is entered.

    `covered` says which modules, by name, have points at all. `consumed` collects the linear outputs that an
    activation function read whole, and the probabilities that were clipped. Hooks and tags are gone after the
    block.
    """

    def __init__(self, model: nn.Module, quantise: Quantise, covered: Callable[[str], bool]):
        super().__init__()
        self.model, self.quantise, self.covered = model, quantise, covered
        self.consumed: set[Point] = set()
        self._frames: list[Frame] = []
        self._gains: dict[int, Point] = {}
        self._tags = WeakTensorKeyDictionary()
        self._removal = ExitStack()

    def __enter__(self) -> "Interception":
        for name, module in self.model.named_modules():
            unit = unit_of(module)
            before = partial(self._before, partial(Frame, name, unit, not self.covered(name)))
            self._removal.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._removal.callback(module.register_forward_hook(self._after, always_call=True).remove)
            parameters = dict(module.named_parameters(recurse=False))
            self._mark([*parameters.values(), *module.buffers(recurse=False)], Tag(State.WEIGHT))
            if unit == "norm":
                gains = [values for part, values in parameters.items() if part not in ("bias", "beta")]
                self._gains |= {id(values): Point(name, "gain", call) for call, values in enumerate(gains)}
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._removal.close()
        self._frames.clear()
        self._gains.clear()
        self._tags = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._frames:
            return func(*args, **kwargs)
        frame, name = self._frames[-1], name_of(func)
        if frame.unit == "norm" and not frame.exact and name not in QUERIES:
            args, kwargs = tuple(map(self._gain, args)), {key: self._gain(v) for key, v in kwargs.items()}
        if frame.unit is not None or frame.exact:
            return self._plain(frame, name, func, args, kwargs)
        if name in REFUSED:
            raise InputError(
                f"module {frame.name!r} computes by {name}, which hides its products; list it in `exact`"
            )
        handle = getattr(self, "_" + KINDS.get(name, "plain"))
        return handle(frame, name, func, args, kwargs)

    # the borders of modules

    def _before(self, frame: Callable[[], Frame], module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._frames.append(frame())
        if self._frames[-1].unit == "activation":
            with torch._C.DisableTorchFunction():
                self._consume("linear", args, kwargs)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        frame = self._frames.pop()
        if frame.unit is None or frame.exact or not isinstance(output, Tensor):
            return None
        with torch._C.DisableTorchFunction():
            return self._at(frame.point(frame.unit), output)

    # tags

    def _tag(self, values: Tensor) -> Tag:
        return self._tags.get(values) or Tag(State.CONSTANT)

    def _mark(self, values: Any, tag: Tag) -> None:
        for tensor in floating(values):
            self._tags[tensor] = tag

    def _consume(self, kind: str, args: tuple, kwargs: dict) -> bool:
        """Note that a function reads the whole result of a point of some kind; say whether it does."""
        sources = {self._tag(values).source for values in floating(args, kwargs)}
        found = {source for source in sources if source is not None and source.kind == kind}
        self.consumed |= found
        return bool(found)

    def _at(self, point: Point, values: Tensor) -> Tensor:
        """Return the activation of a point as the computation goes on with it."""
        quantised = self.quantise(point, values, None) if values.is_floating_point() else None
        result = values if quantised is None else quantised
        self._mark(result, Tag(State.RAW if quantised is None else State.GRID, point))
        return result

    def _weight(self, point: Point, values: Tensor, rows: Rows) -> Tensor:
        quantised = self.quantise(point, values, rows)
        return values if quantised is None else quantised

    def _gain(self, values: Any) -> Any:
        point = self._gains.get(id(values))
        return values if point is None else self._weight(point, values, None)

    # kinds of functions

    def _plain(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Leave the values; they stay on their grid only where none of them changes."""
        tensors = [tensor for tensor in floating(args, kwargs) if tensor.numel()]
        tags = [self._tag(tensor) for tensor in tensors]
        out = func(*args, **kwargs)
        if name in VIEWS and tags:
            self._mark(out, tags[0])
            return out
        state = max((tag.state for tag in tags), default=State.CONSTANT)
        kept = name in PARTS and all(tag.state is state for tag in tags)
        self._mark(out, Tag(state if kept or state <= State.WEIGHT else State.RAW))
        return out

    def _product(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Quantise the weights, the activations that are off the grid, and the result."""
        args, kwargs, places = sides(name, args, kwargs)
        tags = [self._tag(args[place]) for place in places]
        layer = name == "linear" or name.startswith("conv")
        if not layer and max(tag.state for tag in tags) <= State.WEIGHT:
            return self._plain(frame, name, func, args, kwargs)
        linear = layer or any(tag.state is State.WEIGHT for tag in tags)
        factors = list(args)
        for side, (place, tag) in enumerate(zip(places, tags, strict=True)):
            if tag.state is State.WEIGHT or (layer and side == 1):
                rows = rows_of(name, side, args[place])
                factors[place] = self._weight(frame.point("weight"), args[place], rows)
            else:
                factors[place] = self._factor(frame, args[place], "input" if linear else "operand", layer)
        if name == "baddbmm" and kwargs.get("beta", 1) != 0:
            return self._shifted_scores(frame, *factors, **kwargs)
        mixing = any(tag.source is not None and tag.source.kind == "probabilities" for tag in tags)
        kind = "linear" if linear else "context" if mixing else "scores"
        return self._at(frame.point(kind), func(*factors, **kwargs))

    def _factor(self, frame: Frame, values: Tensor, kind: str, layer: bool = False) -> Tensor:
        """Return an activation that enters a product, on a grid."""
        state, point = self._tag(values).state, frame.point(kind)
        if state is State.GRID or (state is State.CONSTANT and not layer):
            return values
        return self._at(point, values)

    def _shifted_scores(
        self, frame: Frame, shift: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        """Quantise scores before a mask or a bias is added to them."""
        scores = self._at(frame.point("scores"), alpha * torch.bmm(left, right))
        out = scores + beta * shift
        self._mark(out, Tag(State.MASKED))
        return out

    def _attention(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        return self._explicit_attention(frame, *args, **kwargs)

    def _explicit_attention(
        self,
        frame: Frame,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Fused attention step by step: scores quantised before the mask, probabilities, context."""
        query, key, value = (self._factor(frame, side, "operand") for side in (query, key, value))
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(wide) @ key.to(wide).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = self._at(frame.point("scores"), scores)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        probabilities = self._at(frame.point("probabilities"), scores.softmax(-1).masked_fill(blind, 0.0))
        probabilities = torch.dropout(probabilities.to(value.dtype), dropout_p, dropout_p > 0)
        return self._at(frame.point("context"), probabilities @ value)

    def _softmax(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        return self._computed(frame, "probabilities", func, args, kwargs)

    def _activation(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        self._consume("linear", args, kwargs)
        return self._computed(frame, "activation", func, args, kwargs)

    def _clipping(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Quantise clipped probabilities in place of those before."""
        if self._consume("probabilities", args, kwargs):
            return self._computed(frame, "probabilities", func, args, kwargs)
        return self._masking(frame, name, func, args, kwargs)

    def _norm(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        return self._computed(frame, "norm", func, args, kwargs)

    def _computed(self, frame: Frame, kind: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """Quantise the result of a function of activations."""
        state = max((self._tag(tensor).state for tensor in floating(args, kwargs)), default=State.CONSTANT)
        point, out = frame.point(kind), func(*args, **kwargs)
        if state <= State.WEIGHT:
            self._mark(out, Tag(state))
            return out
        return self._in_place(args, out, self._at(point, out))

    def _in_place(self, args: tuple, out: Tensor, quantised: Tensor) -> Tensor:
        """Write a quantised result where the function itself wrote, if it did so in place."""
        if out is not args[0] or quantised is out:
            return quantised
        tag = self._tag(quantised)
        args[0].copy_(quantised)
        self._mark(args[0], tag)
        return args[0]

    def _embedding(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """Quantise the table; what is read from it is then on a grid."""
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        quantised = self.quantise(frame.point("embedding"), given["weight"], (-1,))
        table = given["weight"] if quantised is None else quantised
        out = func(given.pop("input"), table, *args[2:], **{k: v for k, v in given.items() if k != "weight"})
        self._mark(out, Tag(State.RAW if quantised is None else State.GRID))
        return out

    def _sum(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Quantise a sum of activations, or of one and a table, unless it hides scores behind a mask."""
        terms = [(term, self._tag(term)) for term in floating(args, kwargs)]
        states = [tag.state for _, tag in terms]
        out = func(*args, **kwargs)
        if max(states, default=State.CONSTANT) <= State.WEIGHT or not isinstance(out, Tensor) or out.ndim < 2:
            self._mark(out, Tag(max(states, default=State.CONSTANT)))
            return out
        point = frame.point("sum")
        others = [term for term, tag in terms if tag.state <= State.WEIGHT and term.ndim > 1]
        activations = [tag for _, tag in terms if tag.state >= State.GRID]
        if State.MASKED in states or any(_hides(other) for other in others):
            self._mark(out, Tag(State.MASKED))
            return out
        others = [other for other in others if self._tag(other).state is State.WEIGHT or bool(other.any())]
        if len(activations) + len(others) < 2:
            unchanged = len(terms) == 2 and all(term.ndim > 1 for term, _ in terms)
            self._mark(out, activations[0] if unchanged else Tag(State.RAW, activations[0].source))
            return out
        return self._in_place(args, out, self._at(point, out))

    def _scaling(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Scale the grid with the values, where the factor is one number."""
        tensors = [(tensor, self._tag(tensor)) for tensor in floating(args, kwargs)]
        scaled = [tag for tensor, tag in tensors if tensor.numel() > 1 or tag.state > State.WEIGHT]
        if len(scaled) != 1:
            return self._plain(frame, name, func, args, kwargs)
        out = func(*args, **kwargs)
        self._mark(out, scaled[0])
        return out

    def _masking(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Note scores among which very negative numbers are put."""
        values = [*args, *kwargs.values()]
        state = max((self._tag(tensor).state for tensor in floating(values)), default=State.CONSTANT)
        constants = [v for v in values if not isinstance(v, Tensor) or self._tag(v).state <= State.WEIGHT]
        hides = name in ("where", "masked_fill") and any(map(_hides, constants))
        if state is not State.MASKED and not (hides and state > State.WEIGHT):
            return self._plain(frame, name, func, args, kwargs)
        out = func(*args, **kwargs)
        self._mark(out, Tag(State.MASKED))
        return out

    def _composite(self, frame: Frame, name: str, func: Callable, args: tuple, kwargs: dict) -> Any:
        """See the calls inside a function that torch otherwise passes on whole."""
        again = getattr(torch.overrides, "redispatch_function", None)
        if again is None:
            raise InputError(
                f"module {frame.name!r} computes by {name}, into which torch 2.13 and later can see; "
                "list it in `exact`"
            )
        super().__enter__()
        try:
            return again(func, (), args, kwargs)
        finally:
            super().__exit__(None, None, None)


def _hides(values: Any) -> bool:
    """Whether a number, or any entry of a tensor, is so negative that it can only hide a score."""
    if isinstance(values, Tensor):
        return values.is_floating_point() and bool((values <= _HIDDEN).any())
    return isinstance(values, (int, float)) and values <= _HIDDEN


_HIDDEN = -1e4
"""What attention masks add at the least; scores are never this low."""
