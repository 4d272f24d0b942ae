"""Figures of pruned networks: what is drawn by density, layer, step and prior fraction, and its names."""

import math
from itertools import pairwise

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report.pruning import (
    CERTIFICATE,
    ERROR,
    FIXED,
    OF_PRIOR,
    OF_TEST_SET,
    PRIOR,
    RANDOM,
    START,
    TEST_SET,
    DensityPath,
    PriorPath,
    density_path,
    layer_densities,
    prior_fractions,
    probabilities_over_time,
)
from gramian.report.style import MUTED, inline, palette, save

NAN, INF = math.nan, math.inf
PATH = DensityPath(
    densities=[0.05, 0.5, 0.1],
    baseline=[0.5, 0.03, 0.2],
    random=[0.05, 0.025, 0.03],
    fixed=[0.04, 0.022, 0.026],
    certificate=[0.2, 0.06, 0.1],
    prior=[0.6, 0.07, NAN],
    test_set=[NAN, 0.05, 0.08],
)


def texts(figure):
    inline(figure, "f1", "A figure.")
    return [text.get_text() for text in figure.texts]


def drawn(axes):
    """The lines of axes that have marks, as (colour, mark) -> (xs, ys)."""
    lines = [line for line in axes.lines if line.get_marker() not in ("", "None")]
    return {(line.get_color(), line.get_marker()): np.array(line.get_data()) for line in lines}


def same(first, second):
    return np.array_equal(np.array(first, dtype=float), np.array(second, dtype=float), equal_nan=True)


def test_a_density_path_is_drawn_from_dense_to_sparse() -> None:
    figure = density_path(PATH, 0.021)
    (axes,) = figure.axes
    found = drawn(axes)
    xs = [0.5, 0.1, 0.05]
    expected = {
        (START, ERROR["marker"]): [0.03, 0.2, 0.5],
        (RANDOM, ERROR["marker"]): [0.025, 0.03, 0.05],
        (FIXED, ERROR["marker"]): [0.022, 0.026, 0.04],
        (RANDOM, CERTIFICATE["marker"]): [0.06, 0.1, 0.2],
        (PRIOR, OF_PRIOR["marker"]): [0.07, NAN, 0.6],
        (TEST_SET, OF_TEST_SET["marker"]): [0.05, 0.08, NAN],
    }
    assert set(found) == set(expected)
    for key, values in expected.items():
        assert same(found[key], [xs, values])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    (level,) = [line for line in axes.lines if line.get_color() == MUTED]
    assert set(level.get_ydata()) == {0.021}
    names = {"starting mask", "random predictor", "fixed mask", "certificate", "prior's certificate"}
    assert {*names, "test-set bound", "dense 2.1 %", "0-1 error"} <= set(texts(figure))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5 %", "10 %", "50 %"]


