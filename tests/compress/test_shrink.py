import pytest
import torch
from torch import Tensor, nn

from gramian.compress.masks import add_masks, keep, masks_of, set_mode
from gramian.compress.shrink import shrink
from gramian.compress.structures import Rows
from gramian.errors import InputError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def initialised(*modules: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*modules).double()
    for k, value in enumerate(model.parameters()):
        nn.init.normal_(value, generator=seeded(k))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(generator=seeded(9))
            module.running_var.uniform_(0.5, 2, generator=seeded(8))
    return model.eval()


def mlp(bias: bool = True) -> nn.Sequential:
    return initialised(
        nn.Flatten(),
        nn.Linear(6, 10, bias=bias),
        nn.BatchNorm1d(10),
        nn.Sigmoid(),
        nn.Sequential(nn.Linear(10, 8, bias=bias), nn.ReLU(), nn.Dropout()),
        nn.Linear(8, 3, bias=bias),
    )


def cnn(padding: int = 0) -> nn.Sequential:
    return initialised(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 2, padding=padding),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def widths(model: nn.Sequential) -> list[int]:
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_shrunk_mlp_has_equal_outputs(bias):
    model, x = mlp(bias), rows(7, 2, 3)
    model[1].weight.data[[1, 4, 5]] = 0  # constant features
    model[4][0].weight.data[:, [2, 9]] = 0  # unused features
    model[4][0].weight.data[3] = 0
    small = shrink(model)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert widths(small) == [5, 7, 3]
    assert widths(model) == [10, 8, 3]
    assert small[1].out_features == small[2].num_features == small[4][0].in_features == 5
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        small[4][0].bias.zero_()
    assert not torch.allclose(small(x), model(x))  # control: what constant features carry counts


@pytest.mark.parametrize("padding", [0, 1])
def test_a_shrunk_cnn_has_equal_outputs(padding):
    model, x = cnn(padding), rows(3, 2, 8, 8) if padding == 0 else rows(3, 2, 6, 6)
    model[0].weight.data[[0, 3]] = 0
    model[1].bias.data[0] = -100  # the constant of channel 0 is 0 after the ReLU, that of channel 3 is not
    model[1].bias.data[3] = 100
    model[4].weight.data[[2, 7]] = 0
    small = shrink(model)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)
    assert widths(small) == [4 if padding == 0 else 5, 6, 4]


def test_removal_goes_on_through_layers():
    model = initialised(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    model[0].weight.data[2] = 0
    model[2].weight.data[1] = 0
    model[2].weight.data[1, 2] = 1.0  # this row reads only a constant
    model[4].weight.data[:, 3] = 0  # and this feature is read by none,
    model[2].weight.data[[0, 2, 4], 4] = 0  # so that feature 4 below is read by none either
    small = shrink(model)
    torch.testing.assert_close(small(rows(6, 4)), model(rows(6, 4)), rtol=1e-12, atol=1e-12)
    assert widths(small) == [3, 3, 2]


def test_masked_rows_shrink_and_masked_weights_do_not():
    model, x = mlp(), rows(7, 6)
    add_masks(model, layers=["1", "4.0"], structure=Rows())
    keep(model, {name: torch.arange(len(mask.kept)) % 2 == 0 for name, mask in masks_of(model).items()})
    small = shrink(model)
    assert widths(small) == [5, 4, 3]
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    set_mode(model, "mean")
    assert widths(shrink(model)) == [10, 8, 3]  # control: nothing is zero


def test_a_layer_keeps_one_feature():
    model = mlp()
    model[1].weight.data.zero_()
    small = shrink(model)
    torch.testing.assert_close(small(rows(3, 6)), model(rows(3, 6)), rtol=1e-12, atol=1e-12)
    assert widths(small)[0] == 1
    assert widths(shrink(small))[0] == 1


def test_refusals():
    with pytest.raises(InputError, match="chain"):
        shrink(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="evaluation"):
        shrink(mlp().train())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"'1' \(LayerNorm\) may mix"):
        shrink(initialised(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
    with pytest.raises(InputError, match="AvgPool1d"):
        shrink(initialised(nn.Conv1d(1, 2, 1), nn.AvgPool1d(3, padding=1), nn.Conv1d(2, 1, 1)))
    with pytest.raises(InputError, match="grouped"):
        shrink(initialised(nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1, groups=2)))
    with pytest.raises(InputError, match="no linear"):
        shrink(initialised(nn.ReLU()))
    shared = nn.Linear(3, 3)
    with pytest.raises(InputError, match="used twice"):
        shrink(initialised(shared, nn.ReLU(), shared))
