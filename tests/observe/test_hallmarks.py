import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gramian.core.gram import Gram
from gramian.core.reference_paths import jitter
from gramian.core.trajectory import positions, steps_from_positions, steps_of, sum_of
from gramian.errors import InputError
from gramian.observe.hallmarks import CURVES, MAPS, SCALARS, Hallmark, hallmarks, time_weighted
from path_oracles import circle, direct, jittering, line, normal, spiral, walk

ALL = SCALARS | CURVES | MAPS
PATHS = {
    "line": line(12, 30),
    "circle": circle(12, 30, period=13.7),
    "walk": walk(12, 500),
    "spiral": spiral(12, 30),
    "jitter": jittering(12, 30),
    "flat": walk(12, 3),
}
LENGTHS_ABOUT_ZERO = ("acceleration_lengths", "tangential_lengths")


@cache
def expected_of(path: str) -> dict[str, Tensor]:
    return direct(PATHS[path])


def values(steps: Gram) -> dict[str, Tensor]:
    return {name: hallmark.function(steps) for name, hallmark in ALL.items()}


def nearly(name: str, hallmark: Hallmark) -> float:
    """What √ε leaves of a small angle or length, in the unit."""
    return 3e-6 if hallmark.unit == "°" else 1e-7 if name in LENGTHS_ABOUT_ZERO else 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_from_the_gram_as_from_the_points(name: str, path: str):
    got, expected = ALL[name].function(steps_of(PATHS[path])), expected_of(path)[name]
    torch.testing.assert_close(
        got, expected, rtol=1e-10, atol=nearly(name, ALL[name]), equal_nan=True, check_dtype=True
    )


@pytest.mark.parametrize("name", ALL)
def test_away_from_0_angles_hold_to_10_digits(name: str):
    expected = expected_of("walk")[name].clone()
    if name == "angles_to_remainder":
        expected[-1] = 0  # by definition
    torch.testing.assert_close(
        ALL[name].function(steps_of(PATHS["walk"])), expected, rtol=1e-10, atol=1e-12, equal_nan=True
    )


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_checkpoints_are_read_as_they_are(path: str):
    stored = PATHS[path].bfloat16()
    got, expected = values(steps_of(stored)), direct(stored.double())
    for name, hallmark in ALL.items():
        atol = max(1e-5, nearly(name, hallmark))
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=atol, equal_nan=True, msg=name)
    unrounded = expected_of(path)  # control: the rounding itself is far above that
    assert not torch.allclose(got["update_lengths"], unrounded["update_lengths"], rtol=1e-5)


def test_a_line_has_its_values():
    got, length = hallmarks(steps_of(line(40, 60))), float((line(2, 60)[1] - line(2, 60)[0]).norm())
    for name in ("mds_relative", "mds_relative_off", "displacement_ratio", "mean_update_cosine"):
        assert got[name] == pytest.approx(1, rel=1e-10)
    for name in ("first_component", "participation_ratio", "effective_rank"):
        assert got[name] == pytest.approx(1, rel=1e-10)
    assert got["displacement"] == pytest.approx(got["path_length"], rel=1e-10)
    assert got["path_length"] == pytest.approx(39 * length, rel=1e-10)


def test_jitter_turns_by_120_degrees():
    got = hallmarks(steps_of(jittering(60, 20_000)))
    assert got["mean_update_angle"] == pytest.approx(120, abs=0.3)
    assert got["mean_apex_angle_at_start"] == pytest.approx(60, abs=1)


def test_a_line_turns_by_0():
    got = hallmarks(steps_of(line(40, 60)))
    for name in ("mean_update_angle", "mean_angle_to_end", "mean_apex_angle_at_start"):
        assert got[name] == pytest.approx(0, abs=3e-6)


def test_a_closed_circle():
    steps = steps_of(circle(13, 30, period=12))
    got = hallmarks(steps)
    assert got["mean_update_angle"] == pytest.approx(360 / 12, rel=1e-10)
    assert got["displacement"] == pytest.approx(0, abs=1e-7)
    assert got["path_length"] == pytest.approx(12 * 2 * math.sin(math.pi / 12), rel=1e-10)
    open_circle = CURVES["explained_variance"].function(steps_of(circle(12, 30, period=12)))
    torch.testing.assert_close(open_circle[:3], torch.tensor([0.5, 0.5, 0]).double(), rtol=1e-10, atol=1e-12)
    # control: one step less, and start and end are not together
    assert hallmarks(steps_of(circle(12, 30, period=12)))["displacement"] > 0.5


