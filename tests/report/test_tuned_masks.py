"""Errors by density and way: what is drawn, and what is refused."""

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report.tuned_masks import tuned_masks

PANELS = {
    "random": {
        "untouched": {0.5: [50.0, 60.0], 0.1: [90.0, 92.0]},
        "learnt": {0.5: [2.0, 3.0], 0.1: [4.0, 8.0]},
    },
    "magnitude": {"learnt": {0.1: [3.0, 3.0]}},
}


def test_means_and_ranges_are_drawn_in_a_panel_for_each_start() -> None:
    figure = tuned_masks(PANELS, dense=2.5)
    first, second = figure.axes
    line, learnt = (container[0] for container in first.containers)
    assert list(line.get_xdata()) == [0.5, 0.1]
    assert list(line.get_ydata()) == [55.0, 91.0]
    assert list(learnt.get_ydata()) == [2.5, 6.0]
    bars = first.containers[1][2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[2, 3], [4, 8]])
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim()[0] > first.get_xlim()[1]  # sparser is further right
    assert len(second.containers) == 1
    assert second.containers[0][0].get_color() == learnt.get_color()
    texts = {text.get_text() for text in figure.texts}
    assert {"random", "magnitude", "untouched", "learnt"} <= texts


@pytest.mark.parametrize(
    ("panels", "dense"),
    [({}, 1.0), ({"a": {}}, 1.0), ({"a": {"b": {0.5: [0.0]}}}, 1.0), ({"a": {"b": {0.5: [1.0]}}}, 0.0)],
)
def test_what_has_no_logarithm_is_refused(panels, dense: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        tuned_masks(panels, dense)
