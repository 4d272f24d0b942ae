"""Encodings of coordinates against slow loops over points, and the laws of their published forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from gramian.errors import InputError
from gramian.nn.field import Field, image
from gramian.nn.field_encodings import (
    PRIME,
    Encoding,
    FourierFeatures,
    HashGrid,
    OctaveFeatures,
    Sine,
    _weighed,
    coordinates,
)
from gramian.nn.init import initialise_

Weighed = Callable[[Tensor, Tensor, Tensor], Tensor]
FORWARD_MODE = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # torch's own, once


def points(count: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def test_coordinates_are_rows_then_columns_from_end_to_end() -> None:
    found = coordinates((3, 5))
    assert found.shape == (3, 5, 2)
    assert found[0, 0].tolist() == [-1, -1]
    assert found[2, 0].tolist() == [1, -1]
    assert found[1, 4].tolist() == [0, 1]
    torch.testing.assert_close(coordinates(512)[:, 0, 0], torch.linspace(-1, 1, 512), rtol=0, atol=2e-7)


def test_coordinates_of_blocks_are_means_of_their_pixels() -> None:
    fine, coarse = (coordinates(12, block=block, dtype=torch.float64) for block in (1, 3))
    pooled = torch.nn.functional.avg_pool2d(fine.movedim(-1, 0), 3).movedim(0, -1)
    torch.testing.assert_close(coarse, pooled, rtol=0, atol=1e-15)
    assert (coordinates(4) - coarse).abs().max() > 0.1  # control: the grid of a small image is another one


def test_fourier_features_are_the_published_waves() -> None:
    encoding, x = FourierFeatures(5, 7.0, seed=0).double(), points(6)
    wanted = np.empty((6, 10))
    for n, (row, column) in enumerate(x.numpy()):
        for k, (b_row, b_column) in enumerate(encoding.frequencies.numpy()):
            phase = b_row * row + b_column * column + math.pi / 4
            wanted[n, k], wanted[n, 5 + k] = math.sin(phase), math.cos(phase)
    np.testing.assert_allclose(encoding(x).numpy(), wanted, rtol=0, atol=1e-12)
    assert encoding.outputs == 10
    assert not list(encoding.parameters())
    assert list(encoding.state_dict()) == ["frequencies"]


def test_frequencies_have_the_stated_spread_and_come_from_the_seed() -> None:
    one = FourierFeatures(20_000, 40.0, seed=3).frequencies
    assert one.std().item() == pytest.approx(40, rel=0.02)
    assert torch.equal(one, FourierFeatures(20_000, 40.0, seed=3).frequencies)
    assert not torch.equal(one, FourierFeatures(20_000, 40.0, seed=4).frequencies)


def test_the_kernel_of_fourier_features_is_gaussian_at_the_rate() -> None:
    x, omega = points(2), 1.5
    limit = math.exp(-0.5 * omega**2 * float((x[0] - x[1]).square().sum()))
    errors = []
    for features in (100, 10_000):
        found = [FourierFeatures(features, omega, seed=s).double()(x) for s in range(100)]
        errors.append(np.std([float(phi[0] @ phi[1]) / features - limit for phi in found]))
        bias = np.mean([float(phi[0] @ phi[1]) / features - limit for phi in found])
        assert abs(bias) < 4 * errors[-1] / 10
    wrong = math.exp(-0.5 * (2 * math.pi * omega) ** 2 * float((x[0] - x[1]).square().sum()))
    assert abs(wrong - limit) > 20 * errors[1]  # control: with 2π it is another kernel
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.3)


def test_octave_features_by_a_loop() -> None:
    encoding, x = OctaveFeatures(3), points(4)
    assert encoding(x).shape == (4, encoding.outputs) == (4, 14)
    for n, pair in enumerate(x.tolist()):
        wanted = list(pair)
        for octave in range(3):
            for wave in (math.sin, math.cos):
                wanted += [wave(2**octave * math.pi * value) for value in pair]
        assert encoding(x)[n].tolist() == pytest.approx(wanted, abs=1e-12)


def test_sine_layers_start_as_published() -> None:
    first, later = Sine(2, 4000, 30.0, first=True), Sine(4000, 1000, 30.0)
    x = points(50).float()
    assert 0.49 < float(first.weight.detach().abs().max()) <= 0.5
    torch.testing.assert_close(first(x), torch.sin(30 * (x @ first.weight.T + first.bias)))
    with torch.no_grad():
        h = torch.sin(math.pi / 2 * torch.randn(200, 4000, generator=torch.Generator().manual_seed(0)))
        phase = 30 * (h @ later.weight.T)
        assert phase.std().item() == pytest.approx(math.sqrt(2 * h.square().mean().item()), rel=0.05)
        initialise_(first, 5)
        again = initialise_(Sine(2, 4000, 30.0, first=True), 5)
    assert torch.equal(first.weight, again.weight)


def slow_hash_grid(grid: HashGrid, x: Tensor) -> np.ndarray:
    """Return the features point by point, level by level, corner by corner, in unsigned 32-bit arithmetic."""
    tables, start = grid.tables.detach().numpy(), 0
    blocks = []
    for n in grid.resolutions:
        length = min((n + 1) ** 2, grid.entries)
        table, start = tables[start : start + length], start + length
        block = np.zeros((len(x), tables.shape[1]))
        for point, (row, column) in enumerate((x.numpy() + 1) / 2 * n):
            i0, j0 = min(int(row), n - 1), min(int(column), n - 1)
            for i, j in ((i0, j0), (i0, j0 + 1), (i0 + 1, j0), (i0 + 1, j0 + 1)):
                hashed = int(np.uint32(i) ^ (np.uint32(j) * np.uint32(PRIME))) % grid.entries
                place = i * (n + 1) + j if (n + 1) ** 2 <= grid.entries else hashed
                block[point] += (1 - abs(row - i)) * (1 - abs(column - j)) * table[place]
        blocks.append(block)
    return np.concatenate(blocks, 1)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_hash_grid_is_the_slow_one() -> None:
    grid = HashGrid(5, 3, 2**6, coarsest=3, finest=40, seed=0).double()
    assert grid.resolutions == [3, 5, 10, 20, 40]
    assert [(n + 1) ** 2 <= grid.entries for n in grid.resolutions] == [True, True, False, False, False]
    assert len(grid.tables) == 16 + 36 + 3 * 64
    x = torch.cat((points(40), torch.tensor([[-1.0, -1], [1, 1], [-1, 1], [0, 0]]).double()))
    np.testing.assert_allclose(grid(x).detach().numpy(), slow_hash_grid(grid, x), rtol=0, atol=1e-15)
    other = slow_hash_grid(grid, x.flip(1))  # control: rows and columns are told apart
    assert np.abs(other - grid(x).detach().numpy()).max() > 1e-5


def test_at_its_nodes_a_grid_without_collisions_is_its_table() -> None:
    grid = HashGrid(1, 2, 2**8, coarsest=10, finest=10, seed=1).double()
    at_nodes = grid(coordinates(11, dtype=torch.float64))
    torch.testing.assert_close(at_nodes.flatten(0, 1), grid.tables, rtol=0, atol=1e-17)
    between = grid(coordinates(21, dtype=torch.float64))[1::2, ::2]
    torch.testing.assert_close(between, (at_nodes[1:] + at_nodes[:-1]) / 2, rtol=0, atol=1e-17)


def test_a_short_table_is_shared_and_a_long_one_is_not() -> None:
    for entries, rows in ((2**8, 11**2), (2**5, 2**5)):
        grid = HashGrid(1, 1, entries, coarsest=10, finest=10, seed=0).double()
        places, _ = grid.prepare(coordinates(11, dtype=torch.float64))
        assert len(places.unique()) == rows
        assert len(grid.tables) == rows


def test_points_outside_are_taken_to_the_border() -> None:
    grid = HashGrid(3, 2, 2**6, coarsest=2, finest=9, seed=0)
    outside = torch.tensor([[-1.5, 0.3], [0.2, 7.0]])
    torch.testing.assert_close(grid(outside), grid(outside.clamp(-1, 1)))


@pytest.mark.parametrize(("omega", "fits"), [(0.05, False), (20.0, True)])
def test_only_high_frequencies_fit_a_fine_pattern(omega: float, fits: bool) -> None:
    x = coordinates(24)
    target = 0.5 + 0.4 * torch.sin(6 * math.pi * x[..., 0]) * torch.cos(5 * math.pi * x[..., 1])
    field = Field(FourierFeatures(64, omega, seed=0), 32, 1, seed=0)
    optimiser = torch.optim.Adam(field.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        (image(field, 24) - target).square().mean().backward()
        optimiser.step()
    unexplained = ((image(field, 24) - target).square().mean() / target.var()).item()
    assert unexplained < 0.02 if fits else unexplained > 0.8


@pytest.mark.parametrize("encoding", [FourierFeatures(363, 60.0, seed=0), Sine(2, 300, 100.0, first=True)])
def test_phases_keep_their_precision_under_autocast(encoding: Encoding) -> None:
    x = coordinates(16)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = encoding(x)
    torch.testing.assert_close(reduced, encoding(x), rtol=0, atol=0)
    weight = encoding.frequencies if isinstance(encoding, FourierFeatures) else 100 * encoding.weight.detach()
    rounded = (x.bfloat16() @ weight.bfloat16().T).float() - x @ weight.T  # control: what a product would do
    assert rounded.abs().max() > 0.3


def indexed(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """What `_weighed` returns, by indexing alone."""
    return (weights[..., None] * table[rows.long()]).sum(-2)


def sums() -> tuple[Tensor, Tensor]:
    """Rows and weights of sums: of 13 rows some repeat within a sum and over sums, and two never occur."""
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(11, (20, 4), generator=draws, dtype=torch.int32)
    rows[:5, 1] = rows[:5, 0]
    return rows, torch.randn(20, 4, generator=draws, dtype=torch.float64)


def tables(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@FORWARD_MODE
def test_weighed_sums_have_the_value_and_all_derivatives_of_indexing() -> None:
    (rows, weights), table = sums(), tables(13, 3).requires_grad_()
    torch.testing.assert_close(_weighed(table, rows, weights), indexed(table, rows, weights))
    assert torch.autograd.gradcheck(lambda t: _weighed(t, rows, weights), table, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: _weighed(t.sin(), rows, weights).exp(), table)
    ours, theirs = (
        torch.autograd.grad(f(table, rows, weights).square().sum(), table)[0] for f in (_weighed, indexed)
    )
    torch.testing.assert_close(ours, theirs)
    assert (ours[-2:] == 0).all()
    last = torch.zeros_like(ours)  # control: who does not add up repeated rows keeps one of each
    last[rows.flatten().long()] = (weights[..., None] * 2 * indexed(table, rows, weights)[:, None]).flatten(
        0, 1
    )
    assert (last - ours).abs().max() > 1


@FORWARD_MODE
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weighed_sums_of_many_tables_are_one_by_one(axis: int) -> None:
    (rows, weights), many = sums(), tables(3, 13, 5).movedim(0, axis)

    def energy(f: Weighed) -> Callable[[Tensor], Tensor]:
        return lambda t: f(t, rows, weights).sin().sum()

    def curvature(f: Weighed) -> Callable[[Tensor], Tensor]:
        return lambda t: jvp(grad(energy(f)), (t,), (t.cos(),))[1]

    for transform in (energy, lambda f: grad(energy(f)), curvature):
        wanted = torch.stack([transform(indexed)(table) for table in many.unbind(axis)])
        torch.testing.assert_close(vmap(transform(_weighed), in_dims=axis)(many), wanted)
    given = many.clone().requires_grad_()  # as members are fitted: backward through vmap
    (slope,) = torch.autograd.grad(vmap(energy(_weighed), in_dims=axis)(given).sum(), given)
    torch.testing.assert_close(
        slope, torch.stack([grad(energy(indexed))(table) for table in many.unbind(axis)], axis)
    )


@FORWARD_MODE
def test_a_hash_grid_has_derivatives_by_its_points_and_maps_over_them() -> None:
    grid = HashGrid(3, 2, 2**5, coarsest=2, finest=11, seed=0).double()
    x = points(6)
    torch.testing.assert_close(vmap(grid)(x), grid(x))
    step = 1e-6 * torch.eye(2, dtype=torch.float64)
    wanted = torch.stack([(grid(x + h) - grid(x - h)) / 2e-6 for h in step], -1)
    slope = torch.autograd.functional.jacobian(lambda t: grid(t).sum(0), x).movedim(1, 0)
    for found in (slope, torch.stack([jacrev(grid)(one) for one in x]), vmap(jacfwd(grid))(x)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(grid(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(dual, wanted.sum(-1), rtol=1e-5, atol=1e-9)
    mixed = grad(lambda table: functional_call(grid, {"tables": table}, (x,)).sin().sum())(grid.tables)
    torch.testing.assert_close(mixed, torch.autograd.grad(grid(x).sin().sum(), grid.tables)[0])


def test_a_hash_grid_keeps_its_precision_under_autocast_and_a_step_of_a_field_goes_through() -> None:
    field, x = Field(HashGrid(3, 2, 2**5, coarsest=2, finest=11, seed=0), 9, 1, seed=0), coordinates(8)
    kept = field.encoding.prepare(x)
    slopes = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            features, values = field.encoding.read(*kept), field.decode(*kept)
        assert features.dtype == values.dtype == torch.float32
        torch.testing.assert_close(features, field.encoding(x), rtol=0, atol=0)
        slopes.append(torch.autograd.grad(values.sum(), field.encoding.tables)[0])
    assert slopes[1].dtype == torch.float32
    assert (slopes[0] - slopes[1]).norm() < 0.02 * slopes[0].norm()
    assert (slopes[0] - slopes[1]).norm() > 0
    half = field.encoding.double().read(kept[0], kept[1].float())  # coordinates may have been kept in less
    assert half.dtype == torch.float64


def test_bad_input() -> None:
    for call, words in (
        (lambda: coordinates(1), "at least 2 pixels"),
        (lambda: coordinates((4, 1)), "at least 2 pixels"),
        (lambda: coordinates(10, block=3), "blocks of 3 pixels do not divide an image of 10 × 10"),
        (lambda: FourierFeatures(0), "number of Fourier features has to be at least 1, got 0"),
        (lambda: FourierFeatures(4, math.nan), "ω₀ has to be positive and finite"),
        (lambda: Sine(2, 4, 0.0), "ω₀ has to be positive"),
        (lambda: Sine(0, 4), "number of features"),
        (lambda: OctaveFeatures(0), "number of octaves"),
        (lambda: HashGrid(0), "number of levels"),
        (lambda: HashGrid(entries=1000), "power of 2, got 1000"),
        (lambda: HashGrid(coarsest=20, finest=10), "got 20, 10"),
    ):
        with pytest.raises(InputError, match=words):
            call()
