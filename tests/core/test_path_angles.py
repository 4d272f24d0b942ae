import math
from itertools import pairwise

import pytest
import torch

from gramian.core import path_angles, readings
from gramian.core.gram import gram
from gramian.core.reference_paths import jitter, random_walk, straight_line
from gramian.core.trajectory import displacements, positions, steps_of, update_lengths, updates
from gramian.errors import InputError
from path_oracles import angle, circle, constant, jittering, line, normal, numbers, pairs, spiral, walk


def test_similarity_is_the_squared_norm_of_the_mean_unit_vector():
    x = walk(9, 40)
    units = x / x.norm(dim=1, keepdim=True)
    omega = path_angles.directional_similarity(gram(x))
    assert float(omega) == pytest.approx(float(units.mean(0).square().sum()), rel=1e-10)
    weights = normal(9, seed=3).abs()
    weighted = ((weights / weights.sum())[:, None] * units).sum(0).square().sum()
    assert float(path_angles.directional_similarity(gram(x), weights)) == pytest.approx(float(weighted))
    assert float(weighted) != pytest.approx(float(omega), rel=1e-3)  # control: weights count


def test_the_two_conventions_of_the_diagonal():
    x = walk(9, 40)
    omega, off = path_angles.directional_similarity(gram(x)), path_angles.directional_similarity_off(gram(x))
    assert float(off) == pytest.approx(float(readings.cosine_mean(gram(x))), rel=1e-10)
    assert float(off) == pytest.approx((9 * float(omega) - 1) / 8, rel=1e-10)
    assert float(off) < float(omega) - 0.01  # control: they are not the same
    weights = normal(9, seed=3).abs()
    cosines = readings.cosine(gram(x)).fill_diagonal_(0)
    pair_weights = torch.outer(weights, weights).fill_diagonal_(0)
    expected = (pair_weights * cosines).sum() / pair_weights.sum()
    assert float(path_angles.directional_similarity_off(gram(x), weights)) == pytest.approx(float(expected))
    orthogonal = gram(torch.eye(4).double())
    assert float(path_angles.directional_similarity_off(orthogonal)) == pytest.approx(0, abs=1e-12)
    assert path_angles.directional_similarity_off(gram(x[:1])).isnan()


def test_rows_without_direction_are_left_out_and_nan_is_not():
    x = walk(9, 40)
    with_zeros = torch.cat([x[:4], torch.zeros(2, 40), x[4:]])
    weights = normal(11, seed=3).abs()
    kept = torch.cat([weights[:4], weights[6:]])
    for reading in (path_angles.directional_similarity, path_angles.directional_similarity_off):
        assert float(reading(gram(with_zeros))) == pytest.approx(float(reading(gram(x))), rel=1e-10)
        assert float(reading(gram(with_zeros), weights)) == pytest.approx(float(reading(gram(x), kept)))
        assert reading(gram(torch.zeros(3, 4).double())).isnan()
        broken = x.clone()
        broken[3, 3] = torch.nan
        assert reading(gram(broken)).isnan()


def test_relative_similarity_of_known_paths():
    def relative(steps):
        return float(path_angles.directional_similarity(displacements(steps)))

    assert relative(straight_line(400)) == pytest.approx(1, rel=1e-10)
    errors = [relative(random_walk(n)) - 2 / 3 for n in (51, 101, 201, 401)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.1)  # 2/3 + O(1/T)
    assert relative(jitter(400)) == pytest.approx(1 / 2, rel=0.01)
    still = torch.cat([torch.zeros(1, 20_000), normal(40, 20_000)])
    assert relative(steps_of(still)) == pytest.approx(1 / 40, rel=0.3)


def test_absolute_similarity_says_little_far_from_the_origin():
    small, far = jittering(20, 500), jittering(20, 500) + 100
    omega = path_angles.directional_similarity
    assert float(omega(positions(steps_of(far)))) > 0.99
    assert float(omega(positions(steps_of(small)))) < 0.95
    assert float(omega(displacements(steps_of(far)))) == pytest.approx(
        float(omega(displacements(steps_of(small)))), rel=1e-8
    )


def test_spacing_weights_are_the_trapezoid_rule():
    times = torch.tensor([0.0, 1, 2, 4, 8, 16])
    weights = path_angles.spacing_weights(times)
    values = normal(6)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
    assert float(weights @ values) == pytest.approx(float(torch.trapezoid(values, times.double())) / 16)
    for wrong in (torch.tensor([0.0]), torch.tensor([0.0, 1, 1])):
        with pytest.raises(InputError, match="two or more increasing times"):
            path_angles.spacing_weights(wrong)


def test_update_angles_at_every_lag():
    x = walk(9, 40)
    found = x.diff(dim=0)
    for lag in (1, 2, 7):
        expected = [math.radians(angle(found[t], found[t + lag])) for t in range(8 - lag)]
        torch.testing.assert_close(
            path_angles.update_angles(steps_of(x), lag), numbers(expected), rtol=1e-10, atol=0
        )
    for lag in (8, 20):
        assert path_angles.update_angles(steps_of(x), lag).shape == (0,)
    with pytest.raises(InputError, match="1 or more, not 0"):
        path_angles.update_angles(steps_of(x), 0)