def test_a_logarithmic_spiral():
    steps = steps_of(spiral(20, 30, turn=0.4, growth=0.93))
    angles, lengths = CURVES["update_angles"].function(steps), CURVES["update_lengths"].function(steps)
    torch.testing.assert_close(angles, torch.full_like(angles, math.degrees(0.4)), rtol=1e-10, atol=0)
    torch.testing.assert_close(lengths[1:], 0.93 * lengths[:-1], rtol=1e-10, atol=0)
    growth = complex(0.93 * math.cos(0.4), 0.93 * math.sin(0.4))
    assert float(SCALARS["displacement"].function(steps)) == pytest.approx(abs(growth**19 - 1), rel=1e-10)


def test_a_random_walk_has_its_values():
    n, p = 101, 20_000
    steps = steps_of(walk(n, p) + 5 * normal(p, seed=1))
    for name, hallmark in ALL.items():
        expected = hallmark.walk(n)
        if expected is not None:
            hallmark_is, atol = hallmark.function(steps), 3 if hallmark.unit == "°" else 0.05
            torch.testing.assert_close(hallmark_is, expected, rtol=0.03, atol=atol, equal_nan=True, msg=name)
    other = hallmarks(steps_of(jittering(n, p)))  # control
    for name in ("mds_relative", "displacement_ratio", "mean_update_angle", "first_component"):
        expected = SCALARS[name].walk(n)
        assert expected is not None
        assert other[name] != pytest.approx(float(expected), rel=0.15)


def test_walks_and_lines_have_the_published_limits():
    n = 401
    expected = {
        "mds_relative": 2 / 3,
        "displacement_ratio": 1 / math.sqrt(n - 1),
        "mean_update_angle": 90,
        "participation_ratio": 5 / 2,
        "first_component": 6 / math.pi**2,
    }
    for name, value in expected.items():
        assert float(SCALARS[name].walk(n)) == pytest.approx(value, rel=3e-3)  # type: ignore[arg-type]
    shares = CURVES["explained_variance"].walk(n)
    k = torch.arange(1, 6)
    torch.testing.assert_close(shares[:5], 6 / (math.pi * k.double()) ** 2, rtol=2e-3, atol=0)  # type: ignore[index]
    t = torch.arange(1, n)
    cosines = (torch.minimum(t[:, None], t) / torch.maximum(t[:, None], t)).sqrt().double()
    torch.testing.assert_close(MAPS["relative_map"].walk(n), cosines, rtol=1e-6, atol=1e-6)
    for name in ("mds_relative", "mds_relative_off", "displacement_ratio", "participation_ratio"):
        assert float(SCALARS[name].line(n)) == pytest.approx(1, rel=1e-10)  # type: ignore[arg-type]
    assert hallmarks(jitter(n))["mean_update_angle"] == pytest.approx(120, rel=1e-10)


def test_only_what_motion_alone_decides_has_references():
    moved = steps_of(10 * walk(12, 500) + 100 * normal(500, seed=3))
    steps = steps_of(walk(12, 500))
    for name, hallmark in ALL.items():
        same = torch.allclose(
            hallmark.function(moved), hallmark.function(steps), rtol=1e-6, atol=1e-6, equal_nan=True
        )
        assert same == hallmark.referenced, name
        assert (hallmark.walk(12) is None) == (hallmark.line(12) is None) == (not hallmark.referenced)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 9), st.integers(3, 15))
def test_rotations_change_nothing_and_scales_only_lengths(seed: int, n: int, p: int):
    points = walk(n, p, seed=seed)
    rotation = torch.linalg.qr(normal(p, p, seed=seed + 1)).Q
    original = values(steps_of(points))
    turned, scaled = values(steps_of(points @ rotation)), values(steps_of(8 * points))
    for name, hallmark in ALL.items():
        factor = 8 if hallmark.unit == "weight" else 1
        for got, expected in ((turned, original[name]), (scaled, factor * original[name])):
            torch.testing.assert_close(got[name], expected, rtol=1e-7, atol=1e-5, equal_nan=True, msg=name)


def test_a_translation_changes_what_is_seen_from_the_origin():
    points = walk(9, 40)
    original, moved = values(steps_of(points)), values(steps_of(points + 5))
    for name in ("update_map", "relative_map", "distance_map", "update_angles", "mds_relative"):
        torch.testing.assert_close(moved[name], original[name], rtol=1e-9, atol=1e-9)
    for name in ("trajectory_map", "angle_map", "mds", "norms", "radial_updates"):  # control
        assert not torch.allclose(moved[name], original[name], rtol=1e-2, equal_nan=True), name


