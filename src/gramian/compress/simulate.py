"""What a network loses when all of it computes in eight bits: weights and every activation, simulated.

The published recipe quantises, one static scale a tensor (OPT and BERT, in the authors' code):

| published quantiser                                    | point here                                        |
|--------------------------------------------------------|---------------------------------------------------|
| weights of linear layers                               | `weight`                                          |
| embedding tables (values read from them are not again) | `embedding`                                       |
| sums of embeddings, each as it is formed               | `sum`                                             |
| linear output; behind an activation function instead,  | `linear`; `activation` instead where it reads     |
|   where one follows (fc1 + ReLU, dense + GELU or tanh) |   the whole output of a linear layer              |
| gain of a LayerNorm, and its output                    | `gain`, `norm`                                    |
| attention scores before the mask is added              | `scores` (fused attention is computed explicitly) |
| attention probabilities; behind the clip where softmax | `probabilities`                                   |
|   is clipped                                           |                                                   |
| probabilities times values                             | `context`                                         |
| residual sums                                          | `sum`                                             |
| logits; not with the head exact (OPT `fp32_head`;      | `linear` of the head; not with `exact`            |
|   BERT's whole prediction head is always exact)        |                                                   |

Biases, dropout and the loss stay exact in both. Further points serve models that were not published: `input`
and `operand` quantise what enters a linear layer or a product of activations without being on a grid (a gated
MLP's product, a gate), `sum` also takes rotated queries and keys and the sums of shaped attention.

It differs from the published code so: a gain without negative entries gets 127 positive steps like every
weight, not 255; the search for least-square weight ranges (published for OPT) tries hundredths of the largest
entry, where the published one adds a margin of 0.5 to it; nothing is trained.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from gramian.compress.interception import Interception, Point
from gramian.compress.quantise import Range
from gramian.compress.recipe import Quantiser, Recipe, Rows
from gramian.errors import InputError

WEIGHTS = ("weight", "embedding", "gain")
"""Kinds of points that are weights; the others are activations."""


class Simulation:
    """A network as it would compute when quantised, and exactly as before outside.

        simulation = Simulation(model, Recipe(exact=("lm_head",))).calibrate(batches)
        with simulation:
            model(**batch)

    Every point has x -> x̂ = s (clamp(round(x/s) + z) − z), frozen by `calibrate`. The model's weights are
    never written to; inside the block it is in evaluation mode, has hooks, and every call to torch is looked
    at. It must be uncompiled, and its attention eager or torch's scaled_dot_product_attention, whose T×T
    scores are then in memory.

    Shapes: the model's own.
    Raises: InputError when the model is called before it is calibrated, at a point that calibration did not
    reach, or in a function that hides products (an LSTM).
    Holds: exactly: |x − x̂| ≤ s/2 inside the range at every point, 0̂ = 0; equal to the model as bits grow.
    Source: Bondarenko, Nagel, Blankevoort 2023, arXiv 2306.12929.
    """

    def __init__(self, model: nn.Module, recipe: Recipe | None = None):
        self.model = model
        self.recipe = Recipe() if recipe is None else recipe
        self.points: dict[Point, Quantiser] = {}
        """The quantiser of every point, in the order of the computation."""
        self._ranges: dict[Point, Range] = {}
        self._fused: frozenset[Point] = frozenset()
        self._scope: str = ""
        self._entered = ExitStack()
        self._under_way = False
        known = {part for name, _ in model.named_modules() for part in (name, *name.split("."))}
        unknown = [name for name in self.recipe.exact if name not in known]
        if unknown:
            raise InputError(f"no module is named {unknown[0]!r}, which `exact` lists")

    def calibrate(self, batches: Iterable[Any]) -> Self:
        """Set the quantiser of every point from batches, each called as model(**batch) or model(batch).

        The first batch sets a range and the next ones move it, lo <- m lo + (1 − m) min(batch); each is
        computed with what is upstream quantised already, as in the published code. An earlier calibration is
        forgotten.

        Raises: InputError without batches, when a weight or an activation is not finite (its module named),
        and when the model has nothing to quantise.
        """
        self.points, self._ranges, self._fused = {}, {}, frozenset()
        given = iter(batches)
        first = next(given, None)
        if first is None:
            raise InputError("the simulation needs at least one calibration batch, got none")
        with torch.no_grad():
            with self._quantising(self._trace) as interception:
                _call(self.model, first)
            self._fused = frozenset(interception.consumed)
            try:
                with self._quantising(self._estimate):
                    for batch in chain((first,), given):
                        _call(self.model, batch)
            except BaseException:
                self.points = {}
                raise
        if not self.points:
            raise InputError("the model has nothing to quantise beyond what the recipe leaves exact")
        return self

    def __enter__(self) -> Self:
        if not self.points:
            raise InputError("the simulation has no ranges yet: call calibrate(batches) first")
        self._entered.enter_context(self._quantising(self._apply))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the quantised model returns."""
        with self:
            return self.model(*args, **kwargs)

    @contextmanager
    def only(self, layer: str) -> Iterator[Self]:
        """Compute with no points quantised but those of one module and the modules inside it.

        Raises: InputError when there is no point in it.
        """
        if not any(_inside(point.module, layer) for point in self.points):
            raise InputError(f"the simulation quantises nothing in {layer!r}; name a module of the model")
        self._scope = layer
        try:
            with self:
                yield self
        finally:
            self._scope = ""

    def kinds(self) -> Counter[str]:
        """Count the points of every kind."""
        return Counter(point.kind for point in self.points)

    @contextmanager
    def _quantising(self, quantise: Callable[[Point, Tensor, Rows], Tensor]) -> Iterator[Interception]:
        """Compute in evaluation mode with a function at every point; leave nothing behind."""

        def chosen(point: Point, values: Tensor, rows: Rows) -> Tensor | None:
            return quantise(point, values, rows) if self._chosen(point) else None

        if self._under_way:
            raise InputError("the simulation is under way already; leave its block before entering another")
        self._under_way = True
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with Interception(self.model, chosen, self._covered) as interception:
                yield interception
        finally:
            self._under_way = False
            for module, mode in modes:
                module.training = mode

    def _covered(self, module: str) -> bool:
        exact = set(self.recipe.exact)
        return not exact & set(module.split(".")) and not any(_inside(module, name) for name in exact)

    def _chosen(self, point: Point) -> bool:
        """Whether the recipe quantises at a point."""
        if point in self._fused or (self.recipe.linear_only and point.kind not in ("weight", "input")):
            return False
        return self.recipe.activations != "none" or point.kind in WEIGHTS

    def _trace(self, point: Point, values: Tensor, rows: Rows) -> Tensor:
        return values

    def _estimate(self, point: Point, values: Tensor, rows: Rows) -> Tensor:
        """Take a batch into the range of a point, then quantise by it."""
        if not torch.isfinite(values).all():
            raise InputError(
                f"the {point.kind} values of module {point.module!r} are not finite, so they have no scale"
            )
        if not values.numel():
            return values
        if point.kind not in WEIGHTS:
            self.points[point] = self._quantiser(point, values)
        elif point not in self.points:
            self.points[point] = self.recipe.weight(values, rows)
        return self.points[point](values)

    def _quantiser(self, point: Point, values: Tensor) -> Quantiser:
        if self.recipe.activations == "dynamic_token":
            return self.recipe.token
        seen = Range.of(values, self.recipe.percentile)
        if point in self._ranges:
            seen = self._ranges[point].moved(seen, self.recipe.momentum)
        self._ranges[point] = seen
        return self.recipe.activation(seen)

    def _apply(self, point: Point, values: Tensor, rows: Rows) -> Tensor:
        if not _inside(point.module, self._scope) or not values.numel():
            return values
        if point not in self.points:
            raise InputError(f"calibration never reached {point}; calibrate with batches that do")
        return self.points[point](values)


def sensitivity(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any],
    loss: Callable[[], float],
    layers: Sequence[str],
) -> dict[str, float]:
    """Return how much the loss grows when one layer alone is quantised, for each of the layers.

        Δ_l = loss(points of l quantised) − loss(exact)

    `loss` evaluates the model as it then is; `batches` calibrate. A layer is a module, with all inside.

    Raises: InputError as `Simulation`, and for a layer without points.
    Holds: exactly; the ranges are those of the whole model's calibration.
    """
    simulation = Simulation(model, recipe).calibrate(batches)
    exact, differences = loss(), {}
    for layer in layers:
        with simulation.only(layer):
            differences[layer] = loss() - exact
    return differences


def _inside(module: str, layer: str) -> bool:
    return not layer or module == layer or module.startswith(layer + ".")


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)
