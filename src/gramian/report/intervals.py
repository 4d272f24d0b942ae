"""Predictions with intervals: against the truth, whether they hold what they say, and where doubt grows."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

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
    short,
    spread,
)
from gramian.report.distribution import percent
from gramian.report.style import INK, MUTED, PAPER, SERIES, SIZE, palette, styled, tick

INSIDE, OUTSIDE = SERIES[0][0], SERIES[1][0]

DRAWN = 400
"""Most rows that are drawn one by one."""

LEFT, BOTTOM, TOP = 58.0, 44.0, 48.0
"""Room beside, below and above the axes."""


def against_truth(
    truth: Sequence[float],
    mean: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    name: str,
) -> Figure:
    """Draw predictions of `name` with their intervals against what is true, in two colours: held or missed.

    Of more than `DRAWN` rows some are drawn, evenly by their truth, and all are counted. The widest intervals
    may go beyond the drawing.

    Raises: InputError for no row, and numbers of rows that differ.
    """
    rows = np.array([truth, mean, low, high], dtype=float) if _equal(truth, mean, low, high) else np.empty(0)
    if not rows.size:
        raise InputError("Predictions need a truth, a mean and two ends for each of one row or more.")
    held = (rows[2] <= rows[0]) & (rows[0] <= rows[3])
    inside = int(held.sum())
    drawn = np.argsort(rows[0], kind="stable")[thinned(len(truth))]
    rows, held = rows[:, drawn], held[drawn]
    with styled():
        figure = canvas(height := 340)
        axes = place_axes(figure, LEFT, BOTTOM, WIDTH - LEFT - 12, height - BOTTOM - TOP)
        outer = np.nanquantile(drawable(rows[2]), 0.05), np.nanquantile(drawable(rows[3]), 0.95)
        ends = limits(chain(*drawable(rows[:2]), outer))
        scale_x(axes, ends)
        scale_y(axes, ends, False)
        axes.plot(ends, ends, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
        legend = []
        for words, colour, chosen, count in (
            ("truth inside the interval", INSIDE, held, inside),
            ("outside", OUTSIDE, ~held, len(truth) - inside),
        ):
            x, y, bottom, top = rows[:, chosen]
            axes.vlines(x, bottom, top, color=colour, linewidth=1.1, alpha=0.45)
            axes.plot(x, y, "o", color=colour, markersize=3.6, markeredgecolor=PAPER, markeredgewidth=0.4)
            legend.append((f"{words} ({count:,})", colour))
        _legend(figure, height - 32, legend)
        place_text(figure, 0, height - 14, f"{short(name)}, predicted", color=MUTED)
        axes.set_xlabel(f"{short(name)}, true", color=MUTED, loc="right")
    return figure


def reliability(
    levels: Sequence[float], series: Mapping[str, Sequence[float]], errors: Sequence[float]
) -> Figure:
    """Draw the share of targets inside central intervals by their level, and a band of two standard errors.

    Honest intervals are on the diagonal, within the band but for chance.

    Raises: InputError when there is no series, or one has not a share for each level.
    """
    if not series or not _equal(levels, errors, *series.values()):
        raise InputError("Reliability needs a series or more, and a share and an error for each level.")
    with styled():
        colours = palette(series)
        figure = canvas(height := 340)
        names = max(measure(short(name)) for name in series)
        axes = place_axes(figure, LEFT, BOTTOM, WIDTH - LEFT - 22 - names, height - BOTTOM - 30)
        x, error = drawable([0.0, *levels, 1.0]), np.array([0.0, *errors, 0.0])
        band = np.clip([x - 2 * error, x + 2 * error], 0, 1)
        axes.fill_between(x, *band, color=MUTED, alpha=0.16, linewidth=0)
        axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
        for axis, scale in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
            scale(0, 1)
            axis.set_ticks(ticks := (0, 0.25, 0.5, 0.75, 1), [percent(each) for each in ticks])
        for name, values in series.items():
            axes.plot(levels, values, color=colours[name], marker="o", markersize=3.4, clip_on=False)
        right = axes.transAxes.transform((1.0, 0.0))[0]
        ends = [axes.transData.transform((0, values[-1]))[1] for values in series.values()]
        places = spread(ends, SIZE + 3, BOTTOM, height - 30)
        for name, end, place in zip(series, ends, places, strict=True):
            thin = {"color": colours[name], "linewidth": 0.8, "alpha": 0.6}
            place_line(figure, (right, right + 10, right + 14), (end, place, place), **thin)
            place_text(figure, right + 17, place, short(name), color=INK, va="center_baseline")
        place_text(figure, 0, height - 14, "targets inside", color=MUTED)
        axes.set_xlabel("level of the interval", color=MUTED, loc="right")
    return figure


def doubt(groups: Mapping[str, Sequence[float]], threshold: float, *, name: str) -> Figure:
    """Draw the epistemic deviation of rows, group after group, and the threshold beyond which it is strange.

    Rows beyond it are drawn large in a second colour. Of more than `DRAWN` rows of a group some are drawn,
    evenly, and all that are beyond.

    Raises: InputError when there is no row.
    """
    groups = {words: values for words, values in groups.items() if len(values)}
    if not groups:
        raise InputError("Doubt needs at least one row, and got none.")
    every = np.concatenate([drawable(values, log=True) for values in groups.values()])
    with styled():
        figure = canvas(height := 300)
        axes = place_axes(figure, LEFT, BOTTOM, WIDTH - LEFT - 12, height - BOTTOM - TOP)
        scale_y(axes, limits((*every, float(drawable(threshold, True))), True), True)
        axes.set_xlim(0, len(groups))
        axes.axhline(threshold, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
        for place, values in enumerate(groups.values()):
            x = place + (np.arange(len(values)) + 0.5) / len(values)
            y = drawable(values, log=True)
            far = np.asarray(values) > threshold
            shown = thinned(len(values))
            axes.plot(x[shown], np.where(far, np.nan, y)[shown], "o", color=INSIDE, markersize=3, alpha=0.7)
            axes.plot(x[far], y[far], "o", color=OUTSIDE, markersize=5.5, markeredgecolor=PAPER)
            if place:
                axes.axvline(place, color=MUTED, linewidth=0.8)
        axes.xaxis.set_major_locator(NullLocator())
        axes.xaxis.set_major_formatter(NullFormatter())
        for place, (words, values) in enumerate(groups.items()):
            where = LEFT + (WIDTH - LEFT - 12) * (place + 0.5) / len(groups)
            place_text(figure, where, 24, f"{len(values):,} {words}, in order", color=MUTED, ha="center")
        beyond = sum(int((np.asarray(values) > threshold).sum()) for values in groups.values())
        dots = [("like rows known", INSIDE), (f"out of distribution ({beyond:,})", OUTSIDE)]
        _legend(figure, height - 32, dots)
        said = f"deviation of {short(name)} among models; dotted: threshold {tick(threshold)}"
        place_text(figure, 0, height - 14, said, color=MUTED)
    return figure


def thinned(count: int, most: int = DRAWN) -> np.ndarray:
    """Return at most so many places among `count`, evenly, first and last with them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _equal(*rows: Sequence[float]) -> bool:
    return len({len(row) for row in rows}) == 1


def _legend(figure: Figure, level: float, shown: Sequence[tuple[str, str]]) -> None:
    """Write names in a row, each behind a dot of its colour."""
    left = LEFT
    for name, colour in shown:
        place_line(figure, (left + 4,), (level + 4,), color=colour, marker="o", markersize=6, linestyle="")
        place_text(figure, left + 14, level, name, color=INK)
        left += 14 + measure(name) + 24
