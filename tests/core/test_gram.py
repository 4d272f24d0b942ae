import pytest
import torch

from gramian.core.gram import Gram, gram


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_holds_inner_products_and_squared_norms():
    x, y = rows(2, 3, 5), rows(2, 4, 5, seed=1)
    g = gram(x, y)
    for b in range(2):
        for i in range(3):
            assert g.left[b, i].item() == pytest.approx(float(x[b, i] @ x[b, i]), rel=1e-12)
            for j in range(4):
                assert g.cross[b, i, j].item() == pytest.approx(float(x[b, i] @ y[b, j]), rel=1e-12)
                assert g.right[b, j].item() == pytest.approx(float(y[b, j] @ y[b, j]), rel=1e-12)


def test_norms_of_one_set_are_the_diagonal_itself():
    g = gram(rows(3, 7, 5))
    assert torch.equal(g.left, g.cross.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(g.right, g.left)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float64(dtype: torch.dtype):
    x = rows(6, 300, dtype=dtype)
    g = gram(x)
    torch.testing.assert_close(g.cross, x.double() @ x.double().T, rtol=1e-12, atol=1e-12)
    assert not torch.allclose((x @ x.T).double(), g.cross, rtol=1e-5)  # control: the half product is off


def test_single_precision_stays():
    assert gram(rows(2, 3, dtype=torch.float32)).cross.dtype == torch.float32


def test_is_immutable():
    g = gram(rows(2, 3))
    with pytest.raises(AttributeError):
        g.cross = g.left  # pyright: ignore
    assert list(vars(g)) == ["cross", "left", "right"]
    assert isinstance(g, Gram)


def test_is_differentiable():
    x = rows(3, 2).requires_grad_()
    gram(x).cross.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().sum(0).expand(3, 2))
