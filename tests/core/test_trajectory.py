import math

import pytest
import torch
from torch import Tensor

from gramian.core import readings, reference_paths, trajectory
from gramian.core.gram import Gram, gram
from gramian.errors import InputError
from path_oracles import circle, jittering, line, normal, spiral, walk

PATHS = {
    "line": line(11, 25),
    "circle": circle(11, 25, period=9.3),
    "walk": walk(11, 300),
    "spiral": spiral(11, 25),
    "jitter": jittering(11, 25),
}


def batch(*grams: Gram) -> Gram:
    return Gram(*(torch.stack([getattr(g, side) for g in grams]) for side in ("cross", "left", "right")))


def same(got: Gram, rows: Tensor, rtol: float = 1e-10) -> None:
    """The Gram is that of the rows, to `rtol` of its largest entry."""
    cross = rows @ rows.T
    atol = rtol * float(cross.abs().max()) + 1e-14
    torch.testing.assert_close(got.cross, cross, rtol=0, atol=atol)
    torch.testing.assert_close(got.left, cross.diagonal(), rtol=0, atol=atol)
    torch.testing.assert_close(got.right, cross.diagonal(), rtol=0, atol=atol)


@pytest.mark.parametrize("path", PATHS)
def test_conversions(path: str):
    x = PATHS[path]
    n, steps = len(x), trajectory.steps_of(x)
    same(steps, torch.cat([x[:1], x[1:] - x[:-1]]))
    same(trajectory.positions(steps), x)
    same(trajectory.updates(steps), x[1:] - x[:-1])
    for origin in (0, 4, n - 1, -3):
        same(trajectory.displacements(steps, origin), (x - x[origin])[torch.arange(n) != origin % n])
    same(trajectory.subpath(steps, [1, 2, 6, 9]), trajectory_rows(x[[1, 2, 6, 9]]))
    same(trajectory.every(steps, 3), trajectory_rows(x[::3]))
    same(trajectory.centred(steps), x - x.mean(0))
    if path == "line":
        assert trajectory.accelerations(steps).cross.abs().max() < 1e-13
    else:
        same(trajectory.accelerations(steps), x[2:] - 2 * x[1:-1] + x[:-2])


def trajectory_rows(x: Tensor) -> Tensor:
    return torch.cat([x[:1], x[1:] - x[:-1]])


@pytest.mark.parametrize("path", PATHS)
def test_averages(path: str):
    x, weights = PATHS[path], normal(11, seed=5).abs()
    steps, average = trajectory.steps_of(x), (weights / weights.sum()) @ x
    torch.testing.assert_close(trajectory.average_norm(steps, weights), average.norm(), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        trajectory.average_distances(steps, 3 * weights), (x - average).norm(dim=1), rtol=1e-10, atol=1e-12
    )
    same(trajectory.centred(steps, weights), x - average)
    uniform = trajectory.average_norm(steps, torch.ones(11))
    assert float(uniform) != pytest.approx(float(average.norm()), rel=1e-4)  # control: weights count


def test_the_average_of_a_window_of_jitter_is_nearer_to_its_points():
    x = jittering(20, 20_000)
    weights = torch.zeros(20)
    weights[5:15] = 1
    distances = trajectory.average_distances(trajectory.steps_of(x), weights) / math.sqrt(20_000)
    outside = torch.cat([distances[:5], distances[15:]])
    assert float(distances[5:15].mean()) == pytest.approx(math.sqrt(1 - 1 / 10), rel=0.01)
    assert float(outside.mean()) == pytest.approx(math.sqrt(1 + 1 / 10), rel=0.01)


@pytest.mark.parametrize("path", PATHS)
def test_distances(path: str):
    x = PATHS[path]
    expected = torch.stack([(x - point).norm(dim=1) for point in x])
    torch.testing.assert_close(trajectory.distances(trajectory.steps_of(x)), expected, rtol=1e-10, atol=1e-12)


