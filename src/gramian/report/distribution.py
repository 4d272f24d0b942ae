"""Distributions, predicted and measured: histograms, bands of quantiles, and a table of shares in colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gramian.errors import InputError
from gramian.report.canvas import (
    WIDTH,
    canvas,
    drawable,
    limits,
    measure,
    place_axes,
    place_line,
    place_text,
    scale_x,
    scale_y,
)
from gramian.report.style import INK, MUTED, PAPER, SERIES, SIZE, styled, tick

PREDICTED, MEASURED = SERIES[0][0], SERIES[1][0]
LIGHT, DARK, FRAME = "#ffffff", "#111111", "#00796b"
"""Text and frame on cells, whose colours are the same on a dark page."""

SHADE = 0.35
"""Opacity of what is filled."""

TAIL = 0.002
"""Share of the values that a histogram leaves out on each side, so that a few far ones do not squeeze it."""


@dataclass(frozen=True)
class Band:
    """Five rows of quantiles, the lowest first, by the same xs."""

    xs: Sequence[float]
    rows: Sequence[Sequence[float]]


def histograms(
    predicted: Sequence[float], measured: Sequence[float], *, x: str, names: tuple[str, str]
) -> Figure:
    """Draw the densities of two samples in the same bins: the first filled, the second as an outline.

    Both may be empty, but not at once; values far out in the tails are left out of the drawing, not of the
    density.

    Raises: InputError when there is no finite value.
    """
    filled, outlined = _finite(predicted), _finite(measured)
    if not filled.size + outlined.size:
        raise InputError("A histogram needs at least one finite value, and got none.")
    borders = _borders([sample for sample in (filled, outlined) if sample.size])
    with styled():
        figure = canvas(height := 300)
        axes = place_axes(figure, 44, 44, WIDTH - 44 - 12, height - 44 - 48)
        shown, top = [], 1e-12
        if filled.size:
            density = _density(filled, borders)
            axes.stairs(density, borders, fill=True, color=PREDICTED, alpha=SHADE, linewidth=0)
            shown.append((names[0], PREDICTED, 8.0))
            top = max(top, density.max())
        if outlined.size:
            density = _density(outlined, borders)
            axes.stairs(density, borders, color=MEASURED, linewidth=1.8)
            shown.append((names[1], MEASURED, 1.8))
            top = max(top, density.max())
        scale_y(axes, (0.0, 1.06 * top), False)
        scale_x(axes, limits(borders, margin=0.01))
        _legend(figure, height - 32, shown)
        place_text(figure, 0, height - 14, "density", color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
    return figure


def _finite(values: Sequence[float]) -> np.ndarray:
    array = drawable(values)
    return array[np.isfinite(array)]


def _borders(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Return borders of 1.2 √n bins, at least 16, of the smaller sample's n, over all but the far tails."""
    ends = np.array([np.quantile(sample, (TAIL, 1 - TAIL)) for sample in samples])
    low, high = limits((ends[:, 0].min(), ends[:, 1].max()), margin=0.0)
    bins = round(1.2 * math.sqrt(min(sample.size for sample in samples)))
    return np.linspace(low, high, 1 + max(16, min(40, bins)))


def _density(sample: np.ndarray, borders: np.ndarray) -> np.ndarray:
    return np.histogram(sample, borders)[0] / (sample.size * np.diff(borders))


def _legend(figure: Figure, level: float, shown: Sequence[tuple[str, str, float]]) -> None:
    """Write names in a row, each behind a stroke of its colour."""
    left = 44.0
    for name, colour, thick in shown:
        style = {"color": colour, "linewidth": thick, "alpha": SHADE if thick > 4 else 1.0}
        place_line(figure, (left, left + 16), (level + 4, level + 4), solid_capstyle="butt", **style)
        place_text(figure, left + 22, level, name, color=INK)
        left += 22 + measure(name) + 24


