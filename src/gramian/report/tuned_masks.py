"""Errors of pruned networks by density: a panel for each mask to start from, a line for each way to go on."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gramian.errors import InputError
from gramian.report.canvas import WIDTH, canvas, drawable, limits, measure, place_axes, place_text, scale_y
from gramian.report.style import INK, MUTED, dash, palette, styled, tick
from gramian.report.trajectory import legend_row

HEIGHT, LEFT, GAP, BOTTOM = 210, 40, 14, 44
ROW = 18
BELOW = "share of the weights kept"

Errors = Mapping[str, Mapping[float, Sequence[float]]]
"""way -> density -> errors, one a seed."""


def tuned_masks(panels: Mapping[str, Errors], dense: float, *, y: str = "held-out error, %") -> Figure:
    """Draw the mean error of every way against density, with the range over seeds as bars; both axes log.

    A dotted line is the dense network. Sparser is further right.

    Raises: InputError for no panel, no error, or one that is not above 0.
    """
    values = [e for ways in panels.values() for path in ways.values() for each in path.values() for e in each]
    if not values or min(values) <= 0 or not dense > 0:
        raise InputError("A figure of errors on a logarithmic axis needs errors, all above 0.")
    ways = list(dict.fromkeys(way for panel in panels.values() for way in panel))
    colours = palette(ways)
    rows = _rows(ways)
    with styled():
        figure = canvas(height := BOTTOM + HEIGHT + 40 + ROW * len(rows))
        width = (WIDTH - LEFT - GAP * (len(panels) - 1) - 6) / len(panels)
        for place, (name, panel) in enumerate(panels.items()):
            left = LEFT + place * (width + GAP)
            axes = place_axes(figure, left, BOTTOM, width, HEIGHT)
            axes.axhline(dense, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
            for way, path in panel.items():
                densities = sorted(path, reverse=True)
                errors = [drawable(path[density]) for density in densities]
                means = np.array([each.mean() for each in errors])
                spans = [means - [each.min() for each in errors], [each.max() for each in errors] - means]
                look = {"color": colours[way], "linestyle": dash(colours[way]), "marker": "o"}
                axes.errorbar(densities, means, yerr=spans, markersize=3.2, elinewidth=0.9, **look)
            scale_y(axes, limits([*values, dense], log=True), True)
            _densities(axes, {density for path in panel.values() for density in path})
            if place:
                axes.tick_params(labelleft=False)
            place_text(figure, left, BOTTOM + HEIGHT + 6, name, color=INK)
        for row, names in enumerate(rows):
            entries = [(way, {"color": colours[way], "linestyle": dash(colours[way])}) for way in names]
            legend_row(figure, LEFT, height - 14 - ROW * (row + 1), entries)
        place_text(figure, 0, height - 14, y, color=MUTED)
        place_text(figure, WIDTH - measure(BELOW) - 4, 6, BELOW, color=MUTED)
    return figure


def _rows(ways: Sequence[str]) -> list[list[str]]:
    """Divide the names of a legend into rows that fit."""
    rows: list[list[str]] = [[]]
    room = WIDTH - LEFT
    for way in ways:
        need = measure(way) + 40
        if rows[-1] and need > room:
            rows.append([])
            room = WIDTH - LEFT
        rows[-1].append(way)
        room -= need
    return rows


def _densities(axes: Axes, densities: Iterable[float]) -> None:
    """Put the densities on a logarithmic axis, sparser to the right."""
    densities = sorted(densities)
    axes.set_xscale("log")
    axes.set_xlim(densities[-1] * 1.25, densities[0] / 1.25)
    axes.xaxis.set_major_locator(FixedLocator(densities))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
