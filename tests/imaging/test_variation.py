"""Total variation: its gradient, its proximal map, and two solvers that have to agree."""

import math

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.iterative import largest_eigenvalue
from gramian.imaging.variation import (
    denoised,
    fista_tv,
    gradient,
    gradient_adjoint,
    pdhg_tv,
    total_variation,
)
from imaging.dense import Dense, error, generator, noisy

F64 = torch.float64


def test_gradient_and_its_adjoint() -> None:
    x = torch.rand(2, 5, 7, generator=generator(), dtype=F64)
    q = torch.rand(2, 2, 5, 7, generator=generator(1), dtype=F64)
    one, other = (gradient(x) * q).sum(), (x * gradient_adjoint(q)).sum()
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
    assert not torch.allclose(one, (x * gradient_adjoint(q.flip(1))).sum(), rtol=1e-3)  # control
    basis = torch.eye(25, dtype=F64).view(25, 5, 5)
    norm = float(torch.linalg.matrix_norm(gradient(basis).flatten(1), 2)) ** 2
    assert 7 < norm < 8


def test_total_variation_of_a_corner() -> None:
    image = torch.zeros(4, 4, dtype=F64)
    image[2:, 2:] = 3.0
    assert float(total_variation(image, isotropic=False)) == pytest.approx(12)
    assert float(total_variation(image)) == pytest.approx(12)
    image[:2, :2] = 3.0
    assert float(total_variation(image)) == pytest.approx(6 * 3 + 3 * math.sqrt(2))


def slow_dual(image: Tensor, weight: float) -> Tensor:
    """The anisotropic proximal map by SciPy: min ½‖b − w ∇ᵀq‖² over |q| ≤ 1."""
    basis = torch.eye(2 * image.numel(), dtype=F64).view(-1, 2, *image.shape)
    matrix = weight * gradient_adjoint(basis).flatten(1).numpy().T
    target = image.flatten().numpy()

    def value(q: object) -> tuple[float, object]:
        residual = matrix @ q - target
        return 0.5 * residual @ residual, matrix.T @ residual

    options = {"maxiter": 10_000, "ftol": 1e-15, "gtol": 1e-10}
    done = minimize(value, 0 * matrix[0], jac=True, bounds=[(-1, 1)] * len(basis), options=options)
    return image - torch.from_numpy(matrix @ done.x).view_as(image)


@pytest.mark.parametrize("weight", [0.02, 0.1, 5.0])
def test_denoising_equals_a_slow_solver(weight: float) -> None:
    image = torch.rand(5, 6, generator=generator(3), dtype=F64)
    found = denoised(image, weight, 2000, isotropic=False)
    torch.testing.assert_close(found, slow_dual(image, weight), rtol=0, atol=2e-6)
    if weight == 5.0:  # nothing but the mean is left
        torch.testing.assert_close(found, image.mean().expand_as(image), rtol=0, atol=1e-6)
    elsewhere = denoised(image, 1.2 * weight, 1000, isotropic=False)
    assert weight == 5.0 or float((elsewhere - found).abs().max()) > 1e-3  # control


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("box", [(None, None), (0.3, 0.7)])
def test_denoised_images_are_minima(isotropic: bool, box: tuple[float | None, float | None]) -> None:
    """No neighbour is better, and the objective is convex."""
    image, weight = torch.rand(6, 6, generator=generator(4), dtype=F64), 0.1
    found = denoised(image, weight, 1000, isotropic=isotropic, box=box)

    def objective(x: Tensor) -> float:
        return float(0.5 * (x - image).square().sum() + weight * total_variation(x, isotropic))

    least = objective(found)
    for seed in range(30):
        step = torch.randn(6, 6, generator=generator(seed), dtype=F64)
        for size in (1e-3, 1e-1):
            near = (found + size * step).clamp(*box) if box != (None, None) else found + size * step
            assert objective(near) > least - 1e-9
    other = denoised(image, weight, 1000, isotropic=not isotropic, box=box)
    assert objective(other) > least + 1e-6  # control


