"""The loss of a fitted field: against the reference, its gradient, and its parts one by one."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import affine_grid, grid_sample, pad

from gramian.errors import InputError
from gramian.imaging.objective import (
    PENALTIES,
    ProjectionLoss,
    absolute_variation,
    data_loss,
    huber_variation,
    squared_variation,
)
from gramian.imaging.variation import total_variation
from reference import cases, load

F64 = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


class Rotation:
    """The reference's projector: turn by bilinear interpolation, then take the mean over rows.

    Samples that are partly outside count by that share twice, which its gradients show at the border.
    """

    def __init__(self, views: int, sign: int = 1) -> None:
        self.angles = [sign * v * math.pi / views for v in range(views)]

    def A(self, x: Tensor) -> Tensor:  # noqa: N802
        rows = []
        for angle in self.angles:
            cos, sin = math.cos(angle), math.sin(angle)
            turn = torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]], dtype=x.dtype)
            grid = affine_grid(turn, [1, 1, *x.shape], align_corners=False)
            both = torch.stack((x, torch.ones_like(x)))[None]
            turned, share = grid_sample(both, grid, align_corners=False)[0]
            rows.append((turned * share).mean(0))
        return torch.stack(rows)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["no_regulariser", "iso_tv", "aniso_tv"])
@pytest.mark.parametrize("path", cases("tomography"))
def test_loss_equals_the_reference(path: Path, name: str) -> None:
    case = load(path)
    if f"grad_{name}" not in case.arrays:
        pytest.skip("no loss in this case")
    arrays, config, scalars = case.arrays, case.spec["config"], case.spec["scalars"]
    penalty = squared_variation if name == "iso_tv" else absolute_variation
    loss = ProjectionLoss(
        Rotation(config["n_views"]),
        arrays["sinogram_truth"] + arrays["noise"],
        scalars["noise_std"],
        0.0 if name == "no_regulariser" else config["regulariser_coefficient"],
        penalty,
        eps=config["eps"],
    )
    x = arrays["prediction"].clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert float(value.detach()) == pytest.approx(scalars[f"loss_{name}"], rel=1e-9)
    torch.testing.assert_close(x.grad, arrays[f"grad_{name}"], **CLOSE)
    if name != "no_regulariser":
        assert float(penalty(arrays["prediction"])) == pytest.approx(scalars[name], rel=1e-9)
    torch.testing.assert_close(loss.projector.A(arrays["truth"]), arrays["sinogram_truth"], **CLOSE)
    turned = ProjectionLoss(Rotation(config["n_views"], -1), loss.sinogram, loss.std)  # control
    assert float(turned(arrays["prediction"])) != pytest.approx(scalars["loss_no_regulariser"], rel=1e-3)


def test_data_loss_is_a_likelihood() -> None:
    residual, std = images(2, 5, 7) - 0.5, 0.3
    expected = -Normal(torch.zeros((), dtype=F64), std).log_prob(residual).mean((-2, -1))
    torch.testing.assert_close(data_loss(residual, std, 0.0), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(data_loss(residual, std, 1e-3), expected, rtol=1e-4)  # control: ε counts
    assert float(data_loss(torch.zeros(2, 2, dtype=F64), 0.0, 1e-9)) == pytest.approx(
        0.5 * math.log(2 * math.pi * 1e-9) + 0.5
    )


def test_single_precision_keeps_the_loss() -> None:
    """ε is far below the smallest difference of float32 at 1, not at the size of squared residuals."""
    residual = 1e-3 * (images(60, 90) - 0.5)
    exact = float(data_loss(residual, 1.4e-3))
    assert float(data_loss(residual.float(), 1.4e-3)) == pytest.approx(exact, rel=1e-5)


def test_penalties_of_a_step() -> None:
    image = torch.zeros(4, 5, dtype=F64)
    image[:, 3:] = -3.0
    assert float(absolute_variation(image)) == pytest.approx(4 * 3 / 5)
    assert float(squared_variation(image)) == pytest.approx(4 * 9 / 5)
    assert float(huber_variation(image)) == pytest.approx(4 * (3 - 0.5) / 5)
    assert float(huber_variation(image, 4.0)) == pytest.approx(4 * 4.5 / 5)
    assert float(huber_variation(image)) != pytest.approx(
        4 * (9 - 0.5) / 5
    )  # control: square and line mixed up
    sample = images(6, 6)
    assert float(absolute_variation(sample)) == pytest.approx(float(total_variation(sample, False)) / 6)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_have_their_gradient_and_batch(name: str) -> None:
    penalty, x = PENALTIES[name], images(2, 3, 6, 6)
    assert torch.autograd.gradcheck(penalty, x[0, 0].clone().requires_grad_())
    one_by_one = torch.stack([penalty(image) for image in x.flatten(0, 1)]).view(2, 3)
    torch.testing.assert_close(penalty(x), one_by_one, rtol=1e-12, atol=0)
    assert float(penalty(torch.ones(5, 5, dtype=F64))) == 0
    torch.testing.assert_close(penalty(x.mT), penalty(x), rtol=1e-12, atol=0)  # square images


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("padding", [0, 1, 5])
def test_padding_is_that_of_the_whole_border(name: str, padding: int) -> None:
    x, penalty = images(8, 8), PENALTIES[name]
    loss = ProjectionLoss(Rotation(3), torch.zeros(3, 8, dtype=F64), 0.1, 0.5, penalty, pad=padding)
    expected = penalty(pad(x, (padding,) * 4))
    assert float(loss.roughness(x)) == pytest.approx(float(expected), rel=1e-12)
    if padding:
        assert float(loss.roughness(x)) != pytest.approx(float(penalty(x)) * 8 / (8 + 2 * padding), rel=1e-3)
    assert float(loss(x)) == pytest.approx(float(loss.data(x) + 0.5 * expected), rel=1e-12)


def test_weight_of_the_sum_of_squares_form() -> None:
    """The gradients of both forms are proportional, by the stated λ' and no other."""
    x, sinogram = images(8, 8).requires_grad_(), images(3, 8, seed=1)
    loss = ProjectionLoss(Rotation(3), sinogram, 0.1, 0.5)
    (fitted,) = torch.autograd.grad(loss(x), x)

    def squares(weight: float) -> Tensor:
        data = 0.5 * (loss.projector.A(x) - sinogram).square().sum()
        return torch.autograd.grad(data + weight * total_variation(x, isotropic=False), x)[0]

    scale = (loss.std**2 + loss.eps) * sinogram.numel()
    torch.testing.assert_close(squares(loss.variation_weight(8)), scale * fitted, **CLOSE)
    assert not torch.allclose(squares(1.1 * loss.variation_weight(8)), scale * fitted, rtol=1e-3)  # control


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: data_loss(torch.ones(2, 2), 0.0, 0.0), "not both 0"),
        (lambda: data_loss(torch.ones(2, 2), -1.0), "at least 0"),
        (lambda: huber_variation(torch.ones(2, 2), 0.0), "above 0"),
        (lambda: ProjectionLoss(Rotation(2), torch.ones(2, 2), 0.1, -1.0), "weight of a penalty"),
        (lambda: ProjectionLoss(Rotation(2), torch.ones(2, 2), 0.1, math.nan), "weight of a penalty"),
        (lambda: ProjectionLoss(Rotation(2), torch.ones(2, 2), 0.1, pad=-1), "padding"),
    ],
)
def test_bad_input(make: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()  # type: ignore[operator]