def test_errors_have_full_lines_and_bounds_broken_ones() -> None:
    figure = density_path(PATH, 0.021)
    styles = {line.get_marker(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles[ERROR["marker"]] == "-"
    assert {styles[look["marker"]] for look in (CERTIFICATE, OF_PRIOR, OF_TEST_SET)} == {"--"}
    assert len({ERROR["marker"], CERTIFICATE["marker"], OF_PRIOR["marker"], OF_TEST_SET["marker"]}) == 4


def test_a_path_without_certificates_names_none() -> None:
    path = DensityPath([0.5, 0.1], [0.03, 0.2], [0.02, 0.03], [0.02, 0.03], prior=[NAN, NAN])
    said = texts(density_path(path, 0.02, y="clipped next-token loss"))
    assert "clipped next-token loss" in said
    assert not {"certificate", "prior's certificate", "test-set bound"} & set(said)


def test_the_errors_axis_is_linear_from_zero_where_one_is_zero_or_they_are_alike() -> None:
    for path in (
        DensityPath([0.5, 0.1], [0.0, 0.5], [0.01, 0.2], [0.0, 0.3]),
        DensityPath([0.5, 0.1], [0.2, 0.5], [0.2, 0.2], [0.2, 0.3]),
    ):
        axes = density_path(path, 0.2).axes[0]
        assert axes.get_yscale() == "linear"
        assert axes.get_ylim()[0] == 0


def test_one_density_is_readable() -> None:
    figure = density_path(DensityPath([0.1], [0.2], [0.03], [0.026], [1.0], [1.0]), 0.02)
    axes = figure.axes[0]
    texts(figure)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10 %"]
    assert axes.get_xlim()[0] > 0.1 > axes.get_xlim()[1]
    assert axes.get_ylim()[1] > 1.0


def heights(figure, names):
    """Places of some names from the lower edge, in points."""
    height = figure.get_size_inches()[1] * 72
    return sorted(text.get_position()[1] * height for text in figure.texts if text.get_text() in names)


def test_names_of_like_errors_are_moved_apart() -> None:
    path = DensityPath([0.5, 0.1], [0.03, 0.02], [0.03, 0.02], [0.03, 0.02], [0.03, 0.02], [0.3, 0.02])
    names = {"starting mask", "random predictor", "fixed mask", "certificate", "prior's certificate"}
    places = heights(density_path(path, 0.02), names)
    assert len(places) == 5
    assert min(np.diff(places)) >= 14.9


def test_densities_that_would_touch_are_not_named() -> None:
    densities = [0.5, 0.2, 0.1, 0.05, 0.049, 0.048, 0.02, 0.01, 0.0099]
    errors = [0.1] * len(densities)
    figure = density_path(DensityPath(densities, errors, errors, errors), 0.02)
    texts(figure)
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    boxes = sorted((box.x0, box.x1) for box in (label.get_window_extent() for label in labels))
    assert len(boxes) >= 4
    assert all(left[1] < right[0] for left, right in pairwise(boxes))


@pytest.mark.parametrize(
    "values", [[NAN, NAN], [INF, 0.1], [0.0, 0.0], [1e-300, 1.0], [0.1, 0.1], [-1.0, 2.0]]
)
def test_awkward_errors_are_drawn(values, tmp_path) -> None:
    path = DensityPath([0.5, 1.0], values, values, values, values, values, values)
    for dense in (NAN, 0.0, 0.1):
        save(density_path(path, dense), tmp_path / "figure.svg")


def test_density_paths_that_do_not_fit() -> None:
    for densities in ([], [0.0], [1.2], [NAN]):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            density_path(DensityPath(densities, [0.1], [0.1], [0.1]), 0.1)
    with pytest.raises(InputError, match="fixed mask"):
        density_path(DensityPath([0.1, 0.2], [0.1, 0.1], [0.1, 0.1], [0.1]), 0.1)
    with pytest.raises(InputError, match="test-set bound"):
        density_path(DensityPath([0.1], [0.1], [0.1], [0.1], test_set=[0.1, 0.2]), 0.1)


def test_layers_have_a_full_and_a_pale_bar() -> None:
    figure = layer_densities({"0": (0.05, 0.08), "2": (0.4, 0.3), "4": (0.9, 0.8)}, whole=0.1)
    (axes,) = figure.axes
    full = [bar for bar in axes.patches if bar.get_alpha() is None]
    pale = [bar for bar in axes.patches if bar.get_alpha() is not None]
    assert [bar.get_width() for bar in full] == [0.05, 0.4, 0.9]
    assert [bar.get_width() for bar in pale] == [0.08, 0.3, 0.8]
    for place, (one, other) in enumerate(zip(full, pale, strict=True)):
        assert place - 0.5 < one.get_y() < other.get_y() < place + 0.5
    assert axes.get_ylim() == (2.5, -0.5)  # the first layer on top
    (line,) = [line for line in axes.lines if set(line.get_xdata()) == {0.1}]
    assert line.get_color() == MUTED
    assert {"kept by the fixed mask", "mean probability", "whole model"} <= set(texts(figure))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "4"]
    assert "whole model" not in texts(layer_densities({"0": (0.0, 0.0)}))
    with pytest.raises(InputError, match="one layer or more"):
        layer_densities({})


@pytest.mark.parametrize("count", [1, 12, 72, 300])
def test_names_of_layers_do_not_touch(count) -> None:
    figure = layer_densities({f"blocks.{index}.up": (0.1, 0.2) for index in range(count)})
    texts(figure)
    assert len(figure.axes[0].patches) == 2 * count
    assert figure.get_size_inches()[1] * 72 < 1400
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    boxes = sorted((box.y0, box.y1) for box in boxes)
    assert len(boxes) >= min(count, 70)
    assert all(below[1] <= above[0] + 1 for below, above in pairwise(boxes))


def test_probabilities_are_cells_by_step_and_bin() -> None:
    steps, rows = [100, 0, 50], [[9, 0, 1], [0, 10, 0], [5, 5, 1000]]
    figure = probabilities_over_time(steps, rows, mean=[0.3, 0.5, 0.4], reading="weights")
    axes = figure.axes[0]
    cells = axes.collections[0].get_array()
    assert same(np.ma.filled(cells, NAN), np.array([[NAN, 10, NAN], [5, 5, 1000], [9, NAN, 1]]).T)
    assert (axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) == (1, 1000)
    assert type(axes.collections[0].norm).__name__ == "LogNorm"
    assert axes.get_ylim() == (0, 1)
    assert axes.get_xlim() == (-25, 125)
    assert all(same(line.get_data(), [[0, 50, 100], [0.5, 0.4, 0.3]]) for line in axes.lines)
    assert len(axes.lines) == 2
    assert {"weights", "probability λ ↑"} <= set(texts(figure))
    assert not probabilities_over_time(steps, rows).axes[0].lines


@pytest.mark.parametrize("rows", [[[0] * 20], [[7] * 20], [[10**9] + [0] * 19]])
def test_probabilities_of_one_step(rows, tmp_path) -> None:
    figure = probabilities_over_time([300], rows, mean=[0.2])
    save(figure, tmp_path / "figure.svg")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["300"]


def test_probabilities_that_do_not_fit() -> None:
    for steps, rows, mean in (
        ([], [], ()),
        ([0], [], ()),
        ([0, 1], [[1, 2]], ()),
        ([0, 1], [[1, 2], [1]], ()),
        ([0], [[1, 2]], [0.5, 0.5]),
    ):
        with pytest.raises(InputError, match="equally many bins"):
            probabilities_over_time(steps, rows, mean=mean)
    with pytest.raises(InputError, match="finite steps"):
        probabilities_over_time([NAN], [[1, 2]])


MASKS = PriorPath(
    fractions=[0.5, 0.0],
    certificate=[[0.1, 0.8], [0.2, 0.9], [NAN, 1.0]],
    error=[[0.03, 0.04], [0.05, 0.06], [0.04, 0.05]],
    prior=[[0.12, 0.95]],
    test_set=[[0.11, NAN]],
    kl=[[0.01, 0.1], [0.03, 0.3], [0.0, 0.2]],
)


def test_prior_fractions_are_means_and_ranges_over_seeds() -> None:
    figure = prior_fractions({"masks": MASKS, "both": MASKS})
    upper, lower = figure.axes[1], figure.axes[0]
    colours = palette(["masks", "both"])
    found, costs = drawn(upper), drawn(lower)
    assert len(found) == 8
    for name in ("masks", "both"):
        means = {
            CERTIFICATE["marker"]: [0.9, 0.15],
            ERROR["marker"]: [0.05, 0.04],
            OF_PRIOR["marker"]: [0.95, 0.12],
            OF_TEST_SET["marker"]: [NAN, 0.11],
        }
        for mark, values in means.items():
            xs, ys = found[colours[name], mark]
            assert same(xs, [0, 0.5])
            assert np.allclose(ys, values, rtol=1e-12, equal_nan=True)
        assert np.allclose(costs[colours[name], ERROR["marker"]], [[0, 0.5], [0.2, 0.04 / 3]])
    bars = [bars for bars in upper.collections if np.allclose(bars.get_color()[0][3], 0.3)]
    assert np.allclose(bars[0].get_segments()[0], [[0, 0.8], [0, 1.0]])
    assert np.allclose(bars[0].get_segments()[1], [[0.5, 0.1], [0.5, 0.2]])
    assert (upper.get_yscale(), lower.get_yscale()) == ("log", "log")
    assert upper.get_xlim() == lower.get_xlim()
    said = texts(figure)
    assert said.count("masks") == said.count("both") == 2
    assert {"certificate", "held-out error", "prior's certificate", "test-set bound"} <= set(said)


def test_a_series_keeps_the_colour_of_the_comparison() -> None:
    colours = palette(["other", "masks"])
    found = drawn(prior_fractions({"masks": MASKS}, colours=colours).axes[1])
    assert {colour for colour, _ in found} == {colours["masks"]}
    with pytest.raises(InputError, match="'masks'"):
        prior_fractions({"masks": MASKS}, colours=palette(["other"]))


@pytest.mark.parametrize("value", [NAN, 0.0, 1.0, INF])
def test_awkward_fractions_are_drawn(value, tmp_path) -> None:
    rows = [[value, value]]
    path = PriorPath([0.0, 0.9], rows, rows, [], [], rows)
    save(prior_fractions({"masks": path}), tmp_path / "figure.svg")


def test_prior_fractions_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="at least one series"):
        prior_fractions({})
    with pytest.raises(InputError, match="'masks'"):
        prior_fractions({"masks": PriorPath([0.5], [[0.1, 0.2]], [], [], [], [])})
