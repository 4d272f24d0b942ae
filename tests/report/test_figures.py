"""Figures of awkward data: what is drawn, what is named, and nothing that warns."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gramian.errors import InputError
from gramian.report import curves, dumbbells, final_profile, gains, palette, profiles_over_time
from gramian.report.canvas import drawable, limits, spread
from gramian.report.style import inline

NAN, INF = math.nan, math.inf
DATA = {
    "usual": [3.0, 2.0, 1.5],
    "empty": [],
    "one": [2.0],
    "all nan": [NAN, NAN],
    "diverged": [3.0, 40.0, INF],
    "hole": [3.0, NAN, 1.0],
    "flat": [2.0, 2.0, 2.0],
    "zero": [0.0, 0.0],
    "negative": [-3.0, 1.0, 2.0],
    "huge": [1e-300, 1e300, 1.0],
    "wide": [1e-90, 1.0, 1e90],
    "close": [1.0, 1.0 + 1e-15],
}


def texts(figure):
    inline(figure, "f1", "A figure.")
    return [text.get_text() for text in figure.texts]


def points(values):
    return list(range(len(values))), values


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", DATA.values(), ids=DATA)
def test_every_figure_draws_awkward_values(values, log):
    series = {"a": values}
    rows = [[value, 1.0] for value in values]
    pair = (values[0], values[-1]) if values else (NAN, NAN)
    for figure in (
        curves({"a": points(values)}, x="step", y="loss", references={"entropy": 2.0, "none": NAN}, log=log),
        final_profile(series, y="kurtosis", log=log),
        profiles_over_time({"a": (list(range(len(values))), rows)}, reading="kurtosis", log=log),
        dumbbells({"a": pair}, value="loss", before="float32", after="int8"),
        gains({"a": {"identity": points(values)}, "b": {}}, y="gain", log=log),
    ):
        assert "a" in " ".join(texts(figure))


@pytest.mark.parametrize("count", [1, 2, 12])
def test_every_figure_draws_any_number_of_series(count):
    names = [f"a_long_name_of_block_{index}" for index in range(count)]
    series = {name: [1.0 + index, 2.0, 1.0] for index, name in enumerate(names)}
    for figure in (
        curves({name: points(values) for name, values in series.items()}, x="step", y="loss"),
        final_profile(series, y="kurtosis"),
        profiles_over_time(
            {name: ([0, 1, 5], [[value] * 4 for value in values]) for name, values in series.items()},
            reading="k",
        ),
        dumbbells(
            {name: (values[0], 3.0) for name, values in series.items()}, value="l", before="b", after="a"
        ),
        gains({name: {"g": points(values)} for name, values in series.items()}, y="gain"),
    ):
        shown = texts(figure)
        assert all(name in shown for name in names)


def test_more_series_than_fit_make_the_figure_taller():
    series = {f"block {index}": points([1.0 + index, 2.0]) for index in range(30)}
    assert set(series) <= set(texts(figure := curves(series, x="step", y="loss")))
    assert figure.get_figheight() > curves({"a": points([1.0])}, x="step", y="loss").get_figheight()


def test_a_line_that_ends_in_no_number_says_so():
    series = {
        "good": points([3.0, 2.0]),
        "bad": points([3.0, NAN]),
        "late": points([NAN, 2.0]),
        "void": points([]),
    }
    shown = texts(curves(series, x="step", y="loss"))
    assert {"good", "bad: not finite", "late", "void: none"} <= set(shown)


def test_a_reference_is_named_with_its_level_and_inside_the_axes():
    figure = curves({"a": points([3.0, 2.0])}, x="step", y="loss", references={"entropy": 7.25})
    assert "entropy 7.25" in texts(figure)
    assert figure.axes[0].get_ylim()[1] > 7.25


def test_colours_agree_between_figures_and_with_those_passed():
    names = ["a", "b", "c"]
    colours = palette(names)
    figure = curves({"c": points([1.0, 2.0])}, x="step", y="loss", colours=colours)
    assert figure.axes[0].lines[0].get_color() == colours["c"] != palette(["c"])["c"]
    with pytest.raises(InputError, match="'d'"):
        curves({"d": points([1.0])}, x="step", y="loss", colours=colours)


def test_panels_share_one_scale_and_the_deepest_layer_is_on_top():
    figure = profiles_over_time({"a": ([0, 10], [[1, 2], [3, 4]]), "b": ([0], [[100.0, NAN]])}, reading="k")
    meshes = [axes.collections[0] for axes in figure.axes[:2]]
    first, second = (np.ma.asarray(mesh.get_array()) for mesh in meshes)
    assert [mesh.get_clim() for mesh in meshes] == [(1.0, 100.0)] * 2
    assert first.tolist() == [[1.0, 3.0], [2.0, 4.0]]
    assert second.ravel().tolist() == [100.0, None]


def test_gap_is_written_beside_the_dumbbell():
    shown = texts(
        dumbbells({"a": (4.0, 4.1), "b": (4.0, 3.9), "c": (4.0, INF)}, value="l", before="f", after="q")
    )
    assert {"+0.100 (+2.50 %)", "−0.100 (−2.50 %)", "not finite"} <= set(shown)


def test_a_gain_has_the_same_dashes_in_every_panel():
    line = points([1.0, 2.0])
    figure = gains({"a": {"p": line, "q": line}, "b": {"q": line}}, y="gain")
    first, second = ([line.get_linestyle() for line in axes.lines[::2]] for axes in figure.axes)
    assert (first, second) == (["-", "--"], ["--"])


def test_input_errors():
    with pytest.raises(InputError, match="at least one series"):
        curves({}, x="step", y="loss")
    with pytest.raises(InputError, match="as many x as y"):
        curves({"a": ([0, 1], [1.0])}, x="step", y="loss")
    with pytest.raises(InputError, match="row of equal length"):
        profiles_over_time({"a": ([0, 1], [[1.0], [1.0, 2.0]])}, reading="k")


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=12),
    st.floats(1, 20),
)
def test_spread_keeps_order_gap_and_bounds(targets, gap):
    places = spread(targets, gap, 0.0, 100.0)
    allowed = min(gap, 100 / max(len(targets) - 1, 1))
    ordered = [place for _, place in sorted(zip(targets, places, strict=True))]
    assert min(places) >= -1e-9
    assert max(places) <= 100 + 1e-9
    assert all(later - earlier >= allowed - 1e-9 for earlier, later in pairwise(ordered))


def test_spread_leaves_what_is_apart_and_shares_the_rest():
    assert spread([10.0, 50.0, 90.0], 14.0, 0.0, 100.0) == [10.0, 50.0, 90.0]
    assert spread([50.0, 50.0], 14.0, 0.0, 100.0) == pytest.approx([43.0, 57.0])


@settings(deadline=None)
@given(st.lists(st.floats(), max_size=5), st.booleans())
def test_limits_are_never_empty_and_hold_all_that_is_drawn(values, log):
    array = drawable(values, log)
    low, high = limits(array, log)
    assert 0 < high - low < INF
    assert not log or low > 0
    shown = array[np.isfinite(array)]
    assert ((low <= shown) & (shown <= high)).all()
