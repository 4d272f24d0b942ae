"""Members that are linear in their parameters, solved exactly through the kernel of their Jacobian."""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gramian.bayes.ntk import ntk
from gramian.bayes.ntk_operator import NTKOperator
from gramian.bayes.stack import FunctionSum, Stack, State, member_of
from gramian.core.jacobian import Parameters, vjp
from gramian.errors import InputError

DENSE = 10_000
"""Up to so many rows times outputs the kernel is formed and factorised; beyond, it is only multiplied by."""

JITTER = 1e-8
"""What a kernel without noise gets on its diagonal, as a share of the diagonal's mean."""


def minimisers(
    stack: Stack,
    primal: State,
    prior: Parameters,
    x: Shaped[Tensor, " n *size"],
    residuals: Float[Tensor, "members n o"],
    noise_variance: float,
    shared: bool,
    progress: Callable[[int], None],
) -> State:
    """Give the step of every member from its anchor to the minimum of its regularised squared error.

        argmin_w ½|J w − r|² + ½ σ² ‖w‖²_Λ  =  Λ Jᵀ (J Λ Jᵀ + σ² I)⁻¹ r

    r is what the member still lacks at its anchor. With σ² = 0 it is the shortest step that reaches the
    targets, up to the jitter. `shared` says that all members have the Jacobian of the first.

    Shapes: primal (members, …), x (n, …), residuals (members, n, O) -> (members, …) for every parameter.
    Raises: InputError when conjugate gradients do not converge, or a kernel without noise is too large.
    Holds: exactly, to rounding or to the tolerance of conjugate gradients.
    """
    count, outputs = len(residuals), residuals.shape[-1]
    if shared:
        solve = _solver(stack, member_of(primal, 0), prior, x, outputs, noise_variance)
        solutions = solve(residuals.flatten(1).mT).mT
        progress(count)
    else:
        found = []
        for m in range(count):
            solve = _solver(stack, member_of(primal, m), prior, x, outputs, noise_variance)
            found.append(solve(residuals[m].flatten()[:, None])[:, 0])
            progress(m + 1)
        solutions = torch.stack(found)
    steps = [vjp(stack.at(member_of(primal, m)), x, solutions[m].view(len(x), outputs)) for m in range(count)]
    return {name: prior[name] * torch.stack([step[name] for step in steps]) for name in stack.f.parameters}


def _solver(
    stack: Stack, member: Parameters, prior: Parameters, x: Tensor, outputs: int, noise_variance: float
) -> Callable[[Tensor], Tensor]:
    """Return v ↦ (Θ + σ² I)⁻¹ v for the columns of v."""
    module, names = module_at(stack, member), list(stack.f.parameters)
    weights = {name: prior[name] for name in names}
    if len(x) * outputs <= DENSE:
        kernel = ntk(module, x, weights=weights, parameters=names).flatten(2).flatten(0, 1)
        noise = noise_variance or JITTER * kernel.diagonal().mean()
        kernel.diagonal().add_(noise)
        factor, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            raise InputError(
                f"the kernel with a noise variance of {float(noise):.3g} is not positive definite in "
                f"{kernel.dtype}; raise the noise or use float64"
            )
        return lambda v: torch.cholesky_solve(v, factor)
    if not noise_variance:
        raise InputError(
            f"without noise at most {DENSE} rows times outputs can be solved for, got {len(x) * outputs}"
        )
    operator = NTKOperator(module, x, weights=weights, parameters=names)
    tolerance = 1e-8 if operator.like.dtype == torch.float64 else 1e-5
    return lambda v: operator.solve(v, noise_variance, tolerance=tolerance, iterations=10_000)


def module_at(stack: Stack, member: Parameters) -> nn.Module:
    """Return a module of its own with the parameters and buffers of one member."""
    module = copy.deepcopy(stack.f.module)
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in held.items():
            value.copy_(member[name])
    return module


def linear_parts(primal: State, start: State, anchor: State | None, linear: bool) -> FunctionSum:
    """Return what a linear member is at its anchor, without its δ.

    J(x; θ_aux) a,   or f(x, θ_0) + J(x; θ_0)(a − θ_0) of a network that is linearised at its start
    """
    if linear:
        return FunctionSum((), primal, start)
    away = {name: (start if anchor is None else anchor)[name] - value for name, value in start.items()}
    return FunctionSum((primal,), primal, away)
