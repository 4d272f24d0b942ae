"""Figures of several runs side by side; a series has one colour in all of them, in light and in dark.

Sizes are in points. Nothing here touches pyplot or leaves matplotlib's settings changed. Values that are not
finite, or not positive on a logarithmic scale, are left out of the drawing; a line that ends in one is marked
by a cross and named so in its label.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gramian.errors import InputError
from gramian.report.canvas import (
    WIDTH,
    canvas,
    drawable,
    edges,
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
from gramian.report.style import DASHES, INK, MUTED, PAPER, RULE, SIZE, dash, number, palette, styled, tick

Points = tuple[Sequence[float], Sequence[float]]
_NONE: Mapping[str, float] = MappingProxyType({})


def _colours(names: Iterable[str], colours: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the colours given, or the palette of these names."""
    names = list(names)
    if not names:
        raise InputError("A figure needs at least one series, and got none.")
    if missing := [name for name in names if colours is not None and name not in colours]:
        raise InputError(
            f"The colours given have none for {missing[0]!r}; pass palette(names) of all the names."
        )
    return palette(names) if colours is None else colours


@dataclass(frozen=True)
class _Line:
    """One line of a panel; `x` and `y` hold NaN where nothing can be drawn."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    dash: Any
    diverged: bool


def _line(name: str, points: Points, colour: str, dash: Any, log: bool) -> _Line:
    x, y = np.asarray(points[0], dtype=float), np.asarray(points[1], dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"Series {name!r} needs as many x as y, and got shapes {x.shape} and {y.shape}.")
    return _Line(name, drawable(x), drawable(y, log), colour, dash, bool(y.size) and not math.isfinite(y[-1]))


def _label_width(names: Iterable[str]) -> float:
    return 22 + max(measure(short(name)) for name in names)


def _panel(
    figure: Figure, axes: Axes, lines: Sequence[_Line], references: Mapping[str, float], markers: bool = False
) -> None:
    """Draw lines, their names to the right of the axes, moved apart and tied to the ends by thin strokes."""
    right, floor = axes.transAxes.transform((1.0, 0.0))
    ceiling = axes.transAxes.transform((1.0, 1.0))[1]
    labels: list[
        tuple[float, float | None, str, str, str]
    ] = []  # height, end of line, text, stroke, text colour
    for name, level in references.items():
        if axes.get_ylim()[0] <= level <= axes.get_ylim()[1]:
            axes.axhline(level, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
            height = axes.transData.transform((axes.get_xlim()[1], level))[1]
            labels.append((height, right, short(f"{name} {tick(level)}"), MUTED, MUTED))
    for line in lines:
        drawn = np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))
        if not drawn.size:
            labels.append((floor, None, short(line.name, 18) + ": none", line.colour, MUTED))
            continue
        end = (line.x[drawn[-1]], line.y[drawn[-1]])
        axes.plot(
            line.x, line.y, color=line.colour, linestyle=line.dash, marker="o" if markers else "", ms=3.2
        )
        axes.plot(
            *end, color=line.colour, marker="X" if line.diverged else "o", ms=7 if line.diverged else 4.2
        )
        x, height = axes.transData.transform(end)
        text = short(line.name, 18) + ": not finite" if line.diverged else short(line.name)
        labels.append((height, x, text, line.colour, INK))
    heights = spread([label[0] for label in labels], SIZE + 3, floor, ceiling)
    for (height, x, text, colour, ink), place in zip(labels, heights, strict=True):
        if x is not None:
            thin = {"color": colour, "linewidth": 0.8, "alpha": 0.6}
            place_line(figure, (x, right), (height, height), linestyle=(0, (1, 3)), **thin)
            place_line(figure, (right, right + 10, right + 14), (height, place, place), **thin)
        place_text(figure, right + 17, place, text, color=ink, va="center_baseline")


def curves(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    colours: Mapping[str, str] | None = None,
    references: Mapping[str, float] = _NONE,
    log: bool = False,
    integer: bool = False,
    markers: bool = False,
) -> Figure:
    """Draw one line a series, `name -> (xs, ys)`, named at its end; dotted horizontals at the `references`.

    `x` and `y` are the axes' titles with units; `log` makes the vertical axis logarithmic, `integer` puts
    ticks at whole x only, and `markers` shows every point.

    Raises: InputError when there is no series, or one has not as many x as y.
    """
    with styled():
        chosen = _colours(series, colours)
        lines = [_line(name, data, chosen[name], dash(chosen[name]), log) for name, data in series.items()]
        levels = {name: level for name, level in references.items() if math.isfinite(drawable(level, log))}
        figure = canvas(height := 300 + 14 * max(0, len(lines) + len(levels) - 14))
        names = [f"{name} {tick(level)}" for name, level in levels.items()]
        names += [
            name + (": not finite" if line.diverged else "") for name, line in zip(series, lines, strict=True)
        ]
        axes = place_axes(figure, 44, 44, WIDTH - 44 - _label_width(names), height - 44 - 30)
        scale_y(axes, limits(chain(*(line.y for line in lines), levels.values()), log), log)
        scale_x(axes, limits(chain(*(line.x for line in lines)), margin=0.02), integer=integer)
        _panel(figure, axes, lines, levels, markers)
        place_text(figure, 0, height - 14, y, color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
    return figure


def final_profile(
    series: Mapping[str, Sequence[float]],
    *,
    y: str,
    colours: Mapping[str, str] | None = None,
    references: Mapping[str, float] = _NONE,
    log: bool = False,
) -> Figure:
    """Draw a reading by layer at the end of the runs, `name -> values`; layer 1 is nearest the input.

    Raises: InputError when there is no series.
    """
    points = {name: (range(1, len(values) + 1), values) for name, values in series.items()}
    return curves(
        points, x="layer", y=y, colours=colours, references=references, log=log, integer=True, markers=True
    )


def _grid(
    count: int, panel: float, top: float, left: float, gap: float
) -> tuple[Figure, list[tuple[float, ...]]]:
    """Return a figure for `count` panels, two in a row, and the panels' boxes."""
    columns = min(count, 2)
    rows = -(-count // columns)
    height = top + rows * (panel + 30) + 24
    width = (WIDTH - columns * left - (columns - 1) * gap - 8) / columns
    boxes = [
        (
            left + (i % columns) * (width + left + gap),
            height - top - (i // columns + 1) * (panel + 30) + 6,
            width,
            panel,
        )
        for i in range(count)
    ]
    return canvas(height), boxes


def _heading(figure: Figure, box: Sequence[float], name: str, colour: str) -> None:
    """Write the name of a panel above it, after a stroke in the series' colour."""
    level = box[1] + box[3] + 8
    place_line(figure, (box[0], box[0] + 14), (level + 3.5, level + 3.5), color=colour, linewidth=3)
    place_text(figure, box[0] + 20, level, short(name), color=INK)


def profiles_over_time(
    series: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    *,
    reading: str,
    x: str = "step",
    y: str = "layer",
    colours: Mapping[str, str] | None = None,
    log: bool = False,
) -> Figure:
    """Draw readings by x and layer as colours: `name -> (xs, rows)`, a row holds the layers at one x.

    All panels share one scale, drawn above them with the title `reading`; cells without a finite value are
    grey. `log` makes the scale logarithmic.

    Raises: InputError when there is no series, or one has not one row of equal length for each x.
    """
    with styled():
        chosen = _colours(series, colours)
        tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, (xs, rows) in series.items():
            if (
                len(xs) != len(rows)
                or len({len(row) for row in rows}) > 1
                or not np.isfinite(drawable(xs)).all()
            ):
                raise InputError(
                    f"Series {name!r} needs a finite x and a row of equal length for each reading."
                )
            order = np.argsort(steps := drawable(xs), kind="stable")
            tables[name] = (
                steps[order],
                drawable(rows, log).reshape(len(rows), len(rows[0]) if len(rows) else 0)[order],
            )
        values = chain(*(table.ravel() for _, table in tables.values()))
        low, high = limits(values, log, margin=0.0)
        norm = (LogNorm if log else Normalize)(low, high)
        across = limits(chain(*(edges(steps) for steps, _ in tables.values() if steps.size)), margin=0.0)
        depth = max(1, max(table.shape[1] for _, table in tables.values()))
        figure, boxes = _grid(len(tables), 100, top=52, left=34, gap=10)
        for index, ((name, (steps, table)), box) in enumerate(zip(tables.items(), boxes, strict=True)):
            axes = place_axes(figure, *box)
            axes.set_facecolor(RULE)
            axes.grid(False)
            scale_x(axes, across, ticks=4)
            axes.tick_params(labelbottom=index + 2 >= len(tables))
            axes.set_ylim(0.5, depth + 0.5)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            if table.size:
                layers = np.arange(table.shape[1] + 1) + 0.5
                masked = np.ma.masked_invalid(table.T)
                axes.pcolormesh(edges(steps), layers, masked, norm=norm, cmap="viridis", rasterized=True)
            _heading(figure, box, name, chosen[name])
        height = figure.get_size_inches()[1] * 72
        scale = figure.colorbar(
            ScalarMappable(norm, "viridis"),
            cax=place_axes(figure, WIDTH - 208, height - 24, 200, 9),
            orientation="horizontal",
        )
        decades = math.log10(high / low) if log else 0.0
        scale.set_ticks(
            LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)) if decades > 1 else MaxNLocator(4)
        )
        scale.ax.xaxis.set_minor_locator(NullLocator())
        scale.ax.xaxis.set_major_formatter(FuncFormatter(tick))
        scale.outline.set_visible(False)  # type: ignore[operator]
        scale.solids.set_rasterized(True)  # type: ignore[union-attr]
        place_text(figure, WIDTH - 218, height - 23, reading, color=MUTED, ha="right")
        place_text(figure, 0, height - 23, f"{y} ↑ by {x} →", color=MUTED)
    return figure


