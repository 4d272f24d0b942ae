"""Points of two numbers, named, with the front of those that no other point beats on both."""

from collections.abc import Collection, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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
from gramian.report.style import INK, MUTED, PAPER, RULE, SERIES, SIZE, styled, tick

Point = tuple[float, float]


def pareto_front(points: Mapping[str, Point]) -> list[str]:
    """Return the names of the points of which none is as low on both numbers and lower on one, by x.

    Holds: exactly; points that are not finite are on no front.
    """
    finite = {name: point for name, point in points.items() if np.isfinite(point).all()}

    def beaten(name: str) -> bool:
        x, y = finite[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in finite.values())

    return sorted((name for name in finite if not beaten(name)), key=lambda name: finite[name])


def scatter(
    points: Mapping[str, Point], *, x: str, y: str, chosen: Collection[str] = (), log: bool = False
) -> Figure:
    """Draw points `name -> (x, y)`, lower and further left being better, and their front as a line.

    Those `chosen` are drawn full and large. `log` makes the x axis logarithmic. Points that are not finite
    are named below the others as such.

    Raises: InputError when there is no point.
    """
    if not points:
        raise InputError("A figure needs at least one point, and got none.")
    drawn = {
        name: (float(drawable(a, log)), float(drawable(b)))
        for name, (a, b) in points.items()
        if np.isfinite([drawable(a, log), drawable(b)]).all()
    }
    with styled():
        rows = len(points)
        figure = canvas(height := max(220.0, 60 + (SIZE + 4) * rows))
        right = WIDTH - max(measure(short(name)) for name in points) - 30
        bottom, top = 44.0, height - 26
        axes = place_axes(figure, 46, bottom, right - 46, top - bottom)
        across = limits((a for a, _ in drawn.values()), log, margin=0.06)
        upward = limits((b for _, b in drawn.values()), margin=0.06)
        if log:
            axes.set_xscale("log")
            axes.set_xlim(*across)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(tick))
        else:
            scale_x(axes, across)
        scale_y(axes, upward, False)
        front = [drawn[name] for name in pareto_front(drawn)]
        axes.plot(
            [a for a, _ in front], [b for _, b in front], color=RULE, linewidth=1.4, drawstyle="steps-post"
        )
        names = sorted(drawn, key=lambda name: drawn[name][1])
        places = [axes.transData.transform(drawn[name]) for name in names]
        levels = spread([level for _, level in places], SIZE + 3, bottom, top)
        for name, (place, own), level in zip(names, places, levels, strict=True):
            best, colour = name in chosen, SERIES[2][0] if name in chosen else MUTED
            place_line(figure, (place + 5, right + 6), (own, level + 3), color=RULE, linewidth=0.7)
            axes.plot(
                *drawn[name], "o", color=colour, markersize=8 if best else 5,
                markerfacecolor=colour if best else PAPER, markeredgewidth=1.4,
            )  # fmt: skip
            place_text(figure, right + 10, level, short(name), color=INK if best else MUTED)
        lost = [short(name) for name in points if name not in drawn]
        if lost:
            place_text(figure, 46, 2, f"not finite: {', '.join(lost)}", color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
        place_text(figure, 0, height - 14, y, color=MUTED)
    return figure
