"""Panels of ensembles beside their laws."""

import pytest

from gramian.errors import InputError
from gramian.report.toy_ensembles import Panel, panels

XS = [-1.0, 0.0, 1.0]


def panel(name: str, **changed) -> Panel:
    rows = {
        "mean": [0.0, 1.0, 2.0],
        "deviation": [1.0] * 3,
        "limit_mean": [1e9, 1.0, 2.0],
        "limit": [2.0] * 3,
    }
    return Panel(name, **{**rows, **changed})


def test_a_panel_for_each_method() -> None:
    figure = panels(XS, [panel("one"), panel("two"), panel("three")], [0.0], [1.0])
    assert len(figure.axes) == 3
    assert {text.get_text() for text in figure.texts} >= {"one", "two", "three"}
    for axes in figure.axes:
        assert len(axes.collections) == 1  # the shade
        assert len(axes.lines) == 5  # mean, three of the law, data
        assert axes.get_ylim() == (-7.0, 7.0)


def test_rows_have_to_fit() -> None:
    for shown in (
        [],
        *([panel("short", **{row: [1.0]})] for row in ("mean", "deviation", "limit_mean", "limit")),
    ):
        with pytest.raises(InputError, match="as many values as xs"):
            panels(XS, shown, [0.0], [1.0])
