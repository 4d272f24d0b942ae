"""A linear map with its adjoint: every derivative against the matrix itself, and a wrong adjoint caught."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from gramian.core.linear_map import mapped

F64 = torch.float64
SHAPE, TO = (3, 4), (2, 5)
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


MATRIX = random(12, 10)


def plain(x: Tensor, matrix: Tensor = MATRIX) -> Tensor:
    """The map of (…, 3, 4) to (…, 2, 5) in operations of torch."""
    return (x.flatten(-2) @ matrix).unflatten(-1, TO)


def forth(x: Tensor) -> Tensor:
    """The same, hidden from autograd."""
    return torch.from_numpy(plain(x.detach()).numpy())


def back(y: Tensor, matrix: Tensor = MATRIX) -> Tensor:
    """The adjoint, hidden too."""
    return torch.from_numpy((y.detach().flatten(-2) @ matrix.mT).numpy()).unflatten(-1, SHAPE)


def ours(x: Tensor) -> Tensor:
    return mapped(x, forth, back)


def bent(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The map inside a function that has derivatives of every order."""
    return lambda x: (f(x.sin()) * f(x.cos())).exp().sum((-2, -1))


@given(batch=st.lists(st.integers(0, 3), max_size=3), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_adjoint_is_that_of_the_map_whatever_the_batch(batch: list[int], seed: int) -> None:
    x, y = random(*batch, *SHAPE, seed=seed).requires_grad_(), random(*batch, *TO, seed=seed + 1)
    found = ours(x)
    torch.testing.assert_close(found, plain(x))
    (pulled,) = torch.autograd.grad((found * y).sum(), x)
    torch.testing.assert_close((found * y).sum(), (x * pulled).sum())
    torch.testing.assert_close(pulled, back(y))


@forward_mode
def test_it_passes_every_check_of_autograd_and_a_wrong_adjoint_does_not() -> None:
    x = random(2, *SHAPE).requires_grad_()
    assert torch.autograd.gradcheck(ours, x, check_forward_ad=True)
    assert torch.autograd.gradcheck(bent(ours), 0.3 * x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, x, check_fwd_over_rev=True, check_rev_over_rev=True)
    assert torch.autograd.gradgradcheck(bent(ours), 0.3 * x, check_fwd_over_rev=True)
    for wrong in (lambda y: back(y, MATRIX.roll(1, 1)), lambda y: 1.01 * back(y)):
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(lambda t, wrong=wrong: mapped(t, forth, wrong), x)


@forward_mode
def test_derivatives_over_derivatives_are_those_of_the_matrix() -> None:
    x, along = 0.3 * random(*SHAPE), random(*SHAPE, seed=1)

    def slope(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: jvp(f, (t,), (along,))[1]

    for transform in (
        grad,
        hessian,
        slope,
        lambda f: slope(slope(f)),
        lambda f: grad(slope(f)),
        lambda f: slope(grad(f)),
        lambda f: jacrev(lambda t: grad(lambda u: (grad(f)(u) * along).sum())(t)),
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacrev(jacrev(f)),
    ):
        torch.testing.assert_close(transform(bent(ours))(x), transform(bent(plain))(x))
    pulled = vjp(ours, x)[1](random(*TO))
    torch.testing.assert_close(pulled, vjp(plain, x)[1](random(*TO)))


@forward_mode
@pytest.mark.parametrize(("axis", "to"), [(0, 0), (1, 2), (2, -1), (-1, 1)])
def test_vmap_over_any_axis(axis: int, to: int) -> None:
    many = random(*SHAPE).unsqueeze(axis) * torch.arange(1, 4, dtype=F64).reshape(
        [3 if place == axis % 3 else 1 for place in range(3)]
    )
    for f in (ours, grad(bent(ours)), lambda t: jvp(bent(ours), (t,), (t,))[1][None, None]):
        wanted = torch.stack([f(one) for one in many.unbind(axis)]).movedim(0, to)
        torch.testing.assert_close(vmap(f, in_dims=axis, out_dims=to)(many), wanted)
    pairs = random(4, *SHAPE[:1], 2, *SHAPE[1:])
    nested = vmap(vmap(ours, in_dims=1))(pairs)
    torch.testing.assert_close(nested, plain(pairs.movedim(2, 1)))


def test_one_call_makes_a_batch_of_derivatives() -> None:
    calls: list[torch.Size] = []

    def watched(y: Tensor) -> Tensor:
        calls.append(y.shape)
        return back(y)

    found = jacrev(lambda t: mapped(t, forth, watched))(random(*SHAPE))
    torch.testing.assert_close(found, jacrev(plain)(random(*SHAPE)))
    assert calls == [(10, *TO)]


def test_no_graph_is_kept_where_nothing_is_differentiated() -> None:
    assert ours(random(*SHAPE)).grad_fn is None
    with torch.no_grad():
        assert not ours(random(*SHAPE).requires_grad_()).requires_grad
