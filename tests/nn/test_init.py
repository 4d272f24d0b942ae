import pytest
import torch
from torch import nn

from gramian.errors import InputError
from gramian.nn.init import ScaledOrthogonal, ZeroLinear, initialise_


@pytest.mark.parametrize(("wide", "out"), [(24, 96), (24, 24), (96, 24)])
def test_a_scaled_orthogonal_map_keeps_the_mean_square(wide, out) -> None:
    linear = initialise_(ScaledOrthogonal(wide, out).double(), 0)
    gram = linear.weight.T @ linear.weight if out >= wide else linear.weight @ linear.weight.T
    scale = max(out / wide, 1.0)
    expected = scale * torch.eye(min(wide, out), dtype=torch.float64)
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-10)
    x = torch.randn(500, wide, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio = linear(x).square().mean(1) / x.square().mean(1)
    if out >= wide:
        torch.testing.assert_close(ratio, torch.ones_like(ratio))
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    plain = initialise_(nn.Linear(wide, out, bias=False).double(), 0)  # control: not orthogonal
    gram = plain.weight.T @ plain.weight if out >= wide else plain.weight @ plain.weight.T
    assert (gram - gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)).abs().max() > 1e-3
    with_bias = initialise_(ScaledOrthogonal(wide, out, bias=True), 0)
    assert (with_bias.bias == 0).all()
    assert not torch.equal(initialise_(ScaledOrthogonal(wide, out), 1).weight, with_bias.weight)


def test_a_zero_map_learns() -> None:
    linear = initialise_(ZeroLinear(4, 6), 0)
    x = torch.ones(2, 4)
    assert (linear(x) == 0).all()
    linear(x).sum().backward()
    assert (linear.weight.grad == 2).all()


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="positive numbers of features, got 0, 3"):
        ScaledOrthogonal(0, 3)
