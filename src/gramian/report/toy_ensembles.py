"""Ensembles of functions of one input beside their laws, a panel each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from gramian.errors import InputError
from gramian.report.canvas import WIDTH, canvas, drawable, place_axes, place_text, scale_x, scale_y
from gramian.report.style import INK, MUTED, SERIES, styled

MEASURED, PREDICTED = SERIES[0][0], SERIES[1][0]

LIMIT = 7.0
"""Largest value that is drawn."""

HEIGHT, COLUMNS = 190, 2


@dataclass(frozen=True)
class Panel:
    """Mean and standard deviation over members, and those of the law of infinite width."""

    name: str
    mean: Sequence[float]
    deviation: Sequence[float]
    limit_mean: Sequence[float]
    limit: Sequence[float]


def panels(xs: Sequence[float], shown: Sequence[Panel], x: Sequence[float], y: Sequence[float]) -> Figure:
    """Draw for every method what lies within two deviations of its mean, and the law's mean and edges dashed.

    Raises: InputError when there is no panel, or one of another length than xs.
    """
    rows = [row for each in shown for row in (each.mean, each.deviation, each.limit_mean, each.limit)]
    if not rows or any(len(row) != len(xs) for row in rows):
        raise InputError("A figure of ensembles needs panels with as many values as xs.")
    height = -(-len(shown) // COLUMNS) * HEIGHT
    with styled():
        figure = canvas(height + 22)
        width = (WIDTH - 36) / COLUMNS
        for place, each in enumerate(shown):
            left, top = 30 + place % COLUMNS * width, height - place // COLUMNS * HEIGHT
            axes = place_axes(figure, left, top - HEIGHT + 26, width - 22, HEIGHT - 52)
            mean, deviation = np.asarray(each.mean), np.asarray(each.deviation)
            axes.fill_between(
                xs, mean - 2 * deviation, mean + 2 * deviation, color=MEASURED, alpha=0.3, linewidth=0
            )
            axes.plot(xs, mean, color=MEASURED)
            middle, limit = drawable(each.limit_mean), drawable(each.limit)
            for edge in (middle - 2 * limit, middle, middle + 2 * limit):
                axes.plot(xs, edge, color=PREDICTED, linewidth=1.1, linestyle=(0, (4, 2)))
            axes.plot(x, y, "o", color=INK, markersize=2.8)
            scale_x(axes, (xs[0], xs[-1]))
            scale_y(axes, (-LIMIT, LIMIT), False)
            place_text(figure, left, top - 18, each.name, color=INK)
        legend = "shaded: two deviations over members   dashed: law of infinite width   dots: data"
        place_text(figure, 30, height + 4, legend, color=MUTED)
    return figure
