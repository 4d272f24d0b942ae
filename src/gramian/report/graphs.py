"""Networks on graphs: scores by network and seed, and how far filters by distance look."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from gramian.errors import InputError
from gramian.report.canvas import (
    WIDTH,
    canvas,
    drawable,
    limits,
    measure,
    place_axes,
    place_text,
    scale_x,
    short,
)
from gramian.report.style import INK, MUTED, PAPER, RULE, SERIES, number, palette, styled, tick
from gramian.report.trajectory import legend_row

ROW, BOTTOM, TOP = 30, 44, 30
"""Height of a network's row, and room below and above the axes."""

FAR = 3.0
"""A constant is drawn as a line if it is no farther from all scores than so many times their range."""

PANEL, COLUMNS, LEFT = 96, 2, 34
"""Height of a layer's axes, panels side by side, and room beside each."""

OUTER = (0.1, 0.9)
"""Quantiles over units that a shade reaches to."""

TRAINED = SERIES[0][0]
CONSTANT = (0, (2, 2))


def seed_scores(
    series: Mapping[str, Sequence[float]],
    *,
    value: str,
    constant: float,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the scores of networks, `name -> one a seed`, as dots with their mean, and the best constant's.

    Mean and standard deviation are written beside. A constant far from all scores is named and not drawn, so
    that it does not squeeze them together.

    Raises: InputError when there is no network, or one without a seed.
    """
    if not series or not all(series.values()):
        raise InputError("A figure of scores needs at least one network and a seed of each.")
    every = drawable(list(chain(*series.values())))
    near = every.size == 1 or np.abs(every - constant).min() <= FAR * np.ptp(every)
    texts = {name: _mean(values) for name, values in series.items()}
    with styled():
        chosen = palette(series) if colours is None else colours
        figure = canvas(height := TOP + ROW * len(series) + BOTTOM)
        left = 18 + max(measure(short(name)) for name in series)
        right = WIDTH - max(map(measure, texts.values()))
        axes = place_axes(figure, left, BOTTOM, right - 12 - left, ROW * len(series))
        scale_x(axes, limits([*every, constant] if near else every, margin=0.08), ticks=4)
        axes.set_ylim(len(series) - 0.5, -0.5)
        axes.set_yticks([])
        axes.grid(True, axis="x")
        if near:
            axes.axvline(constant, color=MUTED, linewidth=1.2, linestyle=CONSTANT)
        for row, (name, values) in enumerate(series.items()):
            level = BOTTOM + (len(series) - 0.5 - row) * ROW
            axes.axhline(row, color=RULE, linewidth=0.7)
            axes.plot([mean(values)] * 2, (row - 0.3, row + 0.3), color=chosen[name], linewidth=2)
            axes.plot(
                values, [row] * len(values), "o", color=chosen[name], markersize=6.5,
                markeredgecolor=PAPER, markeredgewidth=0.8, alpha=0.8,
            )  # fmt: skip
            place_text(figure, left - 10, level, short(name), color=INK, ha="right", va="center_baseline")
            place_text(figure, right, level, texts[name], color=INK, va="center_baseline")
        axes.set_xlabel(value, color=MUTED, loc="right")
        said = f"best constant: {tick(constant)}" + (", dotted" if near else ", beyond the drawing")
        place_text(figure, 0, height - 14, said, color=MUTED)
    return figure


def _mean(values: Sequence[float]) -> str:
    deviation = f" ± {number(stdev(values), 2)}" if len(values) > 1 else ""
    return number(float(mean(values)), 3) + deviation


def reach(trained: Sequence[np.ndarray], start: Sequence[np.ndarray]) -> Figure:
    """Draw the weights |λ|^k of what lies k hops away, a panel a layer: mean over units and their spread.

    A thin dashed line is the mean before training.

    Shapes: for each layer |λ| of its units (units), trained and at the start: two rows of distances 0 … K − 1
        by units, (K, units).
    Raises: InputError for no layer, other layers at the start than trained, fewer than two distances.
    """
    if not trained or len(trained) != len(start) or len({len(each) for each in [*trained, *start]}) > 1:
        raise InputError("A figure of reach needs layers, trained and at the start, of equal distances.")
    if len(trained[0]) < 2:
        raise InputError(f"A figure of reach needs at least two distances, got {len(trained[0])}.")
    rows = math.ceil(len(trained) / COLUMNS)
    hops = np.arange(len(trained[0]))
    with styled():
        figure = canvas(height := rows * (PANEL + 34) + 22 + 52)
        wide = (WIDTH - COLUMNS * LEFT - 14) / COLUMNS
        for place, (now, before) in enumerate(zip(trained, start, strict=True)):
            row, column = divmod(place, COLUMNS)
            left = LEFT + column * (wide + LEFT + 8)
            bottom = height - 52 - (row + 1) * (PANEL + 34) + 22
            axes = place_axes(figure, left, bottom, wide, PANEL)
            low, high = np.quantile(now, OUTER, axis=1)
            axes.fill_between(hops, low, high, color=TRAINED, alpha=0.2, linewidth=0)
            axes.plot(hops, now.mean(1), color=TRAINED)
            axes.plot(hops, before.mean(1), color=MUTED, linewidth=1.1, linestyle=(0, (4, 2)))
            axes.set_ylim(0, 1.04)
            axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
            scale_x(axes, (0, hops[-1]), ticks=4, integer=True)
            axes.tick_params(labelbottom=place + COLUMNS >= len(trained))
            place_text(figure, left, bottom + PANEL + 6, f"layer {place + 1}", color=INK)
        place_text(figure, 0, height - 14, "weight of what lies k hops away", color=MUTED)
        place_text(figure, WIDTH, 6, "distance k (hops)", color=MUTED, ha="right")
        _legend(figure, height - 34)
    return figure


def _legend(figure: Figure, level: float) -> None:
    legend_row(
        figure,
        LEFT,
        level,
        [
            ("mean over units", {"color": TRAINED}),
            ("80 % of the units", {"color": TRAINED, "linewidth": 8, "alpha": 0.2, "solid_capstyle": "butt"}),
            ("mean before training", {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (4, 2))}),
        ],
    )
