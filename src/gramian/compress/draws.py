"""Many random masks at once: the outputs of a model under independent draws of its masked weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gramian.compress.chains import Chain, steps_of
from gramian.compress.masks import key_of, masks_of, originals_of
from gramian.compress.structures import Patterns
from gramian.errors import InputError

ELEMENTS = {"cpu": 2**22}
"""Numbers, weights and activations together, that one block of draws may hold: what fits into a cache."""
MEMORY_ELEMENTS = 2**27
"""The same on an accelerator."""


@torch.no_grad()
def draw_outputs(
    model: nn.Module,
    x: Tensor,
    draws: int,
    generator: torch.Generator | None,
    *,
    read: Callable[[Tensor], Tensor] | None = None,
    elements: int | None = None,
) -> Shaped[Tensor, "draws ..."]:
    """Return f(x; m_k ∘ w) of independent masks m_1, …, m_K, every one on all of x.

    `read` maps the outputs of a block of draws, (k, n, …), to what is kept of them, so that many draws need
    not fit into memory; a block holds some `elements` numbers. Chains of linear layers and elementwise
    activations take the short way of `compress.chains`; any other model is mapped over its drawn weights by
    vmap.

    Shapes: x (n, …) -> (draws, n, …), or what `read` makes of it.
    Raises: InputError for fewer than one draw, a model without masks, and one that is in training: its
        dropout and its normalisation over the batch would make examples depend on each other.
    Holds: exactly, up to the order of sums.
    """
    if draws < 1:
        raise InputError(f"at least one draw is needed, got {draws}")
    if any(module.training for module in model.modules()):
        raise InputError("masks are drawn for a model in evaluation; call model.eval() first")
    many, found = _many(model, x), []
    for count in _blocks(many, x, draws, elements):
        outputs = many.outputs(count, generator)
        found.append(outputs if read is None else read(outputs))
    return torch.cat(found)


@torch.no_grad()
def skip_draws(
    model: nn.Module,
    x: Tensor,
    draws: int,
    generator: torch.Generator | None,
    *,
    elements: int | None = None,
) -> None:
    """Take the random numbers from a generator that `draw_outputs` would, and compute no outputs.

    Raises: InputError for a model without masks.
    Holds: exactly.
    """
    many = _many(model, x)
    for count in _blocks(many, x, draws, elements):
        many.skip(count, generator)


def _many(model: nn.Module, x: Tensor) -> "Chain | _Mapped":
    steps = steps_of(model, x)
    return _Mapped(model, x) if steps is None else Chain(model, steps, x)


def _blocks(many: "Chain | _Mapped", x: Tensor, draws: int, elements: int | None) -> Iterator[int]:
    """Give the sizes of blocks of draws."""
    limit = ELEMENTS.get(x.device.type, MEMORY_ELEMENTS) if elements is None else elements
    size = max(1, limit // many.elements)
    while draws > 0:
        yield min(draws, size)
        draws -= size


def error_reader(targets: Shaped[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    """Return a reader of 0-1 losses: 0 only where the output of the class is above all others.

    Equal largest outputs and outputs that are not finite are errors, whichever of them argmax would pick.

    Shapes: outputs (k, n, classes) -> (k, n).
    Raises: InputError for a class that is not among the outputs.
    Holds: exactly.
    """

    def read(outputs: Float[Tensor, "k n classes"]) -> Float[Tensor, "k n"]:
        if not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[-1]:
            raise InputError(f"classes must be from 0 to {outputs.shape[-1] - 1}, as there are outputs")
        index = targets.expand(len(outputs), -1)[..., None]
        own = outputs.gather(-1, index)[..., 0]
        hidden = torch.zeros_like(outputs[0]).scatter_(-1, targets[:, None], -torch.inf)
        others = (outputs + hidden).amax(-1)
        return (~(own > others)).to(outputs.dtype)

    return read


class MaskedLoss:
    """The loss of a model as a function of the mask variables of all its layers, one flat vector a mask.

        m -> L(f(x; m ∘ w), y)

    What `mask_gradients` differentiates. Weights that are Gaussian count at their means.

    Shapes: (k, p) -> (k,).
    Raises: InputError when the model has no masks.
    Holds: exactly.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Any, Tensor], Tensor]) -> None:
        self.model, self.x, self.y, self.loss = model, x, y, loss
        for name, mask in masks_of(model).items():
            if isinstance(mask.structure, Patterns):
                raise InputError(f"the patterns of {name!r} are no independent masks; use the mode relaxed")
        self.shapes = {name: mask.kept.shape for name, mask in masks_of(model).items()}

    def __call__(self, masks: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """Return the loss of every mask."""
        weights, own = originals_of(self.model), masks_of(self.model)
        parts = masks.split([shape.numel() for shape in self.shapes.values()], -1)
        given = {
            key_of(name, "0.given"): own[name].spread(part.reshape(-1, *shape), weights[name]) * weights[name]
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

        def single(values: dict[str, Tensor]) -> Tensor:
            return self.loss(functional_call(self.model, values, (self.x,)), self.y)

        with _mapped_attention(self.x.device):
            return vmap(single, randomness="different")(given)

    def moments(self, logits: Float[Tensor, " p"], generator: torch.Generator | None) -> Float[Tensor, ""]:
        """Return one draw of the loss under moment matching; see `compress.moments`."""
        parts = logits.split([shape.numel() for shape in self.shapes.values()])
        values = {
            key_of(name, "0.logits"): part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        masks = masks_of(self.model)
        before = {name: (mask.mode, mask.generator) for name, mask in masks.items()}
        try:
            for mask in masks.values():
                mask.mode, mask.generator = "moments", generator
            return self.loss(functional_call(self.model, values, (self.x,)), self.y)
        finally:
            for name, mask in masks.items():
                mask.mode, mask.generator = before[name]


def flat_logits(model: nn.Module) -> Float[Tensor, " p"]:
    """Return the logits of all masks in one vector, the order of `MaskedLoss`.

    Raises: InputError when the model has no masks.
    """
    return torch.cat([mask.logits.detach().flatten() for mask in masks_of(model).values()])


def set_gradients(model: nn.Module, gradient: Float[Tensor, " p"]) -> None:
    """Write a flat gradient to the logits of all masks, for an optimiser to use.

    Raises: InputError when the model has no masks.
    """
    masks = masks_of(model).values()
    parts = gradient.split([mask.logits.numel() for mask in masks])
    for mask, part in zip(masks, parts, strict=True):
        mask.logits.grad = part.reshape(mask.logits.shape).to(mask.logits.dtype).clone()


class _Mapped:
    """Any model on fixed inputs, mapped over drawn weights."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x, self.masks, self.weights = model, x, masks_of(model), originals_of(model)
        self.samplers = {name: mask.structure.sampler(mask.logits) for name, mask in self.masks.items()}
        self.elements = _elements(model, x)

    def outputs(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Return the outputs under fresh draws of the masks."""
        given = {
            key_of(name, "0.given"): mask.draws(self.weights[name], count, generator, self.samplers[name])
            for name, mask in self.masks.items()
        }
        with _mapped_attention(self.x.device):
            return vmap(self._single, randomness="different")(given)

    def skip(self, count: int, generator: torch.Generator | None) -> None:
        """Take the random numbers of as many draws."""
        for name, mask in self.masks.items():
            mask.skip(self.weights[name], count, generator, self.samplers[name])

    def _single(self, given: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, given, (self.x,))


@contextmanager
def _mapped_attention(device: torch.device) -> Iterator[None]:
    """Keep attention from the kernels that vmap can only call draw by draw."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _elements(model: nn.Module, x: Tensor) -> int:
    """Return about how many numbers one draw takes: its weights and its widest activation."""
    masks, weights = masks_of(model), originals_of(model)
    widest = max(mask.size_of(weights[name])[0] for name, mask in masks.items())
    one = x[:1]
    positions = one.numel() // min(one.shape[1:]) if one.is_floating_point() and x.ndim > 1 else one.numel()
    return sum(weight.numel() for weight in weights.values()) + 2 * len(x) * widest * max(1, positions)
