"""Doubt on trial: errors by confidence, and strange inputs detected by the rate of false alarms."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gramian.errors import InputError
from gramian.report.canvas import WIDTH, canvas, drawable, limits, place_axes, place_text, scale_x, scale_y
from gramian.report.style import MUTED, dash, palette, styled

Repeats = Mapping[str, Sequence[Sequence[float | None]]]
"""method -> one row of values for every seed; None where there is no value."""

SHADE = 0.15
"""Opacity of the range over seeds."""


def error_by_confidence(errors: Repeats, thresholds: Sequence[float]) -> Figure:
    """Draw the error among predictions of at least a confidence: the mean over seeds, and their range.

    Raises: InputError when there is no method or no seed, or a row has not as many values as thresholds.
    """
    with styled():
        figure, axes = _lines(
            errors, thresholds, "error among predictions of at least this confidence", "confidence"
        )
        axes.legend(frameon=False, loc="upper right")
    return figure


def detection(detected: Repeats, rates: Sequence[float]) -> Figure:
    """Draw the share of strange inputs detected by the rate of false alarms (ROC), with chance dotted.

    Raises: InputError as `error_by_confidence`.
    """
    with styled():
        figure, axes = _lines(
            detected, rates, "share of strange inputs detected", "share of known inputs rejected"
        )
        axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)), label="chance")
        axes.legend(frameon=False, loc="lower right")
    return figure


def _lines(repeats: Repeats, xs: Sequence[float], y: str, x: str) -> tuple[Figure, Axes]:
    if not repeats:
        raise InputError("A figure needs at least one method, and got none.")
    tables = {}
    for name, rows in repeats.items():
        if not rows or any(len(row) != len(xs) for row in rows):
            raise InputError(f"Method {name!r} needs a row for every seed, with as many values as xs.")
        tables[name] = np.array([drawable([np.nan if v is None else v for v in row]) for row in rows])
    figure, colours = canvas(height := 300), palette(repeats)
    axes = place_axes(figure, 48, 44, WIDTH - 48 - 12, height - 44 - 30)
    for name, table in tables.items():
        there = np.isfinite(table)
        drawn = there.any(0)
        at, table, there = np.asarray(xs, dtype=float)[drawn], table[:, drawn], there[:, drawn]
        middle = np.where(there, table, 0).sum(0) / there.sum(0)
        low, high = np.where(there, table, np.inf).min(0), np.where(there, table, -np.inf).max(0)
        axes.fill_between(at, low, high, color=colours[name], alpha=SHADE, linewidth=0)
        axes.plot(at, middle, color=colours[name], linestyle=dash(colours[name]), label=name)
    scale_y(axes, limits(np.concatenate([table.ravel() for table in tables.values()])), False)
    scale_x(axes, limits(xs, margin=0.02))
    place_text(figure, 0, height - 14, y, color=MUTED)
    axes.set_xlabel(x, color=MUTED, loc="right")
    return figure, axes