def bands(predicted: Band, measured: Band | None, *, x: str, y: str, names: tuple[str, str]) -> Figure:
    """Draw quantiles by x: those predicted as two shades and a line, those measured as bars and dots.

    The light shade and the thin bar hold what lies between the outermost quantiles, the dark shade and the
    thick bar what lies between the inner ones; the line and the dots are medians.

    Raises: InputError unless each band has five rows with as many values as xs.
    """
    both = [predicted] if measured is None else [predicted, measured]
    for band in both:
        if len(band.rows) != 5 or any(len(row) != len(band.xs) for row in band.rows):
            raise InputError("A band needs five rows of quantiles, each with as many values as xs.")
    with styled():
        figure = canvas(height := 300)
        axes = place_axes(figure, 44, 44, WIDTH - 44 - 12, height - 44 - 48)
        rows = [[drawable(row) for row in band.rows] for band in both]
        scale_y(axes, limits(chain(*chain(*rows))), False)
        scale_x(axes, limits(chain(*(band.xs for band in both)), margin=0.02), integer=True)
        lowest, low, middle, high, highest = rows[0]
        axes.fill_between(predicted.xs, lowest, highest, color=PREDICTED, alpha=0.15, linewidth=0)
        axes.fill_between(predicted.xs, low, high, color=PREDICTED, alpha=SHADE - 0.15, linewidth=0)
        axes.plot(predicted.xs, middle, color=PREDICTED, linewidth=1.8)
        shown = [(names[0], PREDICTED, 8.0)]
        if measured is not None:
            _bars(axes, measured.xs, rows[1])
            shown.append((names[1], MEASURED, 2.4))
        _legend(figure, height - 32, shown)
        place_text(figure, 0, height - 14, y, color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
    return figure


def _bars(axes: Axes, xs: Sequence[float], rows: Sequence[np.ndarray]) -> None:
    lowest, low, middle, high, highest = rows
    axes.vlines(xs, lowest, highest, color=MEASURED, linewidth=1.0)
    axes.vlines(xs, low, high, color=MEASURED, linewidth=3.0)
    axes.plot(xs, middle, "o", color=MEASURED, markersize=5, markeredgecolor=PAPER, markeredgewidth=0.8)


def shares(
    rows: Sequence[Sequence[float]],
    *,
    across: Sequence[float],
    upward: Sequence[float],
    x: str,
    y: str,
    reading: str,
    chosen: tuple[float, float],
) -> Figure:
    """Draw shares from 0 to 1 as cells with their percentage, and a frame round the cell that is `chosen`.

    A row belongs to a value of `upward`, its cells to those of `across`; the cells are equally large.

    Raises: InputError unless there is a row for each value upward with a cell for each across.
    """
    table = np.asarray(rows, dtype=float)
    if table.size == 0 or table.shape != (len(upward), len(across)):
        raise InputError("A table of shares needs a row for each value upward, a cell for each across.")
    with styled():
        figure = canvas(height := 30 * len(upward) + 44 + 30)
        axes = place_axes(figure, 44, 44, WIDTH - 44 - 12, height - 44 - 30)
        axes.grid(False)
        axes.pcolormesh(
            np.arange(len(across) + 1) - 0.5, np.arange(len(upward) + 1) - 0.5,
            np.sqrt(np.clip(table, 0, 1)), cmap="magma_r", vmin=0, vmax=1.15, edgecolor=PAPER, linewidth=1.0,
        )  # fmt: skip
        for row, column in np.ndindex(table.shape):
            share = float(table[row, column])
            ink = LIGHT if share > 0.25 else DARK
            axes.text(column, row, percent(share), color=ink, ha="center", va="center", fontsize=SIZE - 1)
        axes.set_xticks(range(len(across)), [tick(value) for value in across])
        axes.set_yticks(range(len(upward)), [tick(value) for value in upward])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        if chosen[0] in across and chosen[1] in upward:
            _frame(axes, list(across).index(chosen[0]), list(upward).index(chosen[1]))
        place_text(figure, 0, height - 14, f"{y} ↑,  {reading}", color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
    return figure


def _frame(axes: Axes, column: int, row: int) -> None:
    xs, ys = (column - 0.5, column + 0.5), (row - 0.5, row + 0.5)
    corners = (xs[0], xs[1], xs[1], xs[0], xs[0]), (ys[0], ys[0], ys[1], ys[1], ys[0])
    axes.plot(*corners, color=FRAME, linewidth=2.8, clip_on=False)


def percent(share: float) -> str:
    """Write a share as a percentage: small ones to a tenth, others whole."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"
