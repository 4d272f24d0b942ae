import math

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report import save
from gramian.report.intervals import DRAWN, against_truth, doubt, reliability, thinned


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def dots(figure) -> list[tuple[list[float], list[float]]]:
    """Return x and y of every set of dots on the axes."""
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]


def test_intervals_that_hold_the_truth_and_those_that_miss_it() -> None:
    figure = against_truth([3, 1, 2], [3.5, 1.1, 4], [2, 0, 3], [4, 1, 5], name="price")
    assert dots(figure) == [([1, 3], [1.1, 3.5]), ([2], [4])]  # an end counts as inside
    held, missed = figure.axes[0].collections
    assert [segment[:, 1].tolist() for segment in held.get_segments()] == [[0, 1], [2, 4]]
    assert [segment[:, 1].tolist() for segment in missed.get_segments()] == [[3, 5]]
    assert {"truth inside the interval (2)", "outside (1)", "price, predicted"} <= set(texts(figure))
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim()


def test_a_very_wide_interval_does_not_squeeze_the_drawing() -> None:
    truth = np.linspace(0, 1, 50).tolist()
    low, high = [value - 0.1 for value in truth], [value + 0.1 for value in truth]
    narrow = against_truth(truth, truth, low, high, name="y").axes[0].get_ylim()
    wide = against_truth(truth, truth, [-1e6, *low[1:]], high, name="y").axes[0].get_ylim()
    assert wide == pytest.approx(narrow, abs=0.1)


def test_of_many_rows_some_are_drawn() -> None:
    rows = np.arange(3000.0).tolist()
    figure = against_truth(rows, rows, rows, rows, name="y")
    (inside, _), (outside, _) = dots(figure)
    assert len(inside) == DRAWN
    assert (inside[0], inside[-1]) == (0, 2999)
    assert outside == []
    assert {"truth inside the interval (3,000)", "outside (0)"} <= set(texts(figure))
    assert thinned(5).tolist() == [0, 1, 2, 3, 4]


def test_predictions_that_do_not_fit() -> None:
    for rows in (([], [], [], []), ([1], [1, 2], [1], [1])):
        with pytest.raises(InputError, match="for each of one row or more"):
            against_truth(*rows, name="y")


def test_reliability_has_a_band_round_the_diagonal() -> None:
    levels, errors = [0.2, 0.5, 0.9], [0.04, 0.05, 0.03]
    figure = reliability(levels, {"one": [0.1, 0.5, 0.95], "other": [0.3, 0.6, 0.9]}, errors)
    assert dots(figure) == [(levels, [0.1, 0.5, 0.95]), (levels, [0.3, 0.6, 0.9])]
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices.tolist()
    for corner in ([0.2, 0.12], [0.2, 0.28], [0.5, 0.4], [0.9, 0.96], [0, 0], [1, 1]):
        assert any(np.allclose(corner, each) for each in corners), corner
    diagonal = figure.axes[0].get_lines()[0]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert {"one", "other"} <= set(texts(figure))


@pytest.mark.parametrize("series", [{}, {"one": [0.1]}])
def test_reliability_that_does_not_fit(series) -> None:
    with pytest.raises(InputError, match="a share and an error for each level"):
        reliability([0.2, 0.5], series, [0.1, 0.1])


def test_rows_beyond_the_threshold_stand_out() -> None:
    figure = doubt({"test rows": [1.0, 3.0], "none": [], "new rows": [5.0, 2.0, 2.5]}, 2.4, name="price")
    known, strange = dots(figure)[:2]
    assert known[1][0] == 1
    assert math.isnan(known[1][1])
    assert strange == ([0.75], [3])
    assert dots(figure)[3] == ([1 + 0.5 / 3, 1 + 2.5 / 3], [5, 2.5])
    said = texts(figure)
    assert {"out of distribution (3)", "2 test rows, in order", "3 new rows, in order"} <= set(said)
    assert any("threshold 2.4" in each for each in said)
    assert figure.axes[0].get_yscale() == "log"


def test_all_strange_rows_of_many_are_drawn() -> None:
    values = [1.0] * 5000
    values[1234] = 9.0
    known, strange = dots(doubt({"rows": values}, 2.0, name="y"))
    assert len(known[0]) == DRAWN
    assert strange[1] == [9]
    none = doubt({"rows": [0.0, 0.0]}, 0.0, name="y")  # models that agree exactly
    assert "out of distribution (0)" in texts(none)
    with pytest.raises(InputError, match="at least one row"):
        doubt({"rows": []}, 1.0, name="y")


def test_the_same_figure_gives_the_same_bytes(tmp_path) -> None:
    for name in ("a.svg", "b.svg"):
        save(reliability([0.5], {"<b>": [0.4]}, [0.1]), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
