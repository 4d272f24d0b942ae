"""Where a module uses its parameters: every call to torch is seen, and what a kernel needs of it is kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gramian.bayes.ntk_layers import Window
from gramian.core.jacobian import Function

_SCALING = {"mul", "div", "true_divide"}
_ELEMENTWISE = _SCALING | {"add", "sub", "addcmul", "addcdiv", "lerp"}


@dataclass(frozen=True, eq=False)
class Reference:
    """A parameter, or a constant multiple of it, as the module's code holds it."""

    name: str
    factor: float
    tensor: Tensor
    """Held so that no other tensor gets its id."""


@dataclass(frozen=True, eq=False)
class Use:
    """One call that reads parameters, and where in the graph the derivative by its result is found.

    affine: z = a Wᵀ + b, of patches where there is a window; lookup: z = W_a; copy: the parameter itself,
    copied for every row. `roles` are the parameters by what they are in the call, `factors` what they are
    multiplied by before. A use without an edge has no row in its result for each row of x.
    """

    kind: str
    roles: tuple[str | None, ...]
    factors: tuple[float, ...] = ()
    inputs: Tensor | None = None
    output: Tensor | None = None
    edge: Tensor | GradientEdge | None = None
    version: int = 0
    window: Window | None = None
    padding: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What uses have in common whose derivatives may be summed."""
        return self.kind, *self.roles, self.window

    @property
    def names(self) -> set[str]:
        """The parameters that the call reads."""
        return {name for name in self.roles if name is not None}

    @property
    def shape(self) -> torch.Size:
        """The shape of the derivative by the result."""
        result = self.edge if isinstance(self.edge, Tensor) else self.output
        return torch.Size() if result is None else result.shape

    @property
    def intact(self) -> bool:
        """Whether nobody has written into the inputs since."""
        return self.inputs is None or self.inputs._version == self.version


@dataclass(frozen=True, eq=False)
class Trace:
    """The outputs of a batch with the graph behind them, the uses of parameters, and the leaves.

    The graph reaches a leaf only by ways that no use accounts for.
    """

    outputs: Tensor
    uses: list[Use]
    leaves: dict[str, Tensor]

    def hidden(self) -> set[str]:
        """Return the parameters that are used in a way that was not seen."""
        if not self.outputs.requires_grad:
            return set()
        found = torch.autograd.grad(
            self.outputs.sum(), list(self.leaves.values()), retain_graph=True, allow_unused=True
        )
        return {name for name, gradient in zip(self.leaves, found, strict=True) if gradient is not None}

    def cotangents(self, uses: list[Use]) -> list[Tensor]:
        """Return ∂f_o(x_n)/∂z_n at the result of every use, (n, O, …), by one backward pass an output."""
        n, count = self.outputs.shape
        found = [self.outputs.new_empty(n, count, *use.shape[1:]) for use in uses]
        if not uses or not self.outputs.requires_grad:
            return [cotangent.zero_() for cotangent in found]
        totals = self.outputs.sum(0)
        edges: Any = [use.edge for use in uses]
        for o in range(count):
            gradients = torch.autograd.grad([totals[o]], edges, retain_graph=o < count - 1, allow_unused=True)
            for into, gradient in zip(found, gradients, strict=True):
                into[:, o] = 0 if gradient is None else gradient
        return found


def trace(f: Function, x: Tensor) -> Trace:
    """Run a module on x and record where it uses its parameters."""
    leaves = {name: p.detach().requires_grad_() for name, p in f.parameters.items()}
    recorder = Recorder(leaves, len(x))
    # at a level of forward mode, modules with a backward of their own fall back to torch's operations
    with torch.enable_grad(), forward_ad.dual_level(), recorder:
        outputs = f(leaves, x)
    return Trace(outputs, recorder.uses, leaves)


class Recorder(TorchFunctionMode):
    """Records the calls of torch that read a parameter, and hides the parameter from the graph in them.

    A call is recorded when its result has a row for each row of x: then the derivative of f by the
    parameter is that by the result, times what the call does, row by row. All other calls are left alone.
    """

    def __init__(self, leaves: dict[str, Tensor], rows: int) -> None:
        super().__init__()
        self.references = {id(leaf): Reference(name, 1.0, leaf) for name, leaf in leaves.items()}
        self.rows = rows
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call, recorded if its kind is known and a parameter is in it."""
        kwargs = kwargs or {}
        if any(id(value) in self.references for value in (*args, *kwargs.values())):
            known = _KNOWN.get(func)
            if known is None and getattr(func, "__name__", "") in _ELEMENTWISE and not kwargs:
                return self._elementwise(func, args)
            if known is not None:
                return known(self, func, *args, **kwargs)
        return func(*args, **kwargs)

    def _alias(self, value: Any) -> Any:
        """Return a parameter as a leaf of its own, anything else as it is."""
        return value.detach().requires_grad_() if id(value) in self.references else value

    def _reference(self, value: Any) -> Reference | None:
        return self.references.get(id(value))

    def _affine(
        self, run: Callable[..., Tensor], inputs: Tensor, weight: Tensor, bias: Any, window: Window | None
    ) -> Tensor:
        found = (self._reference(weight), self._reference(bias))
        if found == (None, None):  # the inputs are a parameter
            return run(inputs, weight, bias)
        roles = tuple(None if role is None else role.name for role in found)
        factors = tuple(0.0 if role is None else role.factor for role in found)
        output = run(inputs, self._alias(weight), self._alias(bias))
        if not output.requires_grad or len(inputs) != self.rows or output.ndim < 2:
            self.uses.append(Use("affine", roles, window=window))
            return output
        edge, version = get_gradient_edge(output), inputs._version
        use = Use("affine", roles, factors, inputs.detach(), output.detach(), edge, version, window)
        self.uses.append(use)
        return output

    def linear(self, func: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        """Record z = a Wᵀ + b."""
        return self._affine(func, input, weight, bias, None)

    def convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """Record a convolution as a linear map of patches."""
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if input.ndim != weight.ndim:  # no axis of rows
            return func(input, weight, bias, **settings)
        window = Window.of(weight.shape[2:], stride, padding, dilation, groups)
        return self._affine(lambda a, w, b: func(a, w, b, **settings), input, weight, bias, window)

    def embedding(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        """Record z = W_index."""
        reference = self._reference(weight)
        settings = {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        if reference is None or max_norm is not None or scale_grad_by_freq:
            return func(input, weight, padding_idx, max_norm, norm_type, **settings)
        output = func(input, self._alias(weight), padding_idx)
        if not output.requires_grad or input.ndim == 0 or len(input) != self.rows:
            self.uses.append(Use("lookup", (reference.name,)))
            return output
        padding = padding_idx if padding_idx is None else padding_idx % len(weight)
        roles, factors, edge = (reference.name,), (reference.factor,), get_gradient_edge(output)
        use = Use("lookup", roles, factors, input, output.detach(), edge, input._version, padding=padding)
        self.uses.append(use)
        return output

    def layer_norm(
        self, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps=1e-5
    ) -> Tensor:
        """Record the gain and bias of a normalised row."""
        return self._gained(func(input, normalized_shape, None, None, eps), weight, bias)

    def rms_norm(
        self, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
    ) -> Tensor:
        """Record the gain of a normalised row."""
        return self._gained(func(input, normalized_shape, None, eps), weight, None)

    def group_norm(
        self, func: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps=1e-5
    ) -> Tensor:
        """Record the gain and bias of normalised channels."""
        return self._gained(func(input, num_groups, None, None, eps), weight, bias, input.ndim - 2)

    def batch_norm(
        self,
        func: Any,
        input: Tensor,
        running_mean: Any = None,
        running_var: Any = None,
        weight: Any = None,
        bias: Any = None,
        *rest: Any,
        **settings: Any,
    ) -> Tensor:
        """Record the gain and bias of channels normalised by running statistics, or by their own."""
        plain = func(input, running_mean, running_var, None, None, *rest, **settings)
        return self._gained(plain, weight, bias, input.ndim - 2)

    def _gained(self, x: Tensor, weight: Any, bias: Any, after: int = 0) -> Tensor:
        """Multiply by a gain and add a bias whose axes stand before `after` others."""
        if weight is not None:
            x = x * self._copied(weight, x, after)
        return x if bias is None else x + self._copied(bias, x, after)

    def _elementwise(self, func: Any, args: tuple[Any, ...]) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return self._scaled(func, args)
        ndim = max(tensor.ndim for tensor in tensors)
        carriers = [t for t in tensors if id(t) not in self.references and t.ndim == ndim > 0]
        like = next((carrier for carrier in carriers if len(carrier) == self.rows), None)
        return func(*(self._copied(value, like) for value in args))

    def _scaled(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Follow a parameter through multiplication or division by a number."""
        result = func(*args)
        reference = self._reference(args[0]) or self._reference(args[-1])
        numbers = all(isinstance(value, (int, float, Tensor)) for value in args)
        divided = func.__name__ != "mul" and not isinstance(args[0], Tensor)
        if reference is None or len(args) != 2 or func.__name__ not in _SCALING or divided or not numbers:
            return result
        one = (torch.ones((), dtype=torch.float64) if isinstance(value, Tensor) else value for value in args)
        factor = reference.factor * float(func(*one))
        if math.isfinite(factor):
            self.references[id(result)] = Reference(reference.name, factor, result)
        return result

    def _copied(self, value: Any, like: Tensor | None, after: int = 0) -> Any:
        """Return a parameter with a copy for every row, whose gradients then stay apart."""
        reference = self._reference(value)
        if like is None or not isinstance(value, Tensor):
            aligned = ()
        else:
            aligned = (1,) * (like.ndim - value.ndim - after) + value.shape + (1,) * after
        if reference is None:
            return value.reshape(aligned) if after else value
        fits = like is not None and len(aligned) == like.ndim and aligned[:1] == (1,)
        if like is None or not fits or len(like) != self.rows or not torch.is_grad_enabled():
            self.uses.append(Use("copy", (reference.name,)))
            return value.reshape(aligned) if after else value
        leaf = value.detach().reshape(aligned).expand(self.rows, *aligned[1:]).requires_grad_()
        use = Use("copy", (reference.name,), (reference.factor,), None, like.detach(), leaf)
        self.uses.append(use)
        return leaf


_KNOWN: dict[Any, Callable[..., Tensor]] = {
    functional.linear: Recorder.linear,
    torch.conv1d: Recorder.convolution,
    torch.conv2d: Recorder.convolution,
    torch.conv3d: Recorder.convolution,
    functional.embedding: Recorder.embedding,
    functional.layer_norm: Recorder.layer_norm,
    functional.rms_norm: Recorder.rms_norm,
    functional.group_norm: Recorder.group_norm,
    functional.batch_norm: Recorder.batch_norm,
    functional.instance_norm: Recorder.batch_norm,
}