def test_distances_of_near_checkpoints_do_not_cancel():
    x = normal(1, 1000) + 1e-9 * walk(6, 1000, seed=1)
    expected = torch.stack([(x - point).norm(dim=1) for point in x])
    steps = trajectory.steps_of(x)
    torch.testing.assert_close(trajectory.distances(steps), expected, rtol=1e-10, atol=0)
    from_positions = readings.distance(trajectory.positions(steps))  # control
    assert not torch.allclose(from_positions, expected, rtol=0.1, atol=0)


def test_positions_alone_lose_small_updates():
    x = normal(1, 1000) + walk(6, 1000, seed=1)
    small = normal(1, 1000) + 1e-7 * walk(6, 1000, seed=1)
    for points, kept in ((x, True), (small, False)):
        steps = trajectory.steps_of(points)
        again = trajectory.steps_from_positions(gram(points))
        assert torch.allclose(again.left[1:], steps.left[1:], rtol=1e-4, atol=0) == kept
        error = (again.cross[1:, 1:] - steps.cross[1:, 1:]).abs().max()
        assert error < 8 * torch.finfo(torch.float64).eps * points.norm(dim=1).max() ** 2


def test_lengths_of_a_line():
    x, t = line(11, 25), torch.arange(11).double()
    steps, length = trajectory.steps_of(x), float((x[1] - x[0]).norm())
    torch.testing.assert_close(trajectory.displacement(steps), t * length, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        trajectory.update_lengths(steps), torch.full((10,), length).double(), rtol=1e-7, atol=0
    )
    assert float(trajectory.path_length(steps)) == pytest.approx(10 * length, rel=1e-10)
    assert float(trajectory.displacement_ratio(steps)) == pytest.approx(1, rel=1e-10)
    assert trajectory.acceleration_lengths(steps).max() < 1e-7


def test_straightness_of_a_window_is_that_of_its_path():
    x = torch.cat([walk(9, 400), walk(9, 400)[-1] + line(6, 400) - line(1, 400)])
    steps = trajectory.steps_of(x)
    assert float(trajectory.displacement_ratio(trajectory.subpath(steps, range(9, 15)))) == pytest.approx(1)
    assert float(trajectory.displacement_ratio(steps)) < 0.8  # control


def test_parts_add_up_in_any_partition():
    x = walk(8, 60)
    whole = trajectory.steps_of(x)
    for sizes in ([60], [1, 59], [10, 20, 30]):
        parts = [trajectory.steps_of(part) for part in x.split(sizes, dim=1)]
        torch.testing.assert_close(trajectory.sum_of(parts).cross, whole.cross, rtol=1e-10, atol=1e-12)
    with pytest.raises(AssertionError):  # control: a part is missing
        torch.testing.assert_close(trajectory.sum_of(parts[1:]).cross, whole.cross, rtol=1e-10, atol=1e-12)


def test_balanced_parts_have_equal_norms_and_zeros_are_left_out():
    large, small = trajectory.steps_of(1e4 * walk(8, 40)), trajectory.steps_of(walk(8, 30, seed=1))
    zero = trajectory.steps_of(torch.zeros(8, 3))
    both = trajectory.balanced([large, zero, small])
    assert float(trajectory.positions(both).left.mean()) == pytest.approx(2, rel=1e-10)
    same = trajectory.balanced([small, trajectory.steps_of(walk(8, 40))])
    torch.testing.assert_close(both.cross, same.cross, rtol=1e-9, atol=1e-12)
    ruled = trajectory.sum_of([large, small])  # control: without the scaling the large part is all
    torch.testing.assert_close(ruled.cross, large.cross, rtol=1e-4, atol=1)


