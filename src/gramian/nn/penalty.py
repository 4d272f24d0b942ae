"""A loss term on extreme activations, read by hooks while a loss is computed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.errors import InputError

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar."""


def penalty(
    x: Float[Tensor, "*shape"], threshold: float = 3.0, power: float = 4.0, eps: float = 1e-6
) -> Float[Tensor, ""]:
    """Return the mean power of entries measured in units of a threshold: small below it, steep above.

        E[(|x| / (τ + ε))^p]

    Shapes: any -> (), in float32 or better.
    Holds: exactly.
    Source: Liang et al. 2025, arXiv 2511.23225 (TWEO; τ = 3, p = 4).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.abs() / (threshold + eps)).pow(power).mean()


class ActivationPenalty:
    """A penalty on what some modules return, a context manager: within it, forward passes are recorded.

        value() = λ · mean_l E[(|A_l| / (τ + ε))^p]

    A_l are the outputs of the modules in all calls since the block was entered, padding included (of a tuple
    the first). Only the outputs are kept, and the value is computed from them afterwards, so that it goes
    with gradient checkpointing of the non-reentrant kind: leave the block before the backward pass, which
    calls the modules again. Hooks that come after a compilation are not seen by the compiled model: enter
    before `torch.compile` traces it, or penalise a model that is not compiled.

    Raises: InputError for a weight below zero, a threshold or a power that is not positive, and no modules;
    by `value()` where no module was called, or only where gradients are off (reentrant checkpointing).
    Holds: exactly.
    Source: Liang et al. 2025, arXiv 2511.23225 (TWEO; λ = 0.01, τ = 3, p = 4, on the outputs of blocks).
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        weight: float = 0.01,
        threshold: float = 3.0,
        power: float = 4.0,
    ) -> None:
        if weight < 0 or threshold <= 0 or power <= 0:
            raise InputError(
                "an activation penalty needs a weight of at least 0, a positive threshold and a positive "
                f"power, got {weight:g}, {threshold:g} and {power:g}"
            )
        self.modules, self.weight = tuple(modules), weight
        if not self.modules:
            raise InputError("an activation penalty needs at least one module to read")
        self.threshold, self.power = threshold, power
        self._outputs: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._differentiable = True

    def __enter__(self) -> "ActivationPenalty":
        self._outputs.clear()
        self._differentiable = True
        self._handles = [module.register_forward_hook(self._keep) for module in self.modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outputs.append(output[0] if isinstance(output, tuple) else output)
        self._differentiable &= torch.is_grad_enabled()

    def value(self) -> Float[Tensor, ""]:
        """Return the penalty on what was recorded, and forget it."""
        outputs, self._outputs = self._outputs, []
        if not outputs:
            raise InputError(
                "the activation penalty saw no output: its modules were not called, or run compiled from "
                "before it was entered"
            )
        if torch.is_grad_enabled() and not self._differentiable:
            raise InputError(
                "the activation penalty saw outputs without gradients; use gradient checkpointing with "
                "use_reentrant=False"
            )
        terms = [penalty(output, self.threshold, self.power) for output in outputs]
        return self.weight * torch.stack([term.to(terms[0].device) for term in terms]).mean()


def blocks_of(model: nn.Module) -> Iterable[nn.Module]:
    """Return the blocks of a model: the module list `blocks`, wherever in it (or in what wraps it) it is.

    Raises: InputError when there is none.
    """
    for module in model.modules():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            return blocks
    raise InputError(f"{type(model).__name__} has no list `blocks`; say which modules to penalise")


def penalised(
    loss: Loss,
    weight: float = 0.01,
    threshold: float = 3.0,
    power: float = 4.0,
    modules: Callable[[nn.Module], Iterable[nn.Module]] = blocks_of,
) -> Loss:
    """Return a loss with an `ActivationPenalty` on the modules that a function names in a model.

        L(model, batch) + λ · mean_l E[(|A_l| / (τ + ε))^p]

    It is a mean over the batch, so that equal parts of an accumulated batch give the whole batch's. The
    value of the penalty is in what a trainer logs as training loss, not in what it evaluates.

    Raises: InputError as `ActivationPenalty`.
    Holds: exactly.
    """

    def total(model: nn.Module, batch: Any) -> Tensor:
        with ActivationPenalty(modules(model), weight, threshold, power) as activations:
            value = loss(model, batch)
        return value + activations.value()

    return total
