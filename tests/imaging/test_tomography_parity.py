"""The projector against sinograms of an independent reference implementation and of scikit-image.

The reference turns the padded image and takes the mean over its rows: the discretisation `rotation`, scaled.
scikit-image turns the other way, and about pixel ⌊P/2⌋: on a grid of one more sample that is its middle.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from gramian.imaging.geometry import ParallelBeam, evenly, padded
from gramian.imaging.phantoms import Ellipse, sinogram
from gramian.imaging.radon import Projector
from reference import Case, cases, load

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def holding(*arrays: str) -> list[Any]:
    """The reference cases that have arrays whose names start so."""
    return [
        case
        for case in cases("tomography")
        if not case.values[0]
        or all(any(name.startswith(start) for name in load(case.values[0]).arrays) for start in arrays)
    ]


def sinograms(case: Case, start: str) -> Iterator[tuple[int, Tensor]]:
    """The number of views and the sinogram of every array that is called `start` and a number of views."""
    for name, array in case.arrays.items():
        if name.startswith(start) and (views := name.removeprefix(start)).isdigit():
            yield int(views), array


def reference_projector(angles: Any, size: int, detectors: int, **options: Any) -> Projector:
    beam = ParallelBeam(angles, size, detectors)
    return Projector(beam, "rotation", scale=1 / detectors, dtype=torch.float64, **options)


def counted_again(image: Tensor, angle: float) -> Tensor:
    """Mean over rows of (m − 1) b: bilinear values b, and m those of an image of ones, 0 outside."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]], dtype=torch.float64)
    both = torch.stack((image, torch.ones_like(image)))[None]
    grid = affine_grid(turn, list(both.shape), align_corners=False)
    b, m = grid_sample(both, grid, align_corners=False)[0]
    return ((m - 1) * b).mean(0)


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("image", "sinogram_reference"))
def test_projection_equals_reference(path: Path) -> None:
    case = load(path)
    config, image = case.spec["config"], case.arrays["image"]
    assert (config["detector_bins"], config["detector_spacing_pixels"]) == (padded(config["size"]), 1)
    for views, expected in sinograms(case, "sinogram_reference_"):
        for symmetry in ("none", "all") if views <= 20 else ("all",):
            projector = reference_projector(
                evenly(views), config["size"], config["detector_bins"], symmetry=symmetry
            )
            torch.testing.assert_close(projector.A(image), expected, **EXACT)
        back = [-angle for angle in evenly(views)]  # control: turned the other way
        other = reference_projector(back, config["size"], config["detector_bins"])
        assert (other.A(image) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("image", "sinogram_reference_unpadded"))
def test_unpadded_projection_equals_reference(path: Path) -> None:
    """The reference counts samples that are partly outside twice over, so that the second count is added."""
    case = load(path)
    image = case.arrays["image"]
    for views, expected in sinograms(case, "sinogram_reference_unpadded_"):
        projector = reference_projector(evenly(views), len(image), len(image))
        again = torch.stack([counted_again(image, angle) for angle in evenly(views)])
        torch.testing.assert_close(projector.A(image) + again, expected, **EXACT)


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("image", "skimage_sinogram"))
def test_projection_equals_scikit_image(path: Path) -> None:
    case = load(path)
    config, image = case.spec["config"], case.arrays["image"]
    bins = config["padded_size"]
    assert bins % 2 == 0
    y, x = torch.meshgrid(*2 * [torch.arange(len(image)) - len(image) / 2], indexing="ij")
    outside = image[torch.hypot(x, y) > bins / 2 - 1.5]  # what the added sample may take
    for views, expected in sinograms(case, "skimage_sinogram_"):
        beam = ParallelBeam(
            [-angle for angle in evenly(views)], config["size"], bins + 1, centre_mm=(0.5, 0.5)
        )
        found = Projector(beam, "rotation", dtype=torch.float64).A(image)[:, :bins]
        same = torch.isclose(found, expected.T, **EXACT)
        assert (~same).double().mean() < 1e-3
        torch.testing.assert_close(found, expected.T, rtol=0, atol=1e-12 + float(outside.max()))
        assert outside.any() or same.all()


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("image", "sinogram_reference"))
@pytest.mark.parametrize("model", ["linear", "area"])
def test_other_discretisations_are_close(path: Path, model: str) -> None:
    """Within what the reference itself is from the sinogram in closed form."""
    case = load(path)
    config, image = case.spec["config"], case.arrays["image"]
    known = [v["relative_l2_difference_reference_vs_analytic"] for v in case.spec["scalars"].values()]
    for views, expected in sinograms(case, "sinogram_reference_"):
        beam = ParallelBeam(evenly(views), config["size"], config["detector_bins"])
        found = Projector(beam, model, dtype=torch.float64, scale=1 / beam.detectors).A(image)
        assert (found - expected).norm() < max([0.01, *known]) * expected.norm()


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("ellipses", "sinogram_analytic"))
def test_closed_form_equals_reference(path: Path) -> None:
    case = load(path)
    config = case.spec["config"]
    half = config["size"] / 2
    ellipses = [
        Ellipse(half * x, half * y, half * a, half * b, phi, rho)
        for x, y, a, b, phi, rho in case.arrays["ellipses"].tolist()
    ]
    for views, expected in sinograms(case, "sinogram_analytic_"):
        bins = config["detector_bins"]
        found = sinogram(ellipses, ParallelBeam(evenly(views), config["size"], bins)) / bins
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parity
@pytest.mark.parametrize("path", holding("truth", "sinogram_truth", "grad_no_regulariser"))
def test_gradient_of_a_loss_equals_reference(path: Path) -> None:
    """½ log 2π(σ² + ε) + mean ½ (d² + ε)/(σ² + ε)."""
    case = load(path)
    config, arrays = case.spec["config"], case.arrays
    size = config["size"] + 2 * config["pad"]
    projector = reference_projector(evenly(config["n_views"]), size, size)
    prediction = arrays["prediction"].clone().requires_grad_()
    again = torch.stack([counted_again(prediction, angle) for angle in evenly(config["n_views"])])
    found = projector.A(prediction) + again  # 0 for this image, unlike its derivative at the border
    assert again.abs().max() < 1e-12
    torch.testing.assert_close(projector.A(arrays["truth"]), arrays["sinogram_truth"], **EXACT)
    torch.testing.assert_close(found, arrays["sinogram_prediction"], **EXACT)
    variance = case.spec["scalars"]["noise_std"] ** 2 + config["eps"]
    d = arrays["sinogram_truth"] + arrays["noise"] - found
    loss = 0.5 * math.log(2 * math.pi * variance) + (0.5 * (d.square() + config["eps"]) / variance).mean()
    assert float(loss.detach()) == pytest.approx(case.spec["scalars"]["loss_no_regulariser"], rel=1e-9)
    loss.backward()
    torch.testing.assert_close(prediction.grad, arrays["grad_no_regulariser"], rtol=1e-9, atol=1e-10)
