import math

import pytest

from gramian.errors import InputError
from gramian.report.scatter import pareto_front, scatter


def test_the_front_holds_what_nothing_beats() -> None:
    points = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (3.0, 1.0), "beaten": (2.0, 3.0), "far": (4.0, 1.0)}
    assert pareto_front(points) == ["a", "b", "c"]
    assert pareto_front({**points, "best": (0.0, 0.0)}) == ["best"]
    assert pareto_front({"a": (1.0, 1.0), "twin": (1.0, 1.0)}) == ["a", "twin"]
    assert pareto_front({"lost": (math.nan, 0.0), "a": (1.0, 1.0)}) == ["a"]


def test_every_point_is_drawn_or_named_as_not_finite() -> None:
    points = {"a": (1.0, 0.1), "b": (18.0, -0.2), "lost": (math.nan, 0.0)}
    figure = scatter(points, x="kurtosis", y="loss", chosen=["a"], log=True)
    texts = [text.get_text() for text in figure.texts]
    assert {"a", "b", "not finite: lost"} <= set(texts)
    (axes,) = figure.axes
    sizes = {
        tuple(line.get_xydata()[0]): line.get_markersize()
        for line in axes.lines
        if len(line.get_xdata()) == 1
    }
    assert sizes == {(1.0, 0.1): 8, (18.0, -0.2): 5}
    with pytest.raises(InputError, match="at least one point"):
        scatter({}, x="x", y="y")