@pytest.mark.parametrize(("isotropic", "box"), [(True, (0.0, None)), (False, (0.35, 0.6))])
def test_both_solvers_reach_the_same_minimum(isotropic: bool, box: tuple[float | None, float | None]) -> None:
    projector, weight = Dense(), 0.2
    _, y = noisy(projector)

    def objective(x: Tensor) -> float:
        data = 0.5 * (projector.A(x) - y).square().sum()
        return float(data + weight * total_variation(x, isotropic))

    chosen = {"isotropic": isotropic, "box": box}
    first = fista_tv(projector, y, weight, 200, inner=20, **chosen)
    second = pdhg_tv(projector, y, weight, 2000, ratio=1.0, **chosen)
    assert objective(first) == pytest.approx(objective(second), rel=1e-6)
    # Optimality: a proximal gradient step from the minimum stays there.
    size = 0.5 / largest_eigenvalue(projector, first)

    def moved(x: Tensor) -> float:
        descended = x - size * projector.A_adjoint(projector.A(x) - y)
        return float((denoised(descended, size * weight, 600, **chosen) - x).abs().max())

    assert moved(first) < 2e-5
    assert moved(second) < 2e-5
    assert moved(fista_tv(projector, y, 0.8 * weight, 100, inner=30, **chosen)) > 1e-4  # control


def test_the_weight_scales_with_the_square_of_the_data() -> None:
    projector, scaled = Dense(), Dense()
    scaled.matrix = 0.1 * projector.matrix
    _, y = noisy(projector)
    for method in (fista_tv, pdhg_tv):
        one, other = method(projector, y, 0.3, 50), method(scaled, 0.1 * y, 0.003, 50)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(method(scaled, 0.1 * y, 0.3, 50), one, rtol=1e-2)  # control


@pytest.mark.parametrize(("method", "steps"), [(fista_tv, 300), (pdhg_tv, 1000)])
def test_rays_count_as_much_as_their_precision(method, steps: int) -> None:
    """As if rows of the map and measurements were multiplied by its square root; several sets at once."""
    projector, scaled = Dense(), Dense()
    _, y = noisy(projector)
    given = 3 * torch.rand(2, *y.shape, generator=generator(5), dtype=F64)
    given[0, 1::2] = 0  # views that are left out
    found = method(projector, y.expand(2, *y.shape), 0.2, steps, precision=given)
    for each, precision in zip(found, given, strict=True):
        root = precision.sqrt()
        scaled.matrix = root.reshape(-1, 1) * projector.matrix
        wanted = method(scaled, root * y, 0.2, steps)
        torch.testing.assert_close(each, wanted, rtol=0, atol=5e-4)
    wrong = torch.stack((torch.where(given[0] == 0, 100 * y, y), y))
    torch.testing.assert_close(method(projector, wrong, 0.2, steps, precision=given), found)
    assert float((found[0] - method(projector, y, 0.2, steps)).abs().max()) > 0.05  # control
    even = method(projector, y, 0.2, 20, precision=torch.ones(()))
    torch.testing.assert_close(even, method(projector, y, 0.2, 20))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("method", [fista_tv, pdhg_tv])
def test_a_precision_that_weighs_no_ray_is_refused(method, value: float) -> None:
    y = torch.ones(5, 6, dtype=F64)
    for wrong in (torch.full((5, 6), value), torch.ones(4)):
        with pytest.raises(InputError, match=r"precision of rays has to be at least 0.* of \(5, 6\)"):
            method(Dense(), y, 1.0, precision=wrong)


def test_without_weight_the_problem_is_least_squares() -> None:
    projector = Dense(blind=False)
    truth, _ = noisy(projector)
    exact = projector.A(truth)
    assert error(fista_tv(projector, exact, 0.0, 2000), truth) < 1e-3
    assert error(pdhg_tv(projector, exact, 0.0, 4000, ratio=1.0), truth) < 1e-2


def test_an_empty_projector_is_refused() -> None:
    projector = Dense()
    projector.matrix = 0 * projector.matrix
    with pytest.raises(InputError, match="no ray"):
        fista_tv(projector, torch.ones(5, 6, dtype=F64), 1.0)
