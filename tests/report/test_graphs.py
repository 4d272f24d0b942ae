"""Scores of networks by seed and reach by layer: what is drawn, and what is refused."""

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report.graphs import reach, seed_scores


def test_every_seed_is_a_dot_and_the_mean_a_bar() -> None:
    figure = seed_scores({"gred": [0.1, 0.3], "gine": [0.4]}, value="test MAE", constant=0.5)
    (axes,) = figure.axes
    dots = [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"]
    assert dots == [[0.1, 0.3], [0.4]]
    bars = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linewidth() == 2]
    assert bars == pytest.approx([0.2, 0.4])
    texts = {text.get_text() for text in figure.texts}
    assert {"gred", "gine", "0.200 ± 0.14", "0.400", "best constant: 0.5, dotted"} <= texts


def test_a_constant_far_away_is_named_and_not_drawn() -> None:
    near = seed_scores({"a": [1.0, 1.1]}, value="x", constant=1.3)
    far = seed_scores({"a": [1.0, 1.1]}, value="x", constant=50.0)
    assert near.axes[0].get_xlim()[1] > 1.3
    assert far.axes[0].get_xlim()[1] < 2
    assert any("beyond the drawing" in text.get_text() for text in far.texts)
    assert not any("beyond" in text.get_text() for text in near.texts)


def test_means_quantiles_and_starts_are_drawn_layer_by_layer() -> None:
    k = np.arange(5)[:, None]
    trained = [np.linspace(0.1, 0.9, 11) ** k, np.linspace(0.5, 0.9, 11) ** k, np.full(11, 0.8) ** k]
    start = [0.5 * np.ones(11) ** k for _ in trained]
    figure = reach(trained, start)
    assert len(figure.axes) == 3
    for axes, now, before in zip(figure.axes, trained, start, strict=True):
        mean, dashed = axes.get_lines()
        np.testing.assert_allclose(mean.get_ydata(), now.mean(1))
        np.testing.assert_allclose(dashed.get_ydata(), before.mean(1))
        band = axes.collections[0].get_paths()[0].vertices
        assert band[:, 1].max() == pytest.approx(1)
        last = band[np.isclose(band[:, 0], 4), 1]
        assert (last.min(), last.max()) == pytest.approx(tuple(np.quantile(now[4], (0.1, 0.9))))
    names = [text.get_text() for text in figure.texts]
    assert [f"layer {number}" in names for number in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize("scores", [{}, {"a": []}])
def test_no_scores_are_refused(scores) -> None:
    with pytest.raises(InputError, match="at least one network and a seed"):
        seed_scores(scores, value="x", constant=1.0)


@pytest.mark.parametrize(
    ("trained", "start", "words"),
    [
        ([], [], "needs layers"),
        ([np.ones((3, 2))], [], "needs layers"),
        ([np.ones((3, 2))], [np.ones((2, 2))], "of equal distances"),
        ([np.ones((1, 2))], [np.ones((1, 2))], "at least two distances"),
    ],
)
def test_no_reach_is_refused(trained, start, words) -> None:
    with pytest.raises(InputError, match=words):
        reach(trained, start)
