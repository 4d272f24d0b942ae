"""Chains of linear layers and elementwise activations under many masks at once.

Features come first and examples last, so that the weights of many draws are one factor of a product, and the
examples go through in blocks whose activations stay in the cache. Where a draw leaves few weights, the
product is a sum over those alone; and since all draws see the same inputs in the first masked layer, there

    (m ∘ w) x = (b ∘ w) x + ((m − b) ∘ w) x,  b = 1[λ > ½]

has a first term that is the same for all draws, and a second with the few weights whose mask is not b.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
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


def sparse(kept: Tensor, weight: Float[Tensor, "outputs inputs"], *, shared: bool) -> Sparse:
    """Return the entries of a weight that masks keep, for one factor that is `shared` or one a mask.

    Shapes: kept (draws, outputs, inputs).
    Holds: exactly.
    """
    inputs = weight.shape[1]
    entries = kept.flatten().nonzero()[:, 0]
    starts = torch.searchsorted(entries, torch.arange(0, kept.numel() + 1, inputs, device=kept.device))
    places = entries % inputs
    if not shared:
        places += entries // weight.numel() * inputs
    return Sparse(places, starts, weight.flatten()[entries % weight.numel()], len(kept))


class Layer:
    """A masked linear layer, with what is computed once for all draws."""

    def __init__(self, mask: StochasticMask, weight: Tensor, examples: int, *, first: bool) -> None:
        self.mask, self.weight, self.first = mask, weight, first
        self.sampler: Sampler = mask.structure.sampler(mask.logits)
        chance = mask.spread(mask.probabilities, weight).expand(weight.shape)
        self.best = chance > 0.5
        """b of a first layer."""
        self.changes = torch.where(self.best, -weight, weight)
        """What a first layer's weights gain where m is not b."""
        share = torch.minimum(chance, 1 - chance) if first else chance
        self.is_sparse = (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and mask.log_std is None
            and examples * share.mean().item() < SPARSE_SHARE * (examples - SPARSE_EXAMPLES)
        )

    def common(self, columns: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return what all draws have in common of a sparse first layer's pre-activations, or None."""
        if not (self.is_sparse and self.first):
            return None
        common = (self.weight * self.best) @ columns
        return common if bias is None else common.add_(bias[:, None])

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor | Sparse:
        """Return drawn weights; of a sparse first layer only how they differ from b ∘ w."""
        if not self.is_sparse:
            return self.mask.draws(self.weight, count, generator, self.sampler)
        kept = self.mask.spread(self.sampler(count, generator), self.weight).expand(count, *self.weight.shape)
        if self.first:
            return sparse(kept != self.best, self.changes, shared=True)
        return sparse(kept, self.weight, shared=False)


class Chain:
    """A chain of layers on fixed inputs, ready for masks.

    Shapes: x (n, …) -> (draws, n, classes).
    Holds: exactly, up to the order of sums.
    """

    def __init__(self, model: nn.Module, steps: Steps, x: Tensor) -> None:
        masks, weights = masks_of(model), originals_of(model)
        first = next(k for k, (name, _) in enumerate(steps) if name in masks)
        before, self.steps = steps[:first], steps[first:]
        columns = _through(before, {}, x.flatten(1).mT.clone(memory_format=torch.contiguous_format))
        width = BLOCK if x.device.type == "cpu" else len(x)
        self.blocks = [block.contiguous() for block in columns.split(width, -1)]
        self.layers = {
            name: Layer(masks[name], weights[name], len(x), first=k == 0)
            for k, (name, _) in enumerate(self.steps)
            if name in masks
        }
        name, module = self.steps[0]
        self.common = [self.layers[name].common(block, module.bias) for block in self.blocks]
        sizes = [weights[name].shape for name in self.layers]
        activations = min(width, len(x)) * max(size[0] for size in sizes) + len(x) * sizes[-1][0]
        self.elements = sum(size.numel() for size in sizes) + 2 * activations
        """About how many numbers one draw takes: its weights, its widest activation and its outputs."""

    def outputs(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "draws n classes"]:
        """Return the outputs under fresh draws of the masks."""
        drawn = {name: layer.draw(count, generator) for name, layer in self.layers.items()}
        found = [
            _through(self.steps, drawn, block, common)
            for block, common in zip(self.blocks, self.common, strict=True)
        ]
        return torch.cat(found, -1).mT


def _is_step(name: str, module: nn.Module) -> bool:
    """Tell whether a module is one step of a chain, not a sequence of steps or part of a mask."""
    return type(module) is not nn.Sequential and "parametrizations" not in name.split(".")


def _through(
    steps: Steps, drawn: dict[str, Tensor | Sparse], columns: Tensor, common: Tensor | None = None
) -> Tensor:
    """Return what a chain makes of columns; `common` is added to the first product in place of its bias."""
    h = columns
    for k, (name, module) in enumerate(steps):
        kind: type = type(module)
        if kind is nn.ReLU and h.ndim == 3:
            h = h.relu_()
        elif kind in ELEMENTWISE:
            h = module(h)
        elif kind is not nn.Flatten:
            h = _product(drawn[name], h) if name in drawn else module.weight @ h
            if k == 0 and common is not None:
                h = h.add_(common)
            elif module.bias is not None:
                h = h.add_(module.bias[:, None])
    return h


def _product(weight: Tensor | Sparse, columns: Tensor) -> Tensor:
    """Return drawn weights times columns; one large product where the columns are shared."""
    if isinstance(weight, Sparse) or weight.ndim == 2 or columns.ndim == 3:
        return weight @ columns
    return (weight.flatten(0, 1) @ columns).unflatten(0, weight.shape[:2])
