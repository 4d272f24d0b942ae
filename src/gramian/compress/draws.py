"""Many random masks at once: the outputs of a model under independent draws of its masked weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gramian.compress.masks import key_of, masks_of, originals_of
from gramian.compress.structures import Patterns
from gramian.errors import InputError

ELEMENTS = {"cpu": 2**22}
"""Numbers, weights and activations together, that one block of draws may hold: what fits into a cache."""
MEMORY_ELEMENTS = 2**27
"""The same on an accelerator."""

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
    activations are batched products with the features first; any other model is mapped over its drawn weights
    by vmap.

    Shapes: x (n, …) -> (draws, n, …), or what `read` makes of it.
    Raises: InputError for fewer than one draw, a model without masks, and one that is in training: its
        dropout and its normalisation over the batch would make examples depend on each other.
    Holds: exactly.
    """
    if draws < 1:
        raise InputError(f"at least one draw is needed, got {draws}")
    if any(module.training for module in model.modules()):
        raise InputError("masks are drawn for a model in evaluation; call model.eval() first")
    masks, weights = masks_of(model), originals_of(model)
    chain = _chain(model, x)
    limit = ELEMENTS.get(x.device.type, MEMORY_ELEMENTS) if elements is None else elements
    size, columns = _elements(model, x), x if chain is None else x.flatten(1).mT.contiguous()
    found = []
    while draws > 0:
        count = min(draws, max(1, limit // size))
        drawn = {name: mask.draws(weights[name], count, generator) for name, mask in masks.items()}
        outputs = _mapped(model, drawn, x) if chain is None else _chained(chain, drawn, columns)
        found.append(outputs if read is None else read(outputs))
        draws -= count
    return torch.cat(found)


def error_reader(targets: Shaped[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    """Return a reader of 0-1 losses: 0 only where the output of the class is above all others.

    Equal largest outputs and outputs that are not numbers are errors, whichever of them argmax would pick.

    Shapes: outputs (k, n, classes) -> (k, n).
    Raises: InputError for a class that is not among the outputs.
    Holds: exactly.
    """

    def read(outputs: Float[Tensor, "k n classes"]) -> Float[Tensor, "k n"]:
        if not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[-1]:
            raise InputError(f"classes must be from 0 to {outputs.shape[-1] - 1}, as there are outputs")
        index = targets.expand(len(outputs), -1)[..., None]
        own = outputs.gather(-1, index)[..., 0]
        others = outputs.scatter(-1, index, -torch.inf).amax(-1)
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


def _mapped(model: nn.Module, drawn: dict[str, Tensor], x: Tensor) -> Tensor:
    given = {key_of(name, "0.given"): weight for name, weight in drawn.items()}
    with _mapped_attention(x.device):
        return vmap(lambda values: functional_call(model, values, (x,)), randomness="different")(given)


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


def _chain(model: nn.Module, x: Tensor) -> list[tuple[str, Any]] | None:
    """Return the modules of a chain of linear layers and elementwise activations by name, or None."""
    masks, flat, linear = masks_of(model), x.ndim == 2 and x.is_floating_point(), set()
    steps: list[tuple[str, Any]] = [
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


def _is_step(name: str, module: nn.Module) -> bool:
    """Tell whether a module is one step of a chain, not a sequence of steps or part of a mask."""
    return type(module) is not nn.Sequential and "parametrizations" not in name.split(".")


def _chained(steps: list[tuple[str, Any]], drawn: dict[str, Tensor], columns: Tensor) -> Tensor:
    h = columns
    for name, module in steps:
        kind: type = type(module)
        if kind is nn.ReLU and h.ndim == 3:
            h = h.relu_()
        elif kind in ELEMENTWISE:
            h = module(h.clone() if h is columns else h)  # the module may work in place
        elif kind is not nn.Flatten:
            weight: Any = drawn.get(name, module.weight)
            h = weight @ h
            h = h if module.bias is None else h.add_(module.bias[:, None])
    return h.mT


def _elements(model: nn.Module, x: Tensor) -> int:
    """Return about how many numbers one draw takes: its weights and its widest activation."""
    masks, weights = masks_of(model), originals_of(model)
    widest = max(mask.size_of(weights[name])[0] for name, mask in masks.items())
    one = x[:1]
    positions = one.numel() // min(one.shape[1:]) if one.is_floating_point() and x.ndim > 1 else one.numel()
    return sum(weight.numel() for weight in weights.values()) + 2 * len(x) * widest * max(1, positions)
