"""A module as a function of its parameters: its derivatives, and the Gram matrix of its Jacobian.

Rows of x are the examples, and the module is a function of one row: f(θ, x)_n depends on x_n alone. Its
outputs beyond the first axis are counted as one axis of O outputs.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gramian.errors import InputError

Parameters = dict[str, Tensor]
"""Parameters, or what belongs to each of them, by name; a tied parameter has one name, its first."""

Weights = Mapping[str, float | Tensor] | Callable[[str, Tensor], float | Tensor]
"""A number (or a tensor of the parameter's shape) for every parameter, by name or by a function of both."""

ROWS = 256
"""Rows that go through the module at once, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Function:
    """The function (θ, x) -> f(θ, x) of a module; parameters that are not in θ stay as they are.

    `parameters` is the θ that the module has now. Make one by `function`.

    Shapes: x (n, …) -> (n, O).
    Raises: InputError when the module returns anything but one tensor with a row for each row of x.
    Holds: exactly.
    """

    module: nn.Module
    parameters: Parameters
    constants: Parameters

    def __call__(self, parameters: Parameters, x: Shaped[Tensor, " n *size"]) -> Float[Tensor, "n o"]:
        """Return the outputs of every row under the given parameters."""
        for value in (*self.constants.values(), *parameters.values()):
            value._is_param = True  # what isinstance(value, nn.Parameter) asks, for modules that do
        with sdpa_kernel(SDPBackend.MATH), _slow_attention():  # the fast ones have no forward-mode derivative
            y = functional_call(self.module, {**self.constants, **parameters}, (x,))
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x) or not y.is_floating_point():
            found = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise InputError(
                f"the module has to return one floating tensor (rows, outputs), a row for each of the "
                f"{len(x)} it is given, but it returned {found}"
            )
        return y.reshape(len(x), -1)


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Keep torch's own attention modules from the way that they go at evaluation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def function(module: nn.Module, names: Collection[str] | None = None) -> Function:
    """Return a module as a function of its trainable parameters, or of those that `names` takes.

    A name is that of a parameter or of a module that holds parameters. Buffers and parameters with
    `requires_grad` False are constants.

    Raises: InputError for a name that is no trainable parameter, a module without any, and normalisation
        over the batch, for which no row is a function of itself alone.
    Holds: exactly.
    """
    module = unwrapped(module)
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            raise InputError(
                f"{name or type(part).__name__} normalises over the batch; call module.eval() to use the "
                "running statistics, or take another norm"
            )
    every = {name: p.detach() for name, p in module.named_parameters()}
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    chosen = trainable if names is None else [name for name in trainable if _within(name, names)]
    for name in [] if names is None else names:
        if not any(_within(taken, [name]) for taken in chosen):
            raise InputError(f"{name!r} names no trainable parameter and no module that holds one")
    if not chosen:
        raise InputError(f"{type(module).__name__} has no trainable parameter to differentiate by")
    constants = {name: p for name, p in every.items() if name not in chosen}
    return Function(module, {name: every[name] for name in chosen}, constants)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _within(parameter: str, names: Collection[str]) -> bool:
    return any(parameter == name or parameter.startswith(f"{name}.") for name in names)


def scales(f: Function, weights: Weights | None) -> Parameters:
    """Return the weight of every parameter of f as a tensor that broadcasts to its shape; 1 without weights.

    Raises: InputError for a parameter without a weight, a weight without a parameter, and weights of another
        shape, negative or not finite.
    """
    if weights is None:
        return {name: p.new_ones(()) for name, p in f.parameters.items()}
    if isinstance(weights, Mapping):
        if weights.keys() != f.parameters.keys():
            odd = sorted(weights.keys() ^ f.parameters.keys())
            raise InputError(f"weights need one entry for each trainable parameter; look at {', '.join(odd)}")
        found = dict(weights)
    else:
        found = {name: weights(name, p) for name, p in f.parameters.items()}
    return {name: _scale(name, found[name], p) for name, p in f.parameters.items()}


def _scale(name: str, weight: float | Tensor, parameter: Tensor) -> Tensor:
    scale = torch.as_tensor(weight, dtype=parameter.dtype, device=parameter.device).detach()
    if scale.ndim and scale.shape != parameter.shape:
        raise InputError(
            f"the weight of {name} must be a number or of shape {tuple(parameter.shape)}, got "
            f"{tuple(scale.shape)}"
        )
    if not scale.isfinite().all() or (scale < 0).any():
        raise InputError(f"the weight of {name} must be finite and not negative")
    return scale


def batches(x: Tensor, rows: int) -> Iterator[Tensor]:
    """Yield x by `rows` rows at a time.

    Raises: InputError for x without rows, with NaN or infinity, or fewer than one row at a time.
    """
    check_rows(x)
    if rows < 1:
        raise InputError(f"at least one row has to go through the module at once, got {rows}")
    yield from x.split(rows)


def check_rows(x: Tensor) -> None:
    """Raise InputError unless x has a row and only finite numbers."""
    if x.ndim == 0 or not len(x):
        raise InputError(f"inputs need at least one row, got shape {tuple(x.shape)}")
    if x.is_floating_point() and not x.isfinite().all():
        raise InputError("inputs have to be finite, but hold NaN or infinity")


def jvp(
    f: Function, x: Shaped[Tensor, " n *size"], tangent: Parameters, rows: int = ROWS
) -> Float[Tensor, "n o"]:
    """Multiply the Jacobian by a tangent of the parameters, in forward mode where torch has it.

        (J v)_no = Σ_p ∂f_o(x_n)/∂θ_p v_p

    Shapes: x (n, …), tangent as the parameters -> (n, O).
    Raises: InputError for inputs that are empty or not finite, and a tangent that does not fit.
    Holds: exactly.
    """
    _check_tangent(f, tangent)

    def along(batch: Tensor) -> Tensor:
        try:
            return torch.func.jvp(lambda p: f(p, batch), (f.parameters,), (tangent,))[1]
        except NotImplementedError:  # an operation that torch has no derivative of in forward mode
            return _twice_back(f, batch, tangent)

    with warnings.catch_warnings():  # torch's own, when it first differentiates in forward mode
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return torch.cat([along(batch) for batch in batches(x, rows)])


def _twice_back(f: Function, x: Tensor, tangent: Parameters) -> Tensor:
    """Give J v as the derivative of Jᵀu by u along v, by two passes in reverse mode."""
    leaves = {name: p.requires_grad_() for name, p in _aliases(f.parameters).items()}
    kept = torch.is_grad_enabled() and any(v.requires_grad for v in tangent.values())
    with torch.enable_grad():
        y = f(leaves, x)
        u = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, [*leaves.values()], u, create_graph=True, materialize_grads=True)
    pairs = [(g, tangent[name]) for name, g in zip(leaves, pulled, strict=True) if g.requires_grad]
    return torch.autograd.grad([g for g, _ in pairs], u, [v for _, v in pairs], create_graph=kept)[0]


def vjp(
    f: Function, x: Shaped[Tensor, " n *size"], cotangent: Float[Tensor, "n o"], rows: int = ROWS
) -> Parameters:
    """Multiply the transposed Jacobian by a cotangent of the outputs, in reverse mode.

        (Jᵀ u)_p = Σ_no ∂f_o(x_n)/∂θ_p u_no

    Shapes: x (n, …), cotangent (n, O) -> as the parameters.
    Raises: InputError for inputs that are empty or not finite, and a cotangent that does not fit.
    Holds: exactly.
    """
    leaves = {name: p.requires_grad_() for name, p in _aliases(f.parameters).items()}
    total = {name: torch.zeros_like(p) for name, p in f.parameters.items()}
    for batch, u in zip(batches(x, rows), cotangent.split(rows), strict=True):
        with torch.enable_grad():
            y = f(leaves, batch)
        if y.shape != u.shape:
            raise InputError(f"the cotangent must be (rows, {y.shape[1]}), got (rows, {u.shape[1]})")
        for name, gradient in _gradients(y, leaves, u).items():
            total[name] += gradient
    return total


def jacobian(f: Function, x: Shaped[Tensor, " n *size"], rows: int = ROWS) -> Parameters:
    """Give the Jacobian of every row: for each parameter a tensor (n, O, *its shape).

        J_nop = ∂f_o(x_n)/∂θ_p

    Rows go through `torch.func.vmap` together; a module that it cannot run goes row by row.

    Shapes: x (n, …) -> (n, O, *shape) for every parameter.
    Raises: InputError for inputs that are empty or not finite.
    Holds: exactly.
    """
    parts = [_jacobian(f, part) for batch in batches(x, rows) for part in _told_apart(f, batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in f.parameters}


def _told_apart(f: Function, x: Tensor) -> Sequence[Tensor]:
    """Return rows in parts of another number than outputs.

    Where both are equally many, vmap takes one for the other in the derivative of PReLU (torch 2.13).
    """
    count = len(x)
    return x.split(count - 1) if count > 1 and f(f.parameters, x[:1]).shape[1] == count else (x,)


def _jacobian(f: Function, x: Tensor) -> Parameters:
    single = jacrev(lambda p, row: f(p, row[None])[0])
    try:
        with warnings.catch_warnings():  # of operations that vmap knows no rule for, only a slow way
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return vmap(single, (None, 0))(f.parameters, x)
    except RuntimeError:  # data-dependent control flow, or a backward that torch.func does not know
        return _row_by_row(f, x)


def _row_by_row(f: Function, x: Tensor) -> Parameters:
    leaves = {name: p.requires_grad_() for name, p in _aliases(f.parameters).items()}
    found: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for row in x.split(1):
        with torch.enable_grad():
            y = f(leaves, row)[0]
        per_output = [_gradients(value, leaves) for value in y]
        for name, rows in found.items():
            rows.append(torch.stack([gradients[name] for gradients in per_output]))
    return {name: torch.stack(rows) for name, rows in found.items()}


def jacobian_gram(
    f: Function,
    x: Shaped[Tensor, " n *size"],
    y: Shaped[Tensor, " m *size"] | None = None,
    weights: Weights | None = None,
    rows: int = ROWS,
) -> Float[Tensor, "n o m o"]:
    """Give the Gram matrix of the Jacobian's rows, by its definition: the empirical neural tangent kernel.

        Θ_{no,mp} = Σ_j s_j ∂f_o(x_n)/∂θ_j ∂f_p(y_m)/∂θ_j

    Both Jacobians are held whole: `gramian.bayes.ntk` is the fast way.

    Shapes: x (n, …), y (m, …) -> (n, O, m, O).
    Raises: InputError for inputs that are empty or not finite, and weights that do not fit.
    Holds: exactly.
    Source: Jacot, Gabriel, Hongler 2018, arXiv 1806.07572.
    """
    scale = scales(f, weights)
    left = jacobian(f, x, rows)
    right = left if y is None else jacobian(f, y, rows)
    terms = [
        torch.einsum("noj,mpj->nomp", _flat(left[name] * scale[name]), _flat(right[name]))
        for name in f.parameters
    ]
    return torch.stack(terms).sum(0)


def _gradients(y: Tensor, leaves: Parameters, u: Tensor | None = None) -> Parameters:
    """Return the gradients of y, zero for a parameter that it does not depend on."""
    if not y.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        y, list(leaves.values()), u, retain_graph=u is None, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def _flat(jacobian: Tensor) -> Tensor:
    return jacobian[..., None].flatten(2)


def _aliases(parameters: Parameters) -> Parameters:
    return {name: p.detach() for name, p in parameters.items()}


def _check_tangent(f: Function, tangent: Parameters) -> None:
    for name, parameter in f.parameters.items():
        shape = tuple(tangent[name].shape) if name in tangent else "nothing"
        if shape != tuple(parameter.shape):
            raise InputError(f"the tangent of {name} must have shape {tuple(parameter.shape)}, got {shape}")
    if len(tangent) != len(f.parameters):
        raise InputError(f"a tangent has {len(f.parameters)} parameters here, got {len(tangent)}")
