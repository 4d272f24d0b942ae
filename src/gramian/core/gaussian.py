"""Gaussian expectations: one-dimensional rules, and E[φ(u)φ(v)] of a pair of correlated Gaussians."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError

Function = Callable[[Tensor], Tensor]

REACH = 13.0  # the density beyond is below 1e-36
RESOLUTIONS = ((96, 192), (256, 256), (512, 384), (1024, 512))  # (Hermite terms, nodes a side), tried in turn
NEGLIGIBLE = 1e-15  # what a truncated series may leave out, in units of √(E[f²] E[g²])
BLOCK = 2**15  # elements whose temporaries stay in the cache of one core
TABLE = 2**14  # variances that are held at once with their values on all nodes


def gauss_hermite(
    order: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> tuple[Float[Tensor, " order"], Float[Tensor, " order"]]:
    """Give the nodes and weights of the Gauss–Hermite rule for a standard normal variable.

    E[f(z)] ≈ Σ_i w_i f(x_i),  z ~ N(0, 1)

    Shapes: two tensors (order,).
    Raises: InputError for an order below 1.
    Holds: exactly for polynomials of degree below 2·order.
    Source: Golub, Welsch 1969, "Calculation of Gauss quadrature rules" (nodes, here polished by Newton).
    """
    nodes, weights = _gauss("hermite", order)
    return nodes.to(device, dtype, copy=True), weights.to(device, dtype, copy=True)


def gaussian_rule(
    order: int = 512, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> tuple[Float[Tensor, " nodes"], Float[Tensor, " nodes"]]:
    """Give a rule for E[f(z)] that keeps its accuracy where f has a kink, a jump or a steep slope at 0.

    E[f(z)] ≈ Σ_i w_i f(x_i): Gauss–Legendre of the given order on (0, 13) and on (−13, 0)

    Shapes: two tensors (2·order,).
    Raises: InputError for an order below 1.
    Holds: to about 1e-15 at the default order for f analytic on either side of 0.
    """
    nodes, weights = _signed_rule(order, torch.device(device or "cpu"))
    return nodes.to(dtype, copy=True), weights.to(dtype, copy=True)


class Dual(ABC):
    """Expectations of an activation φ under a pair of centred Gaussians (u, v).

    values(k, a, b) = E[φ(u)φ(v)],  slopes(k, a, b) = E[φ'(u)φ'(v)],  (u, v) ~ N(0, [[a, k], [k, b]])

    Everything is elementwise, broadcasts over k, a, b, and is differentiable by autograd, where
    ∂values/∂k = slopes. Gradients are finite at k = ±√(ab) and at zero variance: an infinite derivative
    (of the slopes of a kinked φ at k = ±√(ab), of its values at a = 0) is given as 0. Inputs are trusted:
    `check_gram` says whether they are a Gram. The product ab has to be within the range of the dtype.
    """

    @abstractmethod
    def function(self, x: Tensor) -> Tensor:
        """Apply φ itself."""

    @abstractmethod
    def both(
        self, k: Float[Tensor, "*#shape"], a: Float[Tensor, "*#shape"], b: Float[Tensor, "*#shape"]
    ) -> tuple[Tensor, Tensor]:
        """Give the values and the slopes, which share work."""

    def values(
        self, k: Float[Tensor, "*#shape"], a: Float[Tensor, "*#shape"], b: Float[Tensor, "*#shape"]
    ) -> Tensor:
        """Give E[φ(u)φ(v)]."""
        return self.both(k, a, b)[0]

    def slopes(
        self, k: Float[Tensor, "*#shape"], a: Float[Tensor, "*#shape"], b: Float[Tensor, "*#shape"]
    ) -> Tensor:
        """Give E[φ'(u)φ'(v)]."""
        return self.both(k, a, b)[1]

    def variance(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give E[φ(√q z)²], the values on the diagonal."""
        return self.values(q, q, q)

    def gain(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give E[φ'(√q z)²], the slopes on the diagonal."""
        return self.slopes(q, q, q)

    def mean(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give E[φ(√q z)]."""
        return expectation(self.function, q)


def expectation(f: Function, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Give the expectation of an elementwise function of one centred Gaussian of variance q.

    E[f(√q z)],  z ~ N(0, 1)

    Holds: as `gaussian_rule`; differentiable in q, also at q = 0.
    """
    return _Single.apply(q, f)  # pyright: ignore[reportReturnType]


def pair_expectation(
    f: Function,
    g: Function,
    k: Float[Tensor, "*#shape"],
    a: Float[Tensor, "*#shape"],
    b: Float[Tensor, "*#shape"],
) -> Tensor:
    """Give the expectation of a product of elementwise functions of two correlated Gaussians.

    E[f(u) g(v)] = Σ_n f_n(a) g_n(b) cⁿ,  (u, v) ~ N(0, [[a, k], [k, b]]),  c = k/√(ab),
    f_n(q) = E[f(√q z) He_n(z)]/√n!, taken by quadrature; differentiable in k, a, b

    The series takes as many terms as needed to leave out less than 1e-15 of √(E[f²] E[g²]), up to 1024;
    for f = g the rest then goes into one even and one odd power more: k = ±√(ab) stays exact.

    Holds: to about 1e-13 for f, g analytic in a strip about the real axis that is wide against √q/10.
    Source: Mehler 1866 (the expansion in correlated Hermite polynomials).
    """
    return _Pair.apply(k, a, b, f, g)  # pyright: ignore[reportReturnType]


def derivative(f: Function) -> Function:
    """Give the derivative of an elementwise function, by autograd; it can be taken again."""

    def slope(x: Tensor) -> Tensor:
        outer = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            x = x if outer else (x.clone() if x.is_inference() else x.detach()).requires_grad_()
            y = f(x)
            if not y.requires_grad:
                return torch.zeros_like(x)
            (dy,) = torch.autograd.grad(y.sum(), x, create_graph=True, materialize_grads=True)
        return dy if outer else dy.detach()

    return slope


def check_gram(gram: Gram) -> Gram:
    """Return the Gram as it is if it can be one.

    left ≥ 0, right ≥ 0, |cross_ij| ≤ √(left_i right_j), and cross ⪰ 0 for one set of rows, up to rounding

    Raises: InputError for NaN or infinity, negative norms, correlations beyond ±1, a negative eigenvalue.
    """
    cross, left, right = gram.cross, gram.left, gram.right
    if not all(part.isfinite().all() for part in (cross, left, right)):
        raise InputError("a Gram has to be finite, but this one holds NaN or infinity")
    lowest = min(float(side.min()) if side.numel() else 0.0 for side in (left, right))
    if lowest < 0:
        raise InputError(f"squared norms have to be at least 0, but this Gram has {lowest:.6g}")
    slack = torch.finfo(cross.dtype).eps ** (2 / 3)
    bound = left.sqrt()[..., :, None] * right.sqrt()[..., None, :]
    if (cross.abs() > bound * (1 + slack)).any():
        worst = (cross.abs() / bound).max()
        raise InputError(f"correlations have to lie within [-1, 1], but this Gram has one of ±{worst:.9g}")
    if _one_set(gram) and cross.numel():
        values = torch.linalg.eigvalsh(cross)
        if (values[..., 0] < -slack * cross.shape[-1] * left.amax(-1)).any():
            lowest = float(values[..., 0].min())
            raise InputError(
                f"the Gram of one set of rows has no negative eigenvalue, but this has {lowest:.6g}"
            )
    return gram


def blocked(
    compute: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    k: Tensor,
    a: Tensor,
    b: Tensor,
    size: int = BLOCK,
) -> tuple[Tensor, ...]:
    """Compute elementwise results block by block where nothing is to be differentiated.

    Every temporary of a block then stays in the cache instead of going through memory.
    """
    shape = torch.broadcast_shapes(k.shape, a.shape, b.shape)
    if math.prod(shape) <= size or needs_grad(k, a, b):
        return compute(k, a, b)
    axis = next(i for i, size in enumerate(shape) if size > 1) - len(shape)
    step = max(1, size * shape[axis] // math.prod(shape))
    results: list[Tensor] = []
    for start in range(0, shape[axis], step):
        length = min(step, shape[axis] - start)
        block = (_narrow(x, axis, start, length) for x in (k, a, b))
        parts = blocked(compute, *block, size=size)
        results = results or [part.new_empty(shape) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result.narrow(axis, start, length).copy_(part)
    return tuple(results)


def needs_grad(*tensors: Tensor) -> bool:
    """Say whether autograd follows what is done with one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _narrow(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    return x if x.dim() < -axis or x.shape[axis] == 1 else x.narrow(axis, start, length)


def _one_set(gram: Gram) -> bool:
    if gram.left is gram.right:
        return True
    same = gram.left.shape == gram.right.shape and bool((gram.left == gram.right).all())
    return same and bool((gram.cross.diagonal(dim1=-2, dim2=-1) == gram.left).all())


class _Single(torch.autograd.Function):
    """E[f(√q z)] with ∂/∂q = E[u f'(u)]/(2q), u = √q z, which is ½ f''(0) at q = 0."""

    @staticmethod
    def forward(ctx, q: Tensor, f: Function) -> Tensor:
        ctx.save_for_backward(q)
        ctx.f = f
        nodes, weights = _signed_rule(512, q.device)
        parts = q.double().sqrt().flatten()[:, None].split(TABLE)
        means = [f(part * nodes) @ weights for part in parts]
        return torch.cat(means).view_as(q).to(q.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (q,), slope = ctx.saved_tensors, derivative(ctx.f)
        positive = q > 0
        change = expectation(lambda x: x * slope(x), q) / (2 * torch.where(positive, q, 1))
        if not positive.all():
            change = torch.where(positive, change, 0.5 * expectation(derivative(slope), q))
        return grads[0] * change, None


class _Pair(torch.autograd.Function):
    """E[f(u)g(v)] with ∂/∂k = E[f'g'] and ∂/∂a = (E[u f' g] − k E[f'g'])/(2a), ½ E[f''g] at a = 0.

    This form needs no f'', which autograd would get wrong at a kink.
    """

    @staticmethod
    def forward(ctx, k: Tensor, a: Tensor, b: Tensor, f: Function, g: Function) -> Tensor:
        ctx.save_for_backward(k, a, b)
        ctx.functions = f, g
        wide = [x.double() for x in (k, a, b)]
        if max(a.numel(), b.numel()) > TABLE:
            return blocked(lambda *kab: (_series(f, g, *kab),), *wide, size=TABLE)[0].to(k.dtype)
        return _series(f, g, *wide).to(k.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        k, a, b = ctx.saved_tensors
        f, g = ctx.functions
        df = derivative(f)
        dg = df if g is f else derivative(g)
        slopes = pair_expectation(df, dg, k, a, b)
        by_k = (grads[0] * slopes).sum_to_size(k.shape) if ctx.needs_input_grad[0] else None
        by_a = by_b = None
        if ctx.needs_input_grad[1]:
            by_a = (grads[0] * _by_variance(df, g, slopes, k, a, b)).sum_to_size(a.shape)
        if ctx.needs_input_grad[2]:
            by_b = (grads[0] * _by_variance(dg, f, slopes, k, b, a)).sum_to_size(b.shape)
        return by_k, by_a, by_b, None, None


def _by_variance(df: Function, g: Function, slopes: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    positive = a > 0
    stretched = pair_expectation(lambda x: x * df(x), g, k, a, b)
    change = (stretched - k * slopes) / (2 * torch.where(positive, a, 1))
    if positive.all():
        return change
    return torch.where(positive, change, 0.5 * pair_expectation(derivative(df), g, k, a, b))


def _series(f: Function, g: Function, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sum Σ_n f_n(a) g_n(b) cⁿ."""
    left, right = _coefficients(f, g, a, b)
    c = (k / (a * b).sqrt().clamp(min=torch.finfo(k.dtype).tiny)).clamp(-1, 1)
    terms = left.shape[-1]
    if math.prod(torch.broadcast_shapes(k.shape, a.shape, b.shape)) * terms <= BLOCK:
        powers = c[..., None] ** torch.arange(terms, dtype=c.dtype, device=c.device)
        return (left * right * powers).sum(-1)
    left, right = left.movedim(-1, 0).contiguous(), right.movedim(-1, 0).contiguous()
    total = left[-1] * right[-1] + torch.zeros_like(c)
    for n in range(terms - 2, -1, -1):
        total.mul_(c).addcmul_(left[n], right[n])
    return total


def _coefficients(f: Function, g: Function, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give the Hermite coefficients of f(√a z) and g(√b z) along a new last axis, as many as count."""
    one = f is g and a is b
    *coarse, finest = RESOLUTIONS
    for terms, order in coarse:
        left = _project(f, a, terms, order)
        right = left if one else _project(g, b, terms, order)
        needed = int((_left_out(*left) * _left_out(*right) > NEGLIGIBLE**2).sum())
        if needed < 0.9 * terms:
            return left[0][..., : max(needed, 1)], right[0][..., : max(needed, 1)]
    left, right = _project(f, a, *finest), _project(g, b, *finest)
    return (_completed(*left), _completed(*right)) if f is g else (left[0], right[0])


def _left_out(found: Tensor, seen: Tensor, weights: Tensor) -> Tensor:
    """Give the largest share of E[f²] that all coefficients from the n-th on hold."""
    rest = found.square().flip(-1).cumsum(-1).flip(-1)
    whole = (seen.square() @ weights)[..., None].clamp(min=torch.finfo(rest.dtype).tiny)
    return (rest / whole).reshape(-1, found.shape[-1]).amax(0)


def _completed(found: Tensor, seen: Tensor, weights: Tensor) -> Tensor:
    """Append what the coefficients leave out of E[f²], its even and its odd part."""
    mirrored = seen.flip(-1)
    rest = [
        (part.square() @ weights - found[..., parity::2].square().sum(-1)).clamp(min=0).sqrt()
        for parity, part in enumerate(((seen + mirrored) / 2, (seen - mirrored) / 2))
    ]
    return torch.cat((found, torch.stack(rest, -1)), -1)


def _project(f: Function, q: Tensor, terms: int, order: int) -> tuple[Tensor, Tensor, Tensor]:
    nodes, weights = _signed_rule(order, q.device)
    seen = f(q.sqrt()[..., None] * nodes)
    return seen @ _basis(terms, order, q.device).mT, seen, weights


@lru_cache
@torch.inference_mode(False)
def _basis(terms: int, order: int, device: torch.device) -> Tensor:
    """Rows w(z) He_n(z)/√n! on the nodes of `gaussian_rule`; the Gaussian is split so that rows stay O(1)."""
    nodes, weights = _signed_rule(order, device)
    half = (-nodes.square() / 4).exp()
    rows = [half, nodes * half]
    for n in range(1, terms - 1):
        rows.append((nodes * rows[n] - math.sqrt(n) * rows[n - 1]) / math.sqrt(n + 1))
    return torch.stack(rows[:terms]) * (weights / half)


@lru_cache
@torch.inference_mode(False)
def _signed_rule(order: int, device: torch.device) -> tuple[Tensor, Tensor]:
    nodes, weights = (x.to(device) for x in _gauss("legendre", order))
    nodes = (nodes + 1) * REACH / 2
    weights = weights * REACH * (-nodes.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.cat((-nodes.flip(0), nodes)), torch.cat((weights.flip(0), weights))


@lru_cache
@torch.inference_mode(False)
def _gauss(family: str, order: int) -> tuple[Tensor, Tensor]:
    """Gauss rule of the symmetric probability weight whose orthonormal polynomials have β_k below."""
    if order < 1:
        raise InputError(f"the order of a Gauss rule has to be at least 1, not {order}")
    k = torch.arange(1, order + 1, dtype=torch.float64)
    beta = k.sqrt() if family == "hermite" else k / (4 * k.square() - 1).sqrt()
    nodes = torch.linalg.eigvalsh(beta[:-1].diag(1) + beta[:-1].diag(-1))
    nodes = nodes - _polynomials(nodes, beta.tolist())[0]
    nodes = (nodes - nodes.flip(0)) / 2
    weights = _polynomials(nodes, beta.tolist())[1]
    return nodes, weights / weights.sum()


def _polynomials(x: Tensor, beta: list[float]) -> tuple[Tensor, Tensor]:
    """Newton's step p_n/p_n' and the weights 1/Σ_{k<n} p_k², where p_k β_k = x p_{k−1} − β_{k−1} p_{k−2}.

    All are scaled down together before they overflow, as the weights of far nodes underflow.
    """
    now, before = torch.ones_like(x), torch.zeros_like(x)
    slope, slope_before = torch.zeros_like(x), torch.zeros_like(x)
    total, power = torch.ones_like(x), torch.zeros_like(x)
    last = 0.0
    for index, b in enumerate(beta):
        following = (x * now - last * before) / b
        slope_following = (now + x * slope - last * slope_before) / b
        now, before, slope, slope_before, last = following, now, slope_following, slope, b
        if index < len(beta) - 1:
            total = total + now.square()
        down = torch.where(total > 1e100, 1e-50, torch.ones_like(total))
        now, before, slope, slope_before = now * down, before * down, slope * down, slope_before * down
        total, power = total * down.square(), power - down.log()
    return now / slope, (-2 * power).exp() / total
