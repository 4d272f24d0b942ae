import math

import pytest

from gramian.errors import InputError
from gramian.report.overlay import Overlay, overlay


def drawn(figure) -> list:
    return figure.axes[0].get_lines()


def test_lines_dots_and_bars() -> None:
    one = Overlay(range(4), [1, 2, 4, 8], [[1, 2, 4, 9], [1, 2, 3, 7], [1, 3, 5, 8]])
    lines = drawn(overlay({"limit": one}, x="layer", y="second moment", log=True))
    assert list(lines[0].get_ydata()) == [1, 2, 4, 8]
    dots = [line for line in lines if line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in dots] == [1, 2, 4, 8]  # medians
    bars = [list(line.get_ydata()) for line in lines[1:] if line.get_marker() != "o"]
    assert [7, 9] in bars
    assert len(drawn(overlay({"limit": Overlay(range(4), [1, 2, 4, 8])}, x="layer", y="y"))) == 1


def test_what_is_not_finite_is_left_out() -> None:
    grown = Overlay(range(3), [1, 1e300, math.inf], [[1, math.inf, math.nan]])
    lines = drawn(overlay({"limit": grown}, x="layer", y="y", log=True))
    assert math.isnan(lines[0].get_ydata()[2])
    assert sum(line.get_marker() == "o" for line in lines) == 1


def test_long_depths_show_some_layers() -> None:
    many = Overlay(range(1001), [1.0] * 1001, [[1.0] * 1001])
    lines = drawn(overlay({"limit": many}, x="layer", y="y"))
    assert 20 <= sum(line.get_marker() == "o" for line in lines) <= 30


def test_lengths_that_disagree() -> None:
    with pytest.raises(InputError, match="as many values"):
        overlay({"limit": Overlay(range(3), [1, 2])}, x="layer", y="y")
    with pytest.raises(InputError, match="at least one"):
        overlay({}, x="layer", y="y")
