import pytest
import torch
from torch import Tensor

from gramian.core.gram import Gram
from gramian.errors import InputError
from gramian.theory.signal import Signal, signal


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_layouts_by_their_definition():
    """One entry of each layout, by the inner product of the two rows that it is about."""
    x, y = draws(3, 4, 5, 7), draws(2, 4, 5, 7, seed=1)
    same, pairs = signal(x, y, positions="same"), signal(x, y, positions="all")
    assert same.space == pairs.space == (4, 5)
    assert pairs.all_pairs
    assert not same.all_pairs
    one = (x[2, 1, 3] @ y[1, 1, 3]).item() / 7
    assert same.activation.cross[1, 3, 2, 1].item() == pytest.approx(one)
    assert same.activation.left[1, 3, 2].item() == pytest.approx((x[2, 1, 3] @ x[2, 1, 3]).item() / 7)
    p, q = 1 * 5 + 3, 2 * 5 + 4
    other = (x[2, 1, 3] @ y[1, 2, 4]).item() / 7
    assert pairs.activation.cross[2 * 20 + p, 1 * 20 + q].item() == pytest.approx(other)
    assert pairs.activation.right[1 * 20 + q].item() == pytest.approx((y[1, 2, 4] @ y[1, 2, 4]).item() / 7)
    within = (x[2, 1, 3] @ x[2, 2, 4]).item() / 7
    assert pairs.blocks[0][2, p, q].item() == pytest.approx(within)
    assert pairs.blocks[0][2, q, p].item() == pytest.approx(within)
    assert pairs.tangent is not None
    assert not pairs.tangent.any()


def test_blocks_of_one_set_are_those_on_the_diagonal():
    x = draws(3, 6, 2)
    alone, twice = signal(x, positions="all"), signal(x, x.clone(), positions="all")
    assert alone.symmetric
    assert not twice.symmetric
    assert alone.within is None
    torch.testing.assert_close(alone.blocks[0], twice.blocks[0])
    torch.testing.assert_close(alone.blocks[0].diagonal(dim1=1, dim2=2).flatten(), alone.activation.left)


def test_without_positions_leading_dimensions_are_a_batch():
    x, y = draws(2, 3, 4), draws(2, 5, 4, seed=1)
    g = signal(x, y).activation
    assert g.cross.shape == (2, 3, 5)
    torch.testing.assert_close(g.cross[1], x[1] @ y[1].T / 4)


def test_theory_is_in_double_precision_unless_told():
    x = draws(3, 4).float()
    assert signal(x).activation.cross.dtype == torch.float64
    assert signal(torch.arange(6).view(3, 2)).activation.cross.dtype == torch.float64
    assert signal(x, dtype=None).activation.cross.dtype == torch.float32
    assert signal(x, tangent=False).tangent is None


def test_bad_input_is_named():
    x = draws(3, 4)
    with pytest.raises(InputError, match="y holds numbers"):
        signal(x, x / 0)
    with pytest.raises(InputError, match="agree"):
        signal(x, draws(3, 5))
    with pytest.raises(InputError, match="at least one of each"):
        signal(x[:0])
    with pytest.raises(InputError, match="shape"):
        signal(x, positions="all")
    with pytest.raises(InputError, match="none"):
        signal(x, positions="some")
    moments = signal(draws(2, 3, 1), draws(2, 3, 1), positions="all")
    with pytest.raises(InputError, match="signal\\(x, y"):
        _ = Signal(moments.activation, None, (3,)).blocks
    with pytest.raises(InputError, match="signal\\(x, y"):
        _ = Signal(Gram(x, x[:, 0], x[:, 0].clone()[:1].expand(4)), None, ()).blocks