def test_layers_add_up_to_the_whole():
    points = walk(9, 60)
    layers = [steps_of(part) for part in points.split([7, 20, 33], dim=1)]
    whole = values(steps_of(points))
    for name, got in values(sum_of(layers)).items():
        torch.testing.assert_close(got, whole[name], rtol=1e-9, atol=1e-6, equal_nan=True)
    mean = torch.stack([SCALARS["mds_relative"].function(layer) for layer in layers]).mean()
    assert float(mean) != pytest.approx(
        float(whole["mds_relative"]), rel=1e-4
    )  # control: hallmarks do not add


@pytest.mark.parametrize("name", ALL)
def test_batches_equal_loops(name: str):
    paths = [steps_of(PATHS[path]) for path in ("walk", "spiral", "jitter")]
    batch = Gram(
        *(torch.stack([getattr(path, side) for path in paths]) for side in ("cross", "left", "right"))
    )
    expected = torch.stack([ALL[name].function(path) for path in paths])
    torch.testing.assert_close(ALL[name].function(batch), expected, rtol=1e-9, atol=1e-6, equal_nan=True)


def test_late_update_angles_need_the_steps_and_not_the_positions():
    start, small = normal(1, 200_000), 1e-7
    points = start + small * normal(41, 200_000, seed=1).cumsum(0)
    steps = steps_of(points)
    expected = direct_update_angles(points)
    from_steps = CURVES["update_angles"].function(steps)
    from_positions = CURVES["update_angles"].function(steps_from_positions(positions(steps)))
    torch.testing.assert_close(from_steps, expected, rtol=1e-8, atol=0)
    assert (from_positions - expected).abs().max() > 1  # degrees


def direct_update_angles(points: Tensor) -> Tensor:
    updates = points.diff(dim=0)
    return torch.nn.functional.cosine_similarity(updates[1:], updates[:-1]).arccos().rad2deg()


def test_two_checkpoints_are_a_path():
    got = hallmarks(steps_of(walk(2, 50)))
    missing = {name for name, value in got.items() if math.isnan(value)}
    assert missing == {
        "mds_relative_off",
        "mean_update_angle",
        "mean_update_cosine",
        "mean_apex_angle_at_start",
    }
    for name in ("displacement_ratio", "mds_relative", "participation_ratio", "effective_rank"):
        assert got[name] == pytest.approx(1, rel=1e-10)
    for name, hallmark in ALL.items():
        assert hallmark.function(steps_of(walk(2, 50))).shape == direct(walk(2, 50))[name].shape


def test_what_does_not_move_has_no_direction():
    points = walk(8, 50)
    points[1] = points[0]
    steps = steps_of(points)
    assert hallmarks(steps)["mds_relative"] == pytest.approx(
        float(direct(points[1:])["mds_relative"]), rel=1e-10
    )
    assert CURVES["update_angles"].function(steps).isnan().tolist() == [True] + 5 * [False]
    frozen = hallmarks(steps_of(points[:1].expand(6, 50)))
    for name in ("mds_relative", "displacement_ratio", "mean_update_angle", "participation_ratio"):
        assert math.isnan(frozen[name])
    assert frozen["mds"] == pytest.approx(1)
    assert frozen["path_length"] == 0


def test_nan_is_not_hidden():
    points = walk(6, 20)
    points[3, 5] = torch.nan
    assert all(math.isnan(value) for value in hallmarks(steps_of(points)).values())


def test_what_is_no_path_is_refused():
    with pytest.raises(InputError, match="at least 2 checkpoints"):
        hallmarks(steps_of(walk(1, 5)))
    single = steps_of(walk(4, 5))
    with pytest.raises(InputError, match="one path"):
        hallmarks(Gram(single.cross[None], single.left[None], single.right[None]))


def test_time_weights_undo_a_crowded_start():
    points = line(65, 40, seed=2) + 0.5 * walk(65, 40)
    dense = list(range(65))
    crowded = [*range(16), *range(16, 65, 8)]
    truth = time_weighted(steps_of(points), dense)
    steps = steps_of(points[crowded])
    weighted, plain = time_weighted(steps, crowded), hallmarks(steps)
    for name, unweighted in (("mds_by_time", "mds"), ("mds_relative_by_time", "mds_relative")):
        assert abs(weighted[name] - truth[name]) < 0.3 * abs(plain[unweighted] - truth[name])
    with pytest.raises(InputError, match="increasing times"):
        time_weighted(steps, crowded[::-1])
    with pytest.raises(InputError, match="22 rows needs 22"):
        time_weighted(steps_of(points[:22]), dense)
