"""Pruned networks: errors and certificates by density and by prior fraction, layers, probabilities over time.

Dashes say the quantity: a full line is an error on held-out examples, broken ones are bounds. Colours say the
predictor, or the series where several are compared. What is NaN is left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

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
from gramian.report.distribution import DARK, LIGHT
from gramian.report.style import INK, MUTED, RULE, SERIES, SIZE, palette, styled, tick
from gramian.report.trajectory import legend_row

RANDOM, START, FIXED, TEST_SET, PRIOR = (pair[0] for pair in SERIES[:5])
"""Colours of the random predictor, the starting mask, the fixed mask, the prior's fixed mask, the prior."""

Look = dict[str, Any]
ERROR: Look = {"linestyle": "-", "marker": "o"}
CERTIFICATE: Look = {"linestyle": (0, (4, 2)), "marker": "s"}
OF_PRIOR: Look = {"linestyle": (0, (7, 2, 1, 2)), "marker": "D"}
OF_TEST_SET: Look = {"linestyle": (0, (1, 1.4)), "marker": "^"}

LEFT, BOTTOM, TOP = 52.0, 44.0, 30.0
"""Room beside, below and above the axes."""


@dataclass(frozen=True)
class DensityPath:
    """Held-out errors and certificates by density; NaN where there is none, empty where there are none."""

    densities: Sequence[float]
    baseline: Sequence[float]
    """Errors of the starting mask, weights untouched."""
    random: Sequence[float]
    """Errors of the random predictor."""
    fixed: Sequence[float]
    """Errors of the thresholded network."""
    certificate: Sequence[float] = ()
    """Bounds of the random predictor's risk."""
    prior: Sequence[float] = ()
    """Bounds of the prior's own risk."""
    test_set: Sequence[float] = ()
    """Test-set bounds of the prior's thresholded mask."""


@dataclass(frozen=True)
class PriorPath:
    """What one way of learning certifies by the share of the prior set; each row one seed."""

    fractions: Sequence[float]
    certificate: Sequence[Sequence[float]]
    error: Sequence[Sequence[float]]
    """Held-out errors of the random predictor."""
    prior: Sequence[Sequence[float]]
    """Bounds of the prior's own risk."""
    test_set: Sequence[Sequence[float]]
    """Test-set bounds of the prior's thresholded mask; NaN without prior examples."""
    kl: Sequence[Sequence[float]]
    """KL of posterior and prior per example of the bound set, in nats."""


