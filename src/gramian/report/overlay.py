"""Theory over measurement: predicted lines and the spread of what finite networks did."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

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
    short,
    spread,
)
from gramian.report.style import INK, MUTED, SIZE, palette, styled


@dataclass(frozen=True)
class Overlay:
    """One prediction and what was measured of it, all by the same xs; each row one network."""

    xs: Sequence[float]
    predicted: Sequence[float]
    measured: Sequence[Sequence[float]] = ()


def overlay(series: Mapping[str, Overlay], *, x: str, y: str, log: bool = False) -> Figure:
    """Draw predictions as lines, and the middle and range of the networks measured as dots and bars.

    Values that are not finite, or not positive on a logarithmic scale, are left out.

    Raises: InputError when there is no series, or one has not as many values as xs.
    """
    if not series:
        raise InputError("A figure needs at least one series, and got none.")
    for name, each in series.items():
        if any(len(values) != len(each.xs) for values in (each.predicted, *each.measured)):
            raise InputError(f"Series {name!r} needs as many values as xs.")
    with styled():
        colours = palette(series)
        figure = canvas(height := 300)
        names = max(measure(short(name)) for name in series)
        axes = place_axes(figure, 48, 44, WIDTH - 48 - 22 - names, height - 44 - 30)
        every = chain(*((each.predicted, *each.measured) for each in series.values()))
        scale_y(axes, limits(chain(*(drawable(values, log) for values in every)), log), log)
        scale_x(axes, limits(chain(*(each.xs for each in series.values())), margin=0.02), integer=True)
        ends: list[tuple[float, str, str]] = []
        for name, each in series.items():
            line = drawable(each.predicted, log)
            axes.plot(each.xs, line, color=colours[name], linewidth=1.8)
            _measurements(axes, each, colours[name], log)
            finite = [value for value in line if math.isfinite(value)]
            last = axes.transData.transform((0, finite[-1]))[1] if finite else 44.0
            ends.append((last, name, colours[name]))
        right = axes.transAxes.transform((1.0, 0.0))[0]
        places = spread([level for level, _, _ in ends], SIZE + 3, 44, height - 30)
        for (level, name, colour), place in zip(ends, places, strict=True):
            thin = {"color": colour, "linewidth": 0.8, "alpha": 0.6}
            place_line(figure, (right, right + 10, right + 14), (level, place, place), **thin)
            place_text(figure, right + 17, place, short(name), color=INK, va="center_baseline")
        place_text(figure, 0, height - 14, y, color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
    return figure


def _measurements(axes, each: Overlay, colour: str, log: bool) -> None:
    """Draw about 25 places: the median network as a dot, the range of all as a bar."""
    step = max(1, len(each.xs) // 25)
    for index in range(0, len(each.xs), step):
        values = sorted(drawable([row[index] for row in each.measured], log))
        values = [value for value in values if math.isfinite(value)]
        if not values:
            continue
        at = each.xs[index]
        if len(values) > 1:
            axes.plot((at, at), (values[0], values[-1]), color=colour, linewidth=3, alpha=0.3)
        axes.plot(at, values[len(values) // 2], "o", color=colour, markersize=3.6)
