import math

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report.doubt import detection, error_by_confidence
from gramian.report.style import save

XS = (0.0, 0.5, 1.0)
ROWS = {"one": [(0.4, 0.2, 0.1), (0.2, 0.1, None)], "two": [(0.5, 0.5, 0.5)]}


def test_a_line_is_the_mean_over_seeds_and_its_band_their_range() -> None:
    (axes,) = error_by_confidence(ROWS, XS).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(lines) == {"one", "two"}
    np.testing.assert_allclose(lines["one"], [(0, 0.3), (0.5, 0.15), (1, 0.1)])
    np.testing.assert_allclose(lines["two"][:, 1], 0.5)
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(np.round(corner, 9)) for corner in corners} == {
        (0.0, 0.2), (0.0, 0.4), (0.5, 0.1), (0.5, 0.2), (1.0, 0.1)
    }  # fmt: skip
    assert axes.get_legend() is not None
    assert [text.get_text() for text in axes.get_legend().texts] == ["one", "two"]


def test_what_no_seed_has_is_left_out() -> None:
    (axes,) = error_by_confidence({"one": [(0.3, None, math.nan), (0.1, 0.2, None)]}, XS).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [(0, 0.2), (0.5, 0.2)])


def test_detection_shows_chance() -> None:
    (axes,) = detection({"one": [(0.0, 0.9, 1.0)]}, XS).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["chance"], [(0, 0), (1, 1)])
    np.testing.assert_allclose(lines["one"][:, 1], (0, 0.9, 1))


def test_equal_figures_have_equal_bytes(tmp_path) -> None:
    for name in ("a.svg", "b.svg"):
        save(detection(ROWS, XS), tmp_path / name)
    save(detection({**ROWS, "two": [(0.5, 0.5, 0.6)]}, XS), tmp_path / "c.svg")
    contents = [(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg", "c.svg")]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("draw", [error_by_confidence, detection])
def test_what_cannot_be_drawn_is_refused(draw) -> None:
    with pytest.raises(InputError, match="at least one method"):
        draw({}, XS)
    for rows in ([], [(0.1, 0.2)], [(0.1, 0.2, 0.3), (0.1,)]):
        with pytest.raises(InputError, match="row for every seed"):
            draw({"one": rows}, XS)