def _gap(first: float, second: float) -> str:
    """Write the change from one value to another, with its share of a positive first one."""
    gap = float(second - first)
    sign = "+" if gap > 0 else ""
    share = f" ({sign}{number(float(100 * gap / first), 3)} %)" if first > 0 and math.isfinite(gap) else ""
    return f"{sign}{number(gap)}{share}"


def dumbbells(
    series: Mapping[str, tuple[float, float]],
    *,
    value: str,
    before: str,
    after: str,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Draw two values of each series, `name -> (first, second)`, as ring and dot, the gap written beside.

    `value` is the axis' title with its unit, `before` and `after` say what ring and dot are.

    Raises: InputError when there is no series.
    """
    with styled():
        chosen = _colours(series, colours)
        pairs = {name: drawable(pair) for name, pair in series.items()}
        gaps = [_gap(first, second) for first, second in pairs.values()]
        figure = canvas(height := 34 + 30 * len(series) + 44)
        left, right = _label_width(series) - 4, WIDTH - max(map(measure, gaps))
        axes = place_axes(figure, left, 44, right - 12 - left, height - 44 - 34)
        scale_x(axes, limits(chain(*pairs.values()), margin=0.08), ticks=3)
        axes.set_ylim(len(series) - 0.5, -0.5)
        axes.set_yticks([])
        axes.grid(True, axis="x")
        for row, ((name, (first, second)), gap) in enumerate(zip(pairs.items(), gaps, strict=True)):
            level = 44 + (len(series) - 0.5 - row) * 30
            colour = chosen[name]
            axes.axhline(row, color=RULE, linewidth=0.7)
            axes.plot((first, second), (row, row), color=colour, linewidth=3, alpha=0.45)
            axes.plot(first, row, "o", color=colour, markerfacecolor=PAPER, markersize=9, markeredgewidth=1.6)
            axes.plot(second, row, "o", color=colour, markersize=5)
            place_text(figure, left - 10, level, short(name), color=INK, ha="right", va="center_baseline")
            place_text(figure, right, level, gap, color=INK, va="center_baseline")
        axes.set_xlabel(value, color=MUTED, loc="right")
        place_text(figure, left + 8, height - 16, before, color=MUTED)
        place_text(figure, place := left + 34 + measure(before), height - 16, after, color=MUTED)
        place_text(figure, right, height - 16, "gap", color=MUTED)
        for x, size, face in ((left - 2, 8, PAPER), (place - 9, 5, MUTED)):
            place_line(
                figure, [x], [height - 12], color=MUTED, marker="o", markersize=size, markerfacecolor=face
            )
    return figure


def gains(
    series: Mapping[str, Mapping[str, Points]],
    *,
    y: str,
    x: str = "step",
    colours: Mapping[str, str] | None = None,
    log: bool = False,
) -> Figure:
    """Draw one panel a series with its named curves, `name -> (gain -> (xs, ys))`, all on one scale.

    A panel has its series' colour; a gain of one name has the same dashes in every panel.

    Raises: InputError when there is no series, or a gain has not as many x as y.
    """
    with styled():
        chosen = _colours(series, colours)
        kinds = list(dict.fromkeys(chain(*series.values())))
        styles = {kind: DASHES[index % len(DASHES)] for index, kind in enumerate(kinds)}
        panels = {
            name: [_line(kind, data, chosen[name], styles[kind], log) for kind, data in group.items()]
            for name, group in series.items()
        }
        lines = list(chain(*panels.values()))
        figure, boxes = _grid(len(panels), 112, top=26, left=40, gap=0)
        room = min(max([measure(short(kind)) for kind in kinds], default=0.0) + 22, boxes[0][2] / 2)
        vertical = limits(chain(*(line.y for line in lines)), log)
        across = limits(chain(*(line.x for line in lines)), margin=0.02)
        for index, ((name, group), box) in enumerate(zip(panels.items(), boxes, strict=True)):
            left, bottom, width, height = box
            axes = place_axes(figure, left, bottom, width - room, height)
            scale_y(axes, vertical, log, ticks=4)
            scale_x(axes, across, ticks=3)
            axes.tick_params(labelbottom=index + 2 >= len(panels))
            _panel(figure, axes, group, _NONE)
            _heading(figure, box, name, chosen[name])
            if not group:
                axes.text(
                    0.5, 0.5, "no gains", color=MUTED, ha="center", va="center", transform=axes.transAxes
                )
        place_text(figure, 0, figure.get_size_inches()[1] * 72 - 14, f"{y} by {x}", color=MUTED)
    return figure