def test_turning_of_known_paths():
    around = steps_of(circle(13, 20, period=12))
    assert float(path_angles.total_turning(around)) == pytest.approx(2 * math.pi * 11 / 12, rel=1e-10)
    torch.testing.assert_close(
        path_angles.update_angles(around, 3), constant(9, math.pi / 2), rtol=1e-10, atol=0
    )
    winding = steps_of(spiral(13, 20, turn=0.3))
    assert float(path_angles.total_turning(winding)) == pytest.approx(11 * 0.3, rel=1e-10)
    assert float(path_angles.total_turning(steps_of(line(13, 20)))) == pytest.approx(0, abs=1e-6)
    assert float(path_angles.total_turning(random_walk(13))) == pytest.approx(11 * math.pi / 2, rel=1e-10)
    assert float(path_angles.total_turning(jitter(13))) == pytest.approx(11 * 2 * math.pi / 3, rel=1e-10)
    torch.testing.assert_close(
        path_angles.update_angles(jitter(13), 2), constant(10, math.pi / 2), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("apex", [None, 0, 4, -1])
def test_angles_from_any_apex(apex: int | None):
    x = walk(9, 40) + 1
    seen = x if apex is None else x - x[apex]
    steps, expected = steps_of(x), pairs(seen, angle).deg2rad()
    got = path_angles.angle_map(steps, apex)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, equal_nan=True)
    assert got.isnan().any() == (apex is not None)
    torch.testing.assert_close(
        path_angles.apex_angles(steps, apex), expected.diagonal(1), rtol=1e-9, atol=1e-10, equal_nan=True
    )
    with pytest.raises(InputError, match="checkpoint 9 is not one of the 9"):
        path_angles.angle_map(steps, 9)


def test_apex_angles_of_known_paths():
    t = torch.arange(1, 20).double()
    at_start = path_angles.apex_angles(random_walk(21))
    torch.testing.assert_close(at_start[1:], (t / (t + 1)).sqrt().arccos(), rtol=1e-10, atol=0)
    assert at_start[0].isnan()
    assert path_angles.apex_angles(steps_of(line(9, 20)))[1:].abs().max() < 1e-6
    torch.testing.assert_close(
        path_angles.apex_angles(jitter(9))[1:], constant(7, math.pi / 3), rtol=1e-10, atol=0
    )


def test_tiny_angles_are_exact_where_an_arccos_is_not():
    start = normal(1000)
    start /= start.norm()
    across = normal(7, 1000, seed=1)
    across -= (across @ start)[:, None] * start
    across /= across.norm(dim=1, keepdim=True)
    x = torch.cat([start[None], start + 1e-7 * across])
    expected = pairs(x, angle).deg2rad()
    torch.testing.assert_close(path_angles.angle_map(steps_of(x)), expected, rtol=1e-6, atol=0)
    assert path_angles.angle_map(steps_of(x))[0, 1] == pytest.approx(1e-7, rel=1e-6)
    from_cosines = readings.apex_angle(positions(steps_of(x)))  # control
    assert not torch.allclose(from_cosines, expected, rtol=0.01, atol=0)


def test_progress_of_known_paths():
    n = 17
    torch.testing.assert_close(
        path_angles.angles_to_end(random_walk(n)),
        constant(n - 1, math.acos(1 / math.sqrt(n - 1))),
        rtol=1e-10,
        atol=0,
    )
    left = torch.arange(n - 1, 0, -1).double()
    torch.testing.assert_close(
        path_angles.angles_to_remainder(random_walk(n)), left.rsqrt().arccos(), rtol=1e-10, atol=1e-12
    )
    assert path_angles.angles_to_end(steps_of(line(9, 20))).max() < 1e-6
    assert path_angles.angles_to_remainder(steps_of(line(9, 20))).max() < 1e-6
    remaining = path_angles.angles_to_remainder(jitter(n))
    torch.testing.assert_close(remaining[:-1], constant(n - 2, math.pi / 3), rtol=1e-10, atol=0)
    assert float(remaining[-1]) == 0
    assert float(path_angles.angles_to_remainder(steps_of(walk(9, 20)))[-1]) == 0


def test_weight_decay_is_radial_and_rotation_tangential():
    x = torch.outer(0.9 ** torch.arange(8).double(), normal(30))
    decayed = steps_of(x)
    torch.testing.assert_close(
        path_angles.radial_updates(decayed), -update_lengths(decayed), rtol=1e-10, atol=0
    )
    assert path_angles.tangential_lengths(decayed).max() < 1e-6
    angles = torch.arange(8).double() * 0.1
    arc = steps_of(torch.stack([angles.cos(), angles.sin()], 1))
    torch.testing.assert_close(
        path_angles.tangential_lengths(arc), constant(7, math.sin(0.1)), rtol=1e-10, atol=0
    )
    inward = constant(7, math.cos(0.1) - 1)
    torch.testing.assert_close(path_angles.radial_updates(arc), inward, rtol=1e-10, atol=0)


def test_what_has_no_length_has_no_angle():
    x = walk(8, 30)
    x[3] = x[2]
    steps = steps_of(x)
    assert path_angles.update_angles(steps).isnan().tolist() == [False, True, True, False, False, False]
    assert path_angles.angles_to_end(steps).isnan().tolist() == [t == 2 for t in range(7)]
    assert path_angles.total_turning(steps).isnan()
    assert readings.cosine(updates(steps))[2].isnan().all()
    assert path_angles.apex_angles(steps, 2).isnan().tolist() == [t in (1, 2, 3) for t in range(7)]
    assert path_angles.apex_angles(steps, None).isnan().sum() == 0