def density_path(path: DensityPath, dense: float, *, y: str = "0-1 error") -> Figure:
    """Draw held-out errors as lines and certificates broken, against density; sparser is further right.

    The densities are on a logarithmic axis; so are the errors if none is 0 and they differ tenfold. A dotted
    line is the `dense` network.

    Raises: InputError for no density, one outside (0, 1], and numbers of values that differ from theirs.
    """
    lines = {
        "starting mask": (path.baseline, START, ERROR),
        "random predictor": (path.random, RANDOM, ERROR),
        "fixed mask": (path.fixed, FIXED, ERROR),
        "certificate": (path.certificate, RANDOM, CERTIFICATE),
        "prior's certificate": (path.prior, PRIOR, OF_PRIOR),
        "test-set bound": (path.test_set, TEST_SET, OF_TEST_SET),
    }
    count = len(path.densities)
    if not count or not all(0 < density <= 1 for density in path.densities):
        raise InputError("A density path needs one density or more, each above 0 and at most 1.")
    if wrong := [name for name, (values, *_) in lines.items() if len(values) not in (0, count)]:
        raise InputError(f"A density path needs a value of the {wrong[0]}, or NaN, for each density.")
    order = np.argsort(path.densities)[::-1]
    xs = np.asarray(path.densities, dtype=float)[order]
    rows = {
        name: (drawable(values)[order], colour, look)
        for name, (values, colour, look) in lines.items()
        if np.isfinite(drawable(values)).any()
    }
    level = float(drawable(dense))
    with styled():
        named = f"dense {_percent(level)}" if math.isfinite(level) else ""
        figure = canvas(height := 340)
        width = WIDTH - LEFT - 22 - max(map(measure, (named, *rows)))
        axes = place_axes(figure, LEFT, BOTTOM, width, height - BOTTOM - TOP)
        _scale_shares(axes, [level, *chain(*(row[0] for row in rows.values()))])
        _scale_densities(axes, xs, width)
        axes.axhline(level, color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
        ends = [(axes.get_xlim()[1], level, named, MUTED)]
        for name, (values, colour, look) in rows.items():
            axes.plot(xs, values, **_look(colour, look))
            ends.append((*_last(xs, values), name, colour))
        _name_ends(figure, axes, ends)
        place_text(figure, 0, height - 14, y, color=MUTED)
        axes.set_xlabel("density: share of the weights kept", color=MUTED, loc="right")
    return figure


def layer_densities(layers: Mapping[str, tuple[float, float]], *, whole: float = math.nan) -> Figure:
    """Draw the shares of each layer, `name -> (kept, expected)`, as a full and a pale bar, in their order.

    Kept are the weights of the fixed mask, expected is the mean probability. A dotted line is the share kept
    of the `whole` model. Of very many layers some are named.

    Raises: InputError when there is no layer.
    """
    if not layers:
        raise InputError("Shares by layer need one layer or more, and got none.")
    kept, expected = np.array([drawable(pair) for pair in layers.values()]).T
    row = min(30.0, max(1000 / len(layers), 4.0))
    every = math.ceil((SIZE + 1) / row)
    names = [short(name) for name in layers]
    with styled():
        figure = canvas(height := row * len(layers) + BOTTOM + 48)
        left = 10 + max(map(measure, names))
        axes = place_axes(figure, left, BOTTOM, WIDTH - left - 16, row * len(layers))
        top = max((value for value in (*kept, *expected, whole) if math.isfinite(value)), default=0.0)
        scale_x(axes, (0.0, 1.06 * top or 1.0))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set_ylim(len(layers) - 0.5, -0.5)
        places = np.arange(len(layers))
        axes.barh(places - 0.2, kept, 0.36, color=RANDOM, linewidth=0)
        axes.barh(places + 0.2, expected, 0.36, color=RANDOM, alpha=0.4, linewidth=0)
        axes.set_yticks(places[::every], names[::every])
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        bar: Look = {"color": RANDOM, "linewidth": 8.0, "solid_capstyle": "butt"}
        entries = [("kept by the fixed mask", bar), ("mean probability", {**bar, "alpha": 0.4})]
        if math.isfinite(whole):
            axes.axvline(whole, color=MUTED, linewidth=1.2, linestyle=(0, (2, 2)))
            entries.append(("whole model", {"color": MUTED, "linestyle": (0, (2, 2)), "linewidth": 1.2}))
        legend_row(figure, 0, height - 34, entries)
        place_text(figure, 0, height - 14, "layer", color=MUTED)
        axes.set_xlabel("share of the layer's weights", color=MUTED, loc="right")
    return figure


def probabilities_over_time(
    steps: Sequence[float],
    counts: Sequence[Sequence[float]],
    *,
    mean: Sequence[float] = (),
    reading: str = "mask variables",
) -> Figure:
    """Draw histograms of λ over steps as colours on a logarithmic scale; a row holds equal bins of [0, 1].

    Bins without any are grey. `mean` is the mean of λ at each step, drawn as a line.

    Raises: InputError unless there is a row of equal length for each of one step or more.
    """
    cells = drawable(counts, log=True) if len({len(row) for row in counts}) == 1 else np.empty(0)
    if cells.ndim != 2 or not cells.size or len(cells) != len(steps) or len(mean) not in (0, len(steps)):
        raise InputError("Probabilities need a histogram of equally many bins for each of one step or more.")
    if not np.isfinite(drawable(steps)).all():
        raise InputError("Probabilities need finite steps.")
    order = np.argsort(steps, kind="stable")
    xs, cells = np.asarray(steps, dtype=float)[order], cells[order]
    with styled():
        figure = canvas(height := 300)
        axes = place_axes(figure, LEFT, BOTTOM, WIDTH - LEFT - 16, height - BOTTOM - 52)
        axes.set_facecolor(RULE)
        axes.grid(False)
        borders = edges(xs)
        scale_x(axes, (float(borders[0]), float(borders[-1])), integer=True)
        if xs.size == 1:
            axes.xaxis.set_major_locator(FixedLocator(list(xs)))
        scale_y(axes, (0.0, 1.0), False)
        most = float(np.nanmax(cells)) if np.isfinite(cells).any() else 1.0
        norm = LogNorm(least := float(min(1.0, np.nanmin(cells, initial=1.0))), max(most, 10 * least))
        bins = np.linspace(0, 1, cells.shape[1] + 1)
        axes.pcolormesh(
            borders, bins, np.ma.masked_invalid(cells.T), norm=norm, cmap="viridis", rasterized=True
        )
        if len(mean):
            line = drawable(mean)[order]
            mark = "o" if xs.size == 1 else ""
            axes.plot(xs, line, color=DARK, linewidth=3.4, marker=mark, markersize=7)
            axes.plot(xs, line, color=LIGHT, linewidth=1.6, marker=mark, markersize=5)
        _colour_scale(figure, norm, height)
        place_text(figure, WIDTH - 218, height - 23, reading, color=MUTED, ha="right")
        place_text(figure, 0, height - 23, "probability λ ↑", color=MUTED)
        axes.set_xlabel("step", color=MUTED, loc="right")
    return figure


def prior_fractions(
    series: Mapping[str, PriorPath],
    *,
    y: str = "0-1 error",
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Draw certificate, held-out error, the prior's certificate and the test-set bound by prior fraction.

    Below is the KL per example of the bound set, on a logarithmic scale. Lines are means over seeds, bars
    their range.

    Raises: InputError when there is no series, a series has not as many values as fractions, and colours
        that lack one.
    """
    chosen = _chosen(series, colours)
    looks = {
        "certificate": CERTIFICATE,
        "held-out error": ERROR,
        "prior's certificate": OF_PRIOR,
        "test-set bound": OF_TEST_SET,
    }
    risks = {
        name: [
            _over_seeds(name, path, rows)
            for rows in (path.certificate, path.error, path.prior, path.test_set)
        ]
        for name, path in series.items()
    }
    costs = {name: _over_seeds(name, path, path.kl, log=True) for name, path in series.items()}
    with styled():
        figure = canvas(height := 456)
        width = WIDTH - LEFT - 22 - max(measure(short(name)) for name in series)
        lower = place_axes(figure, LEFT, BOTTOM, width, 112)
        upper = place_axes(figure, LEFT, 194, width, height - 194 - 48)
        _scale_shares(upper, [*chain(*(lines[1:].ravel() for rows in risks.values() for lines in rows))])
        scale_y(lower, limits(chain(*(lines[1:].ravel() for lines in costs.values())), True), True, ticks=4)
        for axes in (upper, lower):
            scale_x(axes, limits(chain(*(drawable(path.fractions) for path in series.values())), margin=0.03))
            axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        upper.tick_params(labelbottom=False)
        for name in series:
            for lines, look in zip(risks[name], looks.values(), strict=True):
                _draw_range(upper, lines, chosen[name], look)
            _draw_range(lower, costs[name], chosen[name], ERROR)
        for axes, shown in ((upper, {name: rows[0] for name, rows in risks.items()}), (lower, costs)):
            ends = [(*_last(*lines[:2]), short(name), chosen[name]) for name, lines in shown.items()]
            _name_ends(figure, axes, ends)
        _quantities(figure, height - 34, looks)
        place_text(figure, 0, height - 14, y, color=MUTED)
        place_text(figure, 0, BOTTOM + 112 + 10, "KL per example of the bound set, nats", color=MUTED)
        lower.set_xlabel("share of the examples that made the prior", color=MUTED, loc="right")
    return figure


def _chosen(series: Mapping[str, PriorPath], colours: Mapping[str, str] | None) -> Mapping[str, str]:
    if not series:
        raise InputError("A figure needs at least one series, and got none.")
    if missing := [name for name in series if colours is not None and name not in colours]:
        raise InputError(f"The colours given have none for {missing[0]!r}; pass palette(names) of all names.")
    return palette(series) if colours is None else colours


def _over_seeds(name: str, path: PriorPath, rows: Sequence[Sequence[float]], log: bool = False) -> np.ndarray:
    """Return fractions in increasing order, with mean and ends over the seeds that have a value."""
    count = len(path.fractions)
    if any(len(row) != count for row in rows):
        raise InputError(f"Series {name!r} needs a value or NaN for each of its {count} fractions.")
    xs = drawable(path.fractions)
    seeds = np.ma.masked_invalid(drawable([*rows, [math.nan] * count]))
    over = [np.ma.filled(each, np.nan) for each in (seeds.mean(0), seeds.min(0), seeds.max(0))]
    return np.array([xs, *drawable(over, log)])[:, np.argsort(xs, kind="stable")]


def _scale_shares(axes: Axes, shares: Sequence[float]) -> None:
    """Scale an axis of errors from 0 on, or logarithmically where none is 0 and they differ tenfold."""
    finite = [share for share in shares if math.isfinite(share)]
    log = bool(finite) and 0 < 10 * min(finite) <= max(finite)
    scale_y(axes, limits(finite, True) if log else (0.0, 1.06 * max(finite, default=0.0) or 1.0), log)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))


def _scale_densities(axes: Axes, densities: np.ndarray, width: float) -> None:
    """Scale the axis of densities, the largest on the left; those that fit are named, sparse ones first."""
    low, high = limits(densities, True, margin=0.04)
    axes.set_xscale("log")
    axes.set_xlim(high, low)
    named: list[float] = []
    room = (measure("0.5 %") + 10) * math.log(high / low) / width
    for density in densities[::-1]:
        if not named or math.log(density / named[-1]) >= room:
            named.append(float(density))
    axes.xaxis.set_major_locator(FixedLocator(named))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))


def _percent(share: float, _: Any = None) -> str:
    return f"{tick(float(f'{100 * share:.3g}'))} %"


def _look(colour: str, look: Look) -> Look:
    return {**look, "color": colour, "linewidth": 1.6, "markersize": 4.4, "markeredgewidth": 0.0}


def _quantities(figure: Figure, level: float, looks: Mapping[str, Look]) -> None:
    """Write the names of quantities in a row, each behind its dashes and mark."""
    left = 0.0
    for name, look in looks.items():
        xs, ys = (left, left + 13, left + 26), (level + 4,) * 3
        place_line(figure, xs, ys, markevery=[1], **_look(MUTED, look))
        place_text(figure, left + 31, level, name, color=INK)
        left += 31 + measure(name) + 14


def _draw_range(axes: Axes, lines: np.ndarray, colour: str, look: Look) -> None:
    """Draw a mean by x, and its range as bars."""
    xs, mean, low, high = lines
    axes.vlines(xs, low, high, color=colour, linewidth=3, alpha=0.3)
    axes.plot(xs, mean, **_look(colour, look))


def _last(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float]:
    """Return where a line was last seen, NaN if nowhere."""
    seen = np.flatnonzero(np.isfinite(xs) & np.isfinite(ys))
    return (float(xs[seen[-1]]), float(ys[seen[-1]])) if seen.size else (math.nan, math.nan)


def _name_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names on the right of the axes, moved apart, tied to the ends of their lines."""
    right, floor = axes.transAxes.transform((1.0, 0.0))
    ceiling = axes.transAxes.transform((1.0, 1.0))[1]
    ends = [end for end in ends if math.isfinite(end[1])]
    points = [axes.transData.transform(end[:2]) for end in ends]
    heights = spread([point[1] for point in points], SIZE + 3, floor, ceiling)
    for (*_, name, colour), (x, y), height in zip(ends, points, heights, strict=True):
        thin = {"color": colour, "linewidth": 0.8, "alpha": 0.6}
        place_line(figure, (x, right), (y, y), linestyle=(0, (1, 3)), **thin)
        place_line(figure, (right, right + 10, right + 14), (y, height, height), **thin)
        place_text(figure, right + 17, height, name, color=INK, va="center_baseline")


def _colour_scale(figure: Figure, norm: LogNorm, height: float) -> None:
    scale = figure.colorbar(
        ScalarMappable(norm, "viridis"),
        cax=place_axes(figure, WIDTH - 208, height - 24, 192, 9),
        orientation="horizontal",
    )
    scale.set_ticks(LogLocator(numticks=6))
    scale.ax.xaxis.set_minor_locator(NullLocator())
    scale.ax.xaxis.set_major_formatter(FuncFormatter(tick))
    scale.outline.set_visible(False)  # type: ignore[operator]
    scale.solids.set_rasterized(True)  # type: ignore[union-attr]
