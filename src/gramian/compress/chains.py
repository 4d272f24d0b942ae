"""Chains of linear layers and elementwise activations under many masks at once.

Features come first and examples last, so that the weights of many draws are one factor of a product, and the
examples go through in blocks whose activations stay in the cache. Where a draw leaves few weights, the
product is a sum over those alone; and since all draws see the same inputs in the first masked layer, there

    (m ∘ w) x = (b ∘ w) x + ((m − b) ∘ w) x,  b = 1[λ > ½]

has a first term that is the same for all draws, and a second with the few weights whose mask is not b.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from gramian.compress.masks import StochasticMask, masks_of, originals_of
from gramian.compress.structures import Sampler

BLOCK = 192
"""Examples that go through a chain together on a CPU."""
SPARSE_SHARE = 0.35
"""Share of weights below which, of many examples, a sum over them alone beats a product with zeros."""
SPARSE_EXAMPLES = 256
"""Examples from which on to look for those weights can pay; for n of them the share is 0.35 (1 − 256/n)."""

ELEMENTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.Dropout,
)
"""Modules that act on every number alone, once the model is in evaluation."""

Steps = list[tuple[str, Any]]


def steps_of(model: nn.Module, x: Tensor) -> Steps | None:
    """Return the modules of a chain of linear layers and elementwise activations by name, or None.

    Raises: InputError when the model has no masks.
    """
    masks, flat, linear = masks_of(model), x.ndim == 2 and x.is_floating_point(), set()
    steps: Steps = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_step(name, module)
    ]
    for name, module in steps:
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif type(module) in ELEMENTWISE and not module._forward_hooks:
            continue
        elif name in masks and type(module).__mro__[1] is nn.Linear and len(module._forward_hooks) == 1:
            linear.add(name)
        elif type(module) is not nn.Linear or module._forward_hooks:
            return None
        if not flat:
            return None
    return steps if linear == masks.keys() else None


@dataclass(frozen=True, eq=False)
class Sparse:
    """Many matrices as the lists of their entries that are not 0, to multiply columns from the left."""

    places: Int[Tensor, " entries"]
    """Row of the other factor that each entry meets; all draws of it below one another."""
    starts: Int[Tensor, " rows_and_1"]
    """Where the entries of each row begin, the rows of all matrices below one another."""
    values: Float[Tensor, " entries"]
    count: int

    def __matmul__(self, columns: Float[Tensor, "... inputs n"]) -> Float[Tensor, "draws outputs n"]:
        """Return the products, with one factor for all matrices or one for each."""
        table = columns.reshape(-1, columns.shape[-1])
        summed = functional.embedding_bag(
            self.places,
            table,
            self.starts,
            mode="sum",
            per_sample_weights=self.values,
            include_last_offset=True,
        )
        return summed.view(self.count, -1, columns.shape[-1])


def sparse(
    kept: Bool[Tensor, "draws outputs entries"],
    values: Float[Tensor, "outputs entries"],
    places: Int[Tensor, "outputs entries"],
    rows: int = 0,
) -> Sparse:
    """Return the entries that masks keep, each with its value and the row of the other factor that it meets.

    With `rows`, every mask has a factor of its own, of that many rows; else all share one.

    Holds: exactly.
    """
    found = kept.flatten().nonzero()[:, 0]
    starts = torch.searchsorted(found, torch.arange(0, kept.numel() + 1, kept.shape[2], device=kept.device))
    entry = found % values.numel()
    at = places.flatten().index_select(0, entry)
    if rows:
        at += (found // values.numel()).mul_(rows)
    return Sparse(at, starts, values.flatten().index_select(0, entry), len(kept))


Drawn = tuple[Tensor | Sparse, Tensor | None]
"""Weights of many draws, and what is added to their products."""


class Layer:
    """A masked linear layer, with what is computed once for all draws."""

    def __init__(
        self, mask: StochasticMask, weight: Tensor, bias: Tensor | None, examples: int, *, first: bool
    ) -> None:
        self.mask, self.weight, self.bias, self.first = mask, weight, bias, first
        self.sampler: Sampler = mask.structure.sampler(mask.logits)
        chance = mask.spread(mask.probabilities, weight).expand(weight.shape)
        share = torch.minimum(chance, 1 - chance) if first else chance
        self.is_sparse = (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and mask.log_std is None
            and examples * share.mean().item() < SPARSE_SHARE * (examples - SPARSE_EXAMPLES)
        )
        self.has_common = self.is_sparse and first
        self.values, self.places = weight, torch.arange(weight.shape[1]).expand(weight.shape)
        if self.has_common:  # which is one more row of the table for each output
            self.best, one = chance > 0.5, torch.arange(len(weight))[:, None]
            self.values = torch.cat((torch.where(self.best, -weight, weight), torch.ones_like(one)), 1)
            self.places = torch.cat((self.places, weight.shape[1] + one), 1)
            self.most = weight * self.best

    def table(self, columns: Float[Tensor, "inputs n"]) -> Float[Tensor, "rows n"]:
        """Return the columns, below them what all draws have in common of their pre-activations, if any."""
        if not self.has_common:
            return columns
        common = self.most @ columns
        return torch.cat((columns, common if self.bias is None else common.add_(self.bias[:, None])))

    def draw(self, count: int, generator: torch.Generator | None) -> Drawn:
        """Return drawn weights and the bias; for a `table` that has it, how they differ from b ∘ w."""
        if not self.is_sparse:
            return self.mask.draws(self.weight, count, generator, self.sampler), self.bias
        kept = self.mask.spread(self.sampler(count, generator), self.weight).expand(count, *self.weight.shape)
        if not self.has_common:
            return sparse(kept, self.values, self.places, self.weight.shape[1]), self.bias
        changed = kept.new_ones(count, *self.values.shape)
        torch.ne(kept, self.best, out=changed[..., :-1])
        return sparse(changed, self.values, self.places), None


class Chain:
    """A chain of layers on fixed inputs, ready for masks.

    Shapes: x (n, …) -> (draws, n, classes).
    Holds: exactly, up to the order of sums.
    """

    def __init__(self, model: nn.Module, steps: Steps, x: Tensor) -> None:
        masks, weights = masks_of(model), originals_of(model)
        first = next(k for k, (name, _) in enumerate(steps) if name in masks)
        self.before, self.steps, self.x = steps[:first], steps[first:], x
        self.width = BLOCK if x.device.type == "cpu" else len(x)
        self.layers = {
            name: Layer(masks[name], weights[name], module.bias, len(x), first=k == 0)
            for k, (name, module) in enumerate(self.steps)
            if name in masks
        }
        sizes = [weights[name].shape for name in self.layers]
        activations = min(self.width, len(x)) * max(size[0] for size in sizes) + len(x) * sizes[-1][0]
        self.elements = sum(size.numel() for size in sizes) + 2 * activations
        """About how many numbers one draw takes: its weights, its widest activation and its outputs."""

    @cached_property
    def blocks(self) -> list[Tensor]:
        """The inputs as the first masked layer reads them, by blocks of examples."""
        table, parts = self.layers[self.steps[0][0]].table, self.x.flatten(1).split(self.width)
        columns = (part.mT.clone(memory_format=torch.contiguous_format) for part in parts)
        return [table(_through(self.before, {}, block)) for block in columns]

    def outputs(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "draws n classes"]:
        """Return the outputs under fresh draws of the masks."""
        drawn = {name: layer.draw(count, generator) for name, layer in self.layers.items()}
        return torch.cat([_through(self.steps, drawn, block) for block in self.blocks], -1).mT

    def skip(self, count: int, generator: torch.Generator | None) -> None:
        """Take the random numbers of as many draws."""
        for layer in self.layers.values():
            layer.mask.skip(layer.weight, count, generator, layer.sampler)


def _is_step(name: str, module: nn.Module) -> bool:
    """Tell whether a module is one step of a chain, not a sequence of steps or part of a mask."""
    return type(module) is not nn.Sequential and "parametrizations" not in name.split(".")


def _through(steps: Steps, drawn: dict[str, Drawn], columns: Tensor) -> Tensor:
    """Return what a chain makes of columns, its masked layers as they are drawn."""
    h = columns
    for name, module in steps:
        kind: type = type(module)
        if kind is nn.ReLU and h.ndim == 3:
            h = h.relu_()
        elif kind in ELEMENTWISE:
            h = module(h)
        elif kind is not nn.Flatten:
            weight, bias = drawn[name] if name in drawn else (module.weight, module.bias)  # noqa: SIM401 (slow)
            h = _product(weight, h)
            h = h if bias is None else h.add_(bias[:, None])
    return h


def _product(weight: Tensor | Sparse, columns: Tensor) -> Tensor:
    """Return drawn weights times columns; one large product where the columns are shared."""
    if isinstance(weight, Sparse) or weight.ndim == 2 or columns.ndim == 3:
        return weight @ columns
    return (weight.flatten(0, 1) @ columns).unflatten(0, weight.shape[:2])