def test_every_precision_is_read_in_float64():
    x = normal(1, 400) + 1e-3 * walk(6, 400, seed=1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        stored = x.to(dtype)
        same(trajectory.steps_of(stored), trajectory_rows(stored.double()))
    single = trajectory.steps_from_positions(gram(x.float()))  # control: products in float32 do not suffice
    assert not torch.allclose(single.left[1:].double(), trajectory.steps_of(x.float()).left[1:], rtol=1e-3)


FUNCTIONS = [
    trajectory.norms,
    trajectory.update_lengths,
    trajectory.acceleration_lengths,
    trajectory.path_length,
    trajectory.displacement,
    trajectory.displacement_ratio,
    trajectory.distances,
]
GRAMS = [
    trajectory.positions,
    trajectory.displacements,
    trajectory.updates,
    trajectory.accelerations,
    trajectory.centred,
    trajectory.steps_from_positions,
]


@pytest.mark.parametrize("function", FUNCTIONS + GRAMS, ids=lambda f: f.__name__)
def test_batches_equal_loops(function):
    paths = [trajectory.steps_of(walk(7, 30, seed=seed)) for seed in range(3)]
    batched = function(batch(*paths))
    for i, path in enumerate(paths):
        one = function(path)
        if isinstance(one, Gram):
            torch.testing.assert_close(batched.cross[i], one.cross, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(batched.left[i], one.left, rtol=1e-10, atol=1e-10)
        else:
            torch.testing.assert_close(batched[i], one, rtol=1e-10, atol=1e-7)


def test_one_checkpoint_is_a_path_without_updates():
    steps = trajectory.steps_of(walk(1, 5))
    assert trajectory.updates(steps).cross.shape == (0, 0)
    assert trajectory.distances(steps).tolist() == [[0]]
    assert float(trajectory.path_length(steps)) == 0
    assert trajectory.displacement_ratio(steps).isnan()


def test_reference_paths_are_what_their_names_say():
    n = 9
    straight = reference_paths.straight_line(n)
    torch.testing.assert_close(trajectory.updates(straight).cross, torch.ones(8, 8).double())
    torch.testing.assert_close(
        trajectory.updates(reference_paths.random_walk(n)).cross, torch.eye(8).double()
    )
    shaken = trajectory.updates(reference_paths.jitter(n))
    torch.testing.assert_close(shaken.left, torch.ones(8).double())
    torch.testing.assert_close(shaken.cross.diagonal(1), torch.full((7,), -0.5).double())
    sampled = trajectory.updates(trajectory.steps_of(jittering(n, 50_000) / math.sqrt(100_000)))
    torch.testing.assert_close(shaken.cross, sampled.cross, rtol=0, atol=0.02)
    with pytest.raises(InputError, match="at least one point, not 0"):
        reference_paths.random_walk(0)


def test_bad_input_is_named():
    steps = trajectory.steps_of(walk(5, 7))
    with pytest.raises(InputError, match="at least one point, not 0"):
        trajectory.steps_of(torch.zeros(0, 3))
    with pytest.raises(InputError, match=r"same size can be added, and these have: \(4, 4\), \(5, 5\)"):
        trajectory.sum_of([steps, trajectory.steps_of(walk(4, 7))])
    with pytest.raises(InputError, match="have: none"):
        trajectory.sum_of([])
    with pytest.raises(InputError, match="no part has a weight that differs from zero"):
        trajectory.balanced([trajectory.steps_of(torch.zeros(5, 3))])
    with pytest.raises(InputError, match="checkpoint 5 is not one of the 5"):
        trajectory.displacements(steps, 5)
    for indices in ([], [2, 1], [1, 1], [0, 5], [-1, 2]):
        with pytest.raises(InputError, match="increasing numbers of checkpoints from 0 to 4"):
            trajectory.subpath(steps, indices)
    with pytest.raises(InputError, match="k of 1 or more, not 0"):
        trajectory.every(steps, 0)
    for weights in (torch.ones(4), torch.tensor([1.0, -1, 0, 0, 0]), torch.full((5,), torch.nan)):
        with pytest.raises(InputError, match="5 rows needs 5 finite weights whose sum is not 0"):
            trajectory.average_norm(steps, weights)
    with pytest.raises(InputError, match="2 rows against 3"):
        trajectory.positions(gram(walk(2, 4), walk(3, 4)))
    with pytest.raises(InputError, match="coefficients for 3 rows do not fit 5"):
        trajectory.combined(steps, torch.eye(3))
