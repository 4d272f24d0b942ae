"""How far networks on graphs see: skill by distance, a panel a task, a line a network, and where hops end."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gramian.errors import InputError
from gramian.report.canvas import WIDTH, canvas, drawable, measure, place_axes, place_text, scale_y
from gramian.report.style import INK, MUTED, dash, palette, styled, tick
from gramian.report.trajectory import legend_row

HEIGHT, LEFT, GAP, BOTTOM = 190, 40, 14, 44
BELOW = "edges to what must be known"

Skills = Mapping[str, Mapping[int, Sequence[float]]]
"""network -> distance -> skills, one a seed."""


def skill_by_distance(panels: Mapping[str, Skills], reach: float, *, y: str = "skill") -> Figure:
    """Draw the mean skill of every network against distance, with the range over seeds as bars.

    The horizontal axis is logarithmic. A dotted upright marks the `reach` of networks that pass messages
    between neighbours, their number of layers; a dotted level is the best constant prediction, 0. Skills
    below −0.2 are drawn there.

    Raises: InputError for no panel, no skill, and distances or a reach that are not above 0.
    """
    distances = sorted({at for skills in panels.values() for path in skills.values() for at in path})
    if not distances or distances[0] <= 0 or not reach > 0:
        raise InputError(
            "A figure of skill by distance needs skills at distances above 0, and a reach above 0."
        )
    networks = list(dict.fromkeys(name for skills in panels.values() for name in skills))
    colours = palette(networks)
    with styled():
        figure = canvas(height := BOTTOM + HEIGHT + 58)
        width = (WIDTH - LEFT - GAP * (len(panels) - 1) - 6) / len(panels)
        for place, (name, skills) in enumerate(panels.items()):
            left = LEFT + place * (width + GAP)
            axes = place_axes(figure, left, BOTTOM, width, HEIGHT)
            axes.axhline(0, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
            axes.axvline(reach, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
            for network, path in skills.items():
                seeds = [np.maximum(drawable(path[at]), -0.2) for at in sorted(path)]
                means = np.array([each.mean() for each in seeds])
                spans = [means - [each.min() for each in seeds], [each.max() for each in seeds] - means]
                look = {"color": colours[network], "linestyle": dash(colours[network]), "marker": "o"}
                look["zorder"] = 2 + len(networks) - networks.index(network)  # the first one on top
                axes.errorbar(sorted(path), means, yerr=spans, markersize=3.2, elinewidth=0.9, **look)
            scale_y(axes, (-0.25, 1.05), False)
            axes.set_xscale("log")
            axes.set_xlim(min(distances[0], reach) / 1.2, max(distances[-1], reach) * 1.2)
            axes.xaxis.set_major_locator(FixedLocator(distances))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(tick))
            if place:
                axes.tick_params(labelleft=False)
            place_text(figure, left, BOTTOM + HEIGHT + 6, name, color=INK)
        entries = [(each, {"color": colours[each], "linestyle": dash(colours[each])}) for each in networks]
        legend_row(figure, LEFT, height - 32, entries)
        place_text(figure, 0, height - 14, y, color=MUTED)
        place_text(figure, WIDTH - measure(BELOW) - 4, 6, BELOW, color=MUTED)
        place_text(figure, LEFT, 6, f"dotted: {tick(reach)} hops, best constant", color=MUTED)
    return figure
