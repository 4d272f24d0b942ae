"""The energy of images: against loops, the published loss, its gradient, and what β and borders mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gramian.errors import InputError
from gramian.imaging.energy import SMOOTHING, Energy
from gramian.imaging.geometry import ParallelBeam, evenly
from gramian.imaging.objective import ProjectionLoss, absolute_variation
from gramian.imaging.radon import Projector
from imaging.dense import Dense, generator, noisy

F64 = torch.float64


def problem(seed: int = 2) -> tuple[Dense, Tensor, Tensor]:
    projector = Dense()
    truth, sinogram = noisy(projector, seed=seed)
    return projector, truth, sinogram


def slow(projector: Dense, sinogram: Tensor, std: Tensor, beta: float, image: Tensor) -> float:
    """Ray by ray and pixel by pixel, from the pixels of the border that are not there to those that are."""
    predicted, n = projector.A(image), len(image)
    total = 0.0
    for y, a, s in zip(sinogram.flatten(), predicted.flatten(), std.flatten(), strict=True):
        total += 0.5 * ((float(y) - float(a)) / float(s)) ** 2

    def at(i: int, j: int) -> float:
        return float(image[i, j]) if 0 <= i < n and 0 <= j < n else 0.0

    for i in range(-1, n):
        for j in range(-1, n):
            down, right = at(i + 1, j) - at(i, j), at(i, j + 1) - at(i, j)
            total += beta * (math.sqrt(down**2 + right**2 + SMOOTHING**2) - SMOOTHING)
    return total


@given(seed=st.integers(0, 1000), beta=st.floats(0, 50))
@settings(max_examples=25, deadline=None)
def test_the_energy_is_the_slow_one(seed: int, beta: float) -> None:
    projector, image, sinogram = problem(seed)
    std = 0.05 + torch.rand(sinogram.shape, generator=generator(seed), dtype=F64)
    energy = Energy(projector, sinogram, std, beta)
    assert float(energy(image)) == pytest.approx(slow(projector, sinogram, std, beta, image), rel=1e-12)
    misfit = float(energy.misfit(image))
    assert float(energy(image)) == pytest.approx(0.5 * misfit + beta * float(energy.roughness(image)))


def test_batches_and_one_std_for_all_rays() -> None:
    projector, _, sinogram = problem()
    images = torch.rand(2, 3, 4, 4, generator=generator(), dtype=F64)
    energy = Energy(projector, sinogram, 0.2, 3.0)
    one_by_one = torch.stack([energy(image) for image in images.flatten(0, 1)]).view(2, 3)
    torch.testing.assert_close(energy(images), one_by_one)
    every = Energy(projector, sinogram, torch.full_like(sinogram, 0.2), 3.0)
    torch.testing.assert_close(every(images), energy(images))
    stds = torch.linspace(0.1, 1.0, sinogram.numel(), dtype=F64).view_as(sinogram)
    uneven = Energy(projector, sinogram, stds)
    assert not torch.allclose(uneven(images), Energy(projector, sinogram, stds.flip(1))(images))  # control


def test_the_truth_has_a_misfit_of_one_a_ray() -> None:
    projector = Projector(ParallelBeam(evenly(40), 16, 24), dtype=F64)
    truth = torch.rand(16, 16, generator=generator(), dtype=F64)
    std = torch.rand(40, 24, generator=generator(1), dtype=F64) + 0.1
    sinogram = projector.A(truth) + std * torch.randn(40, 24, generator=generator(2), dtype=F64)
    misfit = float(Energy(projector, sinogram, std).misfit(truth)) / 960
    assert abs(misfit - 1) < 4 * math.sqrt(2 / 960)


def test_the_gradient_is_that_of_the_value() -> None:
    projector, image, sinogram = problem()
    energy = Energy(projector, sinogram, 0.3, 2.0)
    assert torch.autograd.gradcheck(energy, image.requires_grad_())
    flat = torch.full((4, 4), 0.4, dtype=F64, requires_grad=True)  # no corner where neighbours agree
    (slope,) = torch.autograd.grad(energy.roughness(flat), flat)
    assert slope.isfinite().all()
    assert (slope[1:-1, 1:-1] == 0).all()
    lazy = Energy(projector, sinogram, 0.3)
    torch.testing.assert_close(lazy(image), 0.5 * lazy.misfit(image), rtol=0, atol=0)


def steps(n: int, left: int, height: float = 1.0) -> Tensor:
    """A stripe from top to bottom."""
    image = torch.zeros(n, n, dtype=F64)
    image[:, left : n - left] = height
    return image


def test_edges_and_borders_count_their_length_times_height() -> None:
    energy = Energy(Dense(), torch.zeros(5, 6, dtype=F64), 1.0, 1.0)
    assert float(energy.roughness(torch.zeros(9, 9, dtype=F64))) == 0
    for image, edges in ((steps(12, 3, 0.5), 12 + 12 + 6 + 6), (steps(12, 0, 0.5), 4 * 12)):
        corner = 2 - math.sqrt(2)  # below and right of the last pixel, where one difference stands for two
        assert float(energy.roughness(image)) == pytest.approx(0.5 * (edges - corner), rel=1e-3)
    lone = torch.full((9, 9), 0.5, dtype=F64)
    before = float(energy.roughness(lone))
    lone[4, 4] += 0.1
    assert float(energy.roughness(lone)) - before == pytest.approx(0.1 * (2 + math.sqrt(2)), rel=5e-3)
    tiny = float(energy.roughness(1e-6 * steps(12, 3)))
    assert tiny < 0.01 * 1e-6 * float(energy.roughness(steps(12, 3)))  # far below the smoothing it is squared


def test_it_is_the_published_loss_where_both_variations_agree() -> None:
    """λ = β S/M: with it the two differ by a constant alone, on images of edges in one direction."""
    n, pad = 16, 4
    projector = Projector(ParallelBeam(evenly(6), n, 24), dtype=F64)
    sinogram = torch.rand(6, 24, generator=generator(), dtype=F64)
    beta, rays, side = 5.0, 6 * 24, n + 2 * pad
    energy = Energy(projector, sinogram, 0.3, beta)
    loss = ProjectionLoss(projector, sinogram, 0.3, beta * side / rays, absolute_variation, pad, eps=0.0)
    constant = 0.5 * math.log(2 * math.pi * 0.3**2)

    def gap(image: Tensor) -> float:
        return float(energy(image) - rays * (loss(image) - constant))

    def likelihood(image: Tensor) -> float:
        return float(0.5 * energy.misfit(image) - rays * (loss.data(image) - constant))

    images = torch.rand(5, n, n, generator=generator(1), dtype=F64)
    assert all(abs(likelihood(image)) < 1e-9 for image in images)
    stripes = [image for image in (steps(n, k, h) for k in (2, 5, 7) for h in (0.3, 1.0))]
    for image in stripes:  # but for the corners of a stripe, where one variation takes the diagonal
        corners = 2 - math.sqrt(2)
        assert gap(image) == pytest.approx(-beta * corners * float(image.max()), abs=beta * 0.02)
    assert all(gap(image) < -beta for image in images)  # control: the anisotropic one is larger elsewhere
    assert abs(gap(images[0])) > 20 * abs(gap(stripes[0]))


@pytest.mark.parametrize("block", [2, 4])
def test_a_coarse_image_has_the_variation_of_the_fine_one_over_the_block(block: int) -> None:
    """The fit relies on it: β times the block weighs edges of coarse pixels as they are long."""
    energy = Energy(Dense(), torch.zeros(5, 6, dtype=F64), 1.0, 1.0)
    coarse = steps(24, 5) + 0.5 * steps(24, 8)
    fine = coarse.repeat_interleave(block, 0).repeat_interleave(block, 1)
    ratio = float(energy.roughness(fine) / energy.roughness(coarse))
    assert ratio == pytest.approx(block, rel=0.05)


def test_bad_input() -> None:
    projector, _, y = problem()
    for std, variation, words in (
        (0.0, 0.0, "finite and above 0"),
        (-1.0, 0.0, "from -1"),
        (math.nan, 0.0, "finite and above 0"),
        (math.inf, 0.0, "finite and above 0"),
        (torch.ones(5), 0.0, r"\(5, 6\) like the sinogram, not \(5,\)"),
        (torch.ones(5, 6).index_fill(0, torch.tensor([2]), 0.0), 0.0, "above 0"),
        (0.1, -1.0, "weight of total variation has to be at least 0, not -1"),
        (0.1, math.inf, "weight of total variation"),
        (0.1, math.nan, "weight of total variation"),
    ):
        with pytest.raises(InputError, match=words):
            Energy(projector, y, std, variation)


@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_squared_gradients_of_probes_are_the_curvature(beta: float) -> None:
    projector, image, sinogram = problem()
    std = 0.05 + torch.rand(sinogram.shape, generator=generator(), dtype=F64)
    energy = Energy(projector, sinogram, std, beta)
    scale = torch.arange(1, 17, dtype=F64).view(4, 4).requires_grad_()  # a parameter of each pixel
    chance, found = generator(7), torch.zeros(4, 4, dtype=F64)
    for _ in range(4000):
        (gradient,) = torch.autograd.grad(energy.probe(image * scale, chance), scale)
        found += gradient.square() / 4000

    def half(x: Tensor) -> Tensor:
        """Give what the energy is half the squared norm of, with weights of roughness held."""
        wide, held = (torch.nn.functional.pad(image * s, (1,) * 4) for s in (x, scale.detach()))
        pairs = [(each.diff(dim=0)[:, :-1], each.diff(dim=1)[:-1]) for each in (wide, held)]
        size = (pairs[1][0].square() + pairs[1][1].square() + (beta or 1) ** -2).sqrt()
        rough = [(beta / size).sqrt() * each for each in pairs[0]]
        return torch.cat([(projector.A(image * x) / std).flatten(), *(each.flatten() for each in rough)])

    jacobian = torch.autograd.functional.jacobian(half, scale.detach())
    torch.testing.assert_close(found, jacobian.square().sum(0), rtol=0.1, atol=0)
