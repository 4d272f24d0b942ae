import math
from itertools import pairwise

import pytest
import torch

from gramian.core import path_subspaces
from gramian.core.readings import participation_ratio, spectrum
from gramian.core.reference_paths import jitter, random_walk
from gramian.core.trajectory import centred, steps_of
from gramian.errors import InputError
from path_oracles import circle, constant, jittering, line, normal, spiral, walk


@pytest.mark.parametrize("x", [walk(9, 40), circle(9, 40, 8.1), spiral(9, 40), walk(9, 4)], ids=len)
def test_components_are_the_singular_values_of_the_centred_points(x: torch.Tensor):
    steps, deviations = steps_of(x), x - x.mean(0)
    left, singular, _ = torch.linalg.svd(deviations, full_matrices=False)
    count = min(9, x.shape[1])
    torch.testing.assert_close(
        spectrum(centred(steps))[:count], singular.square()[:count], rtol=1e-10, atol=1e-12
    )
    shares = path_subspaces.explained_variance(steps)
    torch.testing.assert_close(shares[0], singular[0].square() / singular.square().sum(), rtol=1e-10, atol=0)
    scores = path_subspaces.principal_scores(steps, 2)
    expected = (left * singular)[:, :2]
    expected = expected * torch.where(expected[-1] < 0, -1, 1)
    torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-10)
    assert (path_subspaces.principal_scores(steps, 9).square().sum(0) - spectrum(centred(steps))).max() < 1e-9


def test_shares_of_known_paths():
    torch.testing.assert_close(
        path_subspaces.explained_variance(steps_of(line(9, 20)))[:2],
        torch.tensor([1.0, 0]).double(),
        rtol=1e-10,
        atol=1e-12,
    )
    torch.testing.assert_close(
        path_subspaces.explained_variance(steps_of(circle(12, 20, 12)))[:3],
        torch.tensor([0.5, 0.5, 0]).double(),
        rtol=1e-10,
        atol=1e-12,
    )
    errors = []
    for n in (50, 100, 200, 400):
        first = float(path_subspaces.explained_variance(random_walk(n))[0])
        errors.append(abs(first - 6 / math.pi**2))
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert min(slopes) > 0.9  # the limit is reached as 1/T or faster
    assert float(participation_ratio(centred(random_walk(400)))) == pytest.approx(5 / 2, rel=1e-3)
    flat = path_subspaces.explained_variance(jitter(10))
    torch.testing.assert_close(flat[:9], constant(9, 1 / 9), rtol=1e-10, atol=0)
    assert float(flat[9]) == pytest.approx(0, abs=1e-12)
    assert path_subspaces.explained_variance(steps_of(torch.ones(4, 3))).isnan().all()


def test_scores_keep_the_distances_of_a_plane():
    x = spiral(9, 40)
    scores = path_subspaces.principal_scores(steps_of(x), 2)
    torch.testing.assert_close(torch.cdist(scores, scores), torch.cdist(x, x), rtol=1e-9, atol=1e-9)
    distant = walk(9, 40)  # control: a walk is no plane
    scores = path_subspaces.principal_scores(steps_of(distant), 2)
    assert (torch.cdist(scores, scores) < 0.9 * torch.cdist(distant, distant)).any()
    with pytest.raises(InputError, match="from 1 to 9 principal components, not 10"):
        path_subspaces.principal_scores(steps_of(x), 10)


@pytest.mark.parametrize("affine", [True, False])
def test_distance_to_a_span_is_that_of_least_squares(affine: bool):
    x = normal(9, 40) + 3
    for index, others in ((8, [0, 1, 2]), (4, [7, 5, 1]), (0, [3]), (-1, [-2, -3])):
        base = x[others[0]]
        basis = (x[others[1:]] - base).T if affine else x[others].T
        target = x[index] - base if affine else x[index]
        if basis.shape[1]:
            target = target - basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
        got = path_subspaces.span_distance(steps_of(x), index, others, affine)
        assert float(got) == pytest.approx(float(target.norm()), rel=1e-10)


def test_spans_of_known_paths():
    straight, wandering = steps_of(line(9, 40)), steps_of(walk(9, 20_000))
    assert float(path_subspaces.span_distance(straight, 8, [0, 1])) < 1e-6
    assert float(path_subspaces.span_distance(straight, 8, [0, 1, 2, 3])) < 1e-6  # more than the line needs
    for others in (range(8), [0, 7]):
        distance = path_subspaces.span_distance(wandering, 8, list(others)) / math.sqrt(20_000)
        assert float(distance) == pytest.approx(1, rel=0.02)
    shaken = path_subspaces.span_distance(steps_of(jittering(9, 20_000)), 8, list(range(8)))
    assert float(shaken) / math.sqrt(20_000) == pytest.approx(math.sqrt(1 + 1 / 8), rel=0.02)
    assert float(path_subspaces.span_distance(wandering, 3, [1, 3, 5])) < 1e-5
    far = steps_of(torch.outer(torch.tensor([1.0, 2, 5]).double(), normal(30)))
    assert float(path_subspaces.span_distance(far, 2, [0], affine=False)) < 1e-6
    assert float(path_subspaces.span_distance(far, 2, [0], affine=True)) > 1  # control: one point, no line


def test_spans_of_near_checkpoints_far_from_the_origin():
    motion = walk(6, 40, seed=1)
    for affine in (True, False):
        near = steps_of(1e3 * normal(40) + 1e-4 * motion)
        got = float(path_subspaces.span_distance(near, 5, [0, 1, 2], affine))
        expected = 1e-4 * float(path_subspaces.span_distance(steps_of(motion), 5, [0, 1, 2]))
        assert got == pytest.approx(expected, rel=1e-5 if affine else 0.2)


def test_batches_equal_loops():
    paths = [steps_of(walk(7, 30, seed=seed)) for seed in range(2)]
    batch = type(paths[0])(*(torch.stack([getattr(p, s) for p in paths]) for s in ("cross", "left", "right")))
    for function in (
        path_subspaces.explained_variance,
        path_subspaces.principal_scores,
        lambda steps: path_subspaces.span_distance(steps, 5, [0, 2, 3]),
    ):
        expected = torch.stack([function(path) for path in paths])
        torch.testing.assert_close(function(batch), expected, rtol=1e-9, atol=1e-9)


def test_bad_input_is_named():
    steps = steps_of(walk(5, 7))
    with pytest.raises(InputError, match="at least one checkpoint, not 0"):
        path_subspaces.span_distance(steps, 1, [])
    with pytest.raises(InputError, match="checkpoint 7 is not one of the 5"):
        path_subspaces.span_distance(steps, 1, [7])
