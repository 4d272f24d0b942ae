import math

import numpy as np
import pytest

from gramian.errors import InputError
from gramian.report import save
from gramian.report.distribution import Band, bands, histograms, percent, shares

NAMES = ("SDE", "networks")


def normal(count: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(size=count).tolist()


def steps(figure) -> list[tuple[np.ndarray, np.ndarray]]:
    return [patch.get_data()[:2] for patch in figure.axes[0].patches]


def texts(figure) -> list[str]:
    return [text.get_text() for text in (*figure.texts, *figure.axes[0].texts)]


def test_densities_are_shares_of_all_values_by_width() -> None:
    filled, outlined = normal(3000, 0), [*normal(300, 1), math.nan, math.inf]
    drawn = steps(histograms(filled, outlined, x="x", names=NAMES))
    assert len(drawn) == 2
    borders = drawn[0][1]
    assert np.array_equal(borders, drawn[1][1])
    for (density, _), sample in zip(drawn, (filled, outlined[:300]), strict=True):
        for value, low, high in zip(density, borders[:-1], borders[1:], strict=True):
            last = high == borders[-1]
            inside = sum(low <= each < high or (last and each == high) for each in sample)
            assert value == pytest.approx(inside / len(sample) / (high - low))
        assert 0.98 < (density * np.diff(borders)).sum() <= 1 + 1e-12
    assert len(borders) - 1 == round(1.2 * math.sqrt(300))


def test_a_far_value_does_not_squeeze_the_histogram() -> None:
    drawn = steps(histograms([*normal(3000, 0), 1e6], normal(100, 1), x="x", names=NAMES))
    assert drawn[0][1].max() < 5


def test_one_sample_alone() -> None:
    for samples in ((normal(50, 0), []), ([], normal(50, 0))):
        figure = histograms(*samples, x="x", names=NAMES)
        assert len(steps(figure)) == 1
        assert set(NAMES) - set(texts(figure)) == {NAMES[bool(samples[0])]}
    assert len(steps(histograms([0.3] * 20, [], x="x", names=NAMES))) == 1
    with pytest.raises(InputError, match="at least one finite value"):
        histograms([math.nan], [], x="x", names=NAMES)


ROWS = [[0, -2, -3], [0, -1, -1.5], [0, 0.1, 0.2], [0, 1, 1.5], [0, 2, math.nan]]


def test_bands_bars_and_medians() -> None:
    measured = Band([0, 5, 10], [[value + 0.5 for value in row] for row in ROWS])
    figure = bands(Band([0, 4, 8], ROWS), measured, x="block", y="correlation", names=NAMES)
    axes = figure.axes[0]
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {(0, 4, 8): [0, 0.1, 0.2], (0, 5, 10): [0.5, 0.6, 0.7]}
    light, dark, thin, thick = axes.collections
    assert light.get_datalim(axes.transData).y1 == 2
    assert dark.get_datalim(axes.transData).y1 == 1.5
    assert [list(segment[:, 1]) for segment in thick.get_segments()] == [[0.5, 0.5], [-0.5, 1.5], [-1, 2]]
    assert list(thin.get_segments()[1][:, 1]) == [-1.5, 2.5]
    assert {*NAMES, "correlation"} <= set(texts(figure))
    alone = bands(Band([0, 4, 8], ROWS), None, x="block", y="correlation", names=NAMES)
    assert len(alone.axes[0].get_lines()) == 1
    assert "networks" not in texts(alone)


def test_bands_that_do_not_fit() -> None:
    for band in (Band([0, 1], ROWS), Band([0, 4, 8], ROWS[:4])):
        with pytest.raises(InputError, match="five rows"):
            bands(band, None, x="x", y="y", names=NAMES)
    with pytest.raises(InputError, match="five rows"):
        bands(Band([0, 4, 8], ROWS), Band([0], ROWS), x="x", y="y", names=NAMES)


def table(chosen: tuple[float, float]):
    rows = [[0.0, 0.004, 0.01], [0.5, 0.25, 1.0]]
    return shares(
        rows, across=(0.5, 1, 2), upward=(0.2, 0.8), x="τ₀", y="γ", reading="blow up", chosen=chosen
    )


def test_shares_stand_in_their_cells() -> None:
    figure = table(chosen=(1, 0.8))
    axes = figure.axes[0]
    cells = {(*text.get_position(),): text.get_text() for text in axes.texts}
    assert cells == {
        (0, 0): "0 %", (1, 0): "0.4 %", (2, 0): "1.0 %",
        (0, 1): "50 %", (1, 1): "25 %", (2, 1): "100 %",
    }  # fmt: skip
    assert [each.get_text() for each in axes.get_yticklabels()] == ["0.2", "0.8"]
    (frame,) = axes.get_lines()
    assert (frame.get_xdata()[0], frame.get_ydata()[0]) == (0.5, 0.5)
    assert not table(chosen=(3, 0.8)).axes[0].get_lines()  # not in the table: no frame
    with pytest.raises(InputError, match="a row for each value"):
        shares([[0.1]], across=(1, 2), upward=(1,), x="x", y="y", reading="r", chosen=(1, 1))


def test_percentages() -> None:
    assert [percent(share) for share in (0, 0.0004, 0.0006, 0.012, 0.099, 0.0999, 1)] == [
        "0 %", "<0.1 %", "0.1 %", "1.2 %", "9.9 %", "10 %", "100 %"
    ]  # fmt: skip


def test_the_same_figure_gives_the_same_bytes(tmp_path) -> None:
    for name in ("a.svg", "b.svg"):
        save(table(chosen=(1, 0.8)), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
