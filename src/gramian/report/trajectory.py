"""Maps of the cosines between the checkpoints of a trajectory, and its path in the plane of two components.

Both give each checkpoint equal room, whatever the steps between two of them, and write the optimiser's step
on the axis: of checkpoints spaced by powers of two the first ones stay visible. What is not finite is hatched
in a map and left out of a path.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from gramian.errors import InputError
from gramian.report.canvas import (
    STEPS,
    WIDTH,
    canvas,
    drawable,
    measure,
    place_axes,
    place_line,
    place_text,
    scale_x,
    scale_y,
    short,
)
from gramian.report.distribution import percent
from gramian.report.style import INK, MUTED, PAPER, RULE, styled, tick

UNIFORM, SIGNED = "viridis", "RdBu_r"
"""Colours of cosines of one sign, and of both signs with white for 0."""

PASSING = LinearSegmentedColormap.from_list("passing", ["#3f63c4", "#a0568f", "#e8833a"])
"""Colours of time, from start to end; all of them are seen on light and on dark paper."""

BOTTOM, TOP = 44.0, 30.0
"""Room below and above the axes."""


def cosine_range(*matrices: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the ends of the colours of maps: their range off the diagonal, drawn out to 1 where near.

    Where cosines of both signs matter, the ends are −a and a, and 0 has the middle colour. Maps of equal
    cosines keep (0, 1) or (−1, 1), so that rounding never looks like structure.
    """
    cells = [drawable(matrix) for matrix in matrices]
    cells = [cell[~np.eye(*cell.shape, dtype=bool)] for cell in cells if cell.ndim == 2]
    values = np.concatenate([cell[np.isfinite(cell)] for cell in cells] or [np.empty(0)])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if high - low < 1e-9:
        return (0.0, 1.0) if high >= 0 else (-1.0, 1.0)
    if -low > 0.1 * high:
        return -max(-low, high), max(-low, high)
    return low, 1.0 if 1 - high <= 0.25 * (high - low) else high


def similarity_map(
    matrix: Sequence[Sequence[float]],
    steps: Sequence[float],
    *,
    title: str = "",
    reading: str = "cosine",
    x: str = "step",
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Draw the cosines between checkpoints as a square of cells; the first checkpoint is on the top left.

    The colours end at `low` and `high`, by default at those of `cosine_range`; an end that cells go beyond
    has an arrow. Cells that are not finite are hatched, and whole rows of them named by their steps.

    Raises: InputError unless there is a row and a column for each step.
    """
    cells = drawable(matrix)
    if not len(steps) or cells.shape != (len(steps), len(steps)):
        raise InputError(
            f"A map of {len(steps)} steps needs as many rows and columns, and got {cells.shape}."
        )
    ends = cosine_range(matrix)
    low, high = ends[0] if low is None else low, ends[1] if high is None else high
    if not low < high:
        raise InputError(f"The colours of a map need low below high, and got {low} and {high}.")
    with styled():
        places, names = _checkpoints(steps)
        values, numbers = _numbers(low, high)
        left = 10 + max(map(measure, names))
        side = WIDTH - left - 14 - 12 - 8 - max(map(measure, (*numbers, "−0.000")))
        figure = canvas(BOTTOM + side + TOP)
        axes = place_axes(figure, left, BOTTOM, side, side)
        norm = Normalize(low, high)
        colours = SIGNED if low == -high else UNIFORM
        borders = np.arange(len(steps) + 1) - 0.5
        axes.pcolormesh(
            borders, borders, np.ma.masked_invalid(cells), norm=norm, cmap=colours, rasterized=True
        )
        axes.set_ylim(borders[-1], borders[0])
        axes.set_xticks(places, names)
        axes.set_yticks(places, names)
        axes.tick_params(length=3)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        _mark_holes(figure, axes, cells, steps, x)
        _bar(
            figure, (left + side + 14, BOTTOM, 12, side), norm, colours, values, numbers, _beyond(cells, norm)
        )
        place_text(figure, 0, BOTTOM + side + 14, short(title, 52), color=INK)
        place_text(figure, WIDTH, BOTTOM + side + 14, reading, color=MUTED, ha="right")
        axes.set_xlabel(x if _even(steps) else f"{x}, one cell a checkpoint", color=MUTED, loc="right")
    return figure


def _even(steps: Sequence[float]) -> bool:
    gaps = np.diff(np.asarray(steps, dtype=float))
    return bool(gaps.size and gaps[0] > 0 and np.allclose(gaps, gaps[0], rtol=1e-6, atol=0))


def _checkpoints(steps: Sequence[float], most: int = 6) -> tuple[list[float], list[str]]:
    """Return places on an axis of checkpoints 0, 1, 2, …, and the steps written there.

    Evenly spaced checkpoints get round steps; of others some are named, round ones first.
    """
    at, count = np.asarray(steps, dtype=float), len(steps)
    if count > most and _even(steps):
        values = MaxNLocator(most - 1, steps=STEPS, integer=True).tick_values(at[0], at[-1])
        values = values[(values >= at[0]) & (values <= at[-1])]
        return list((values - at[0]) / (at[1] - at[0])), [tick(value) for value in values]
    chosen = list(range(count)) if count <= most else [0, *_round(at, most), count - 1]
    return [float(place) for place in chosen], [tick(at[place]) for place in chosen]


def _round(steps: np.ndarray, most: int) -> list[int]:
    """Return places evenly between the first and the last, each of the step with fewest digits nearby."""
    gap = (steps.size - 1) / (most - 1)
    digits = [len(f"{step:.0f}".rstrip("0")) for step in steps]
    places = []
    for target in gap * np.arange(1, most - 1):
        near = range(math.ceil(target - 0.3 * gap), math.floor(target + 0.3 * gap) + 1)
        found = [(digits[place], abs(place - target), place) for place in {*near, round(target)}]
        places.append(min(found)[-1])
    return places


def _numbers(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return values for a bar of colours, and their texts with as many decimals as tell them apart."""
    values = MaxNLocator(5, steps=STEPS).tick_values(low, high)
    gap = values[1] - values[0]
    values = [float(value) for value in values if low - 1e-6 * gap <= value <= high + 1e-6 * gap]
    places = next(
        (few for few in range(12) if all(abs(round(value, few) - value) < 1e-3 * gap for value in values)), 12
    )
    return values, [f"{value + 0.0:.{places}f}".replace("-", "−") for value in values]


def _beyond(cells: np.ndarray, norm: Normalize) -> str:
    """Say at which ends of the colours there are cells beyond them."""
    shown = cells[np.isfinite(cells)]
    low, high = bool((shown < norm.vmin - 1e-9).any()), bool((shown > norm.vmax + 1e-9).any())  # type: ignore[operator]
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[
        low, high
    ]


def _bar(
    figure: Figure, box: Sequence[float], norm: Normalize, colours: Any,
    values: Sequence[float], names: Sequence[str], beyond: str = "neither",
) -> Any:  # fmt: skip
    """Draw a vertical bar of colours with names at values."""
    axes = place_axes(figure, *box)
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=axes, extend=beyond, extendfrac=0.03)
    bar.set_ticks(list(values), labels=list(names))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]
    return bar


def _mark_holes(figure: Figure, axes: Axes, cells: np.ndarray, steps: Sequence[float], x: str) -> None:
    """Hatch what no cell covers, and say so; whole rows are named by their steps."""
    axes.set_facecolor(RULE)
    holes = ~np.isfinite(cells)
    if not holes.any():
        return
    side = len(steps)
    lines = {"hatch": "////", "edgecolor": MUTED, "linewidth": 0, "facecolor": "none", "zorder": 0}
    axes.add_patch(Rectangle((-0.5, -0.5), side, side, **lines))
    lost = [tick(step) for step, row in zip(steps, holes, strict=True) if row.all()]
    words = (
        f" at {x} {', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}" if 0 < len(lost) < len(steps) else ""
    )
    place_text(figure, 0, 5, short(f"hatched: no cosine{words}", 48), color=MUTED)


def path_plane(
    scores: Sequence[Sequence[float]],
    steps: Sequence[float],
    *,
    shares: Sequence[float] = (),
    walk: Sequence[Sequence[float]] | None = None,
    x: str = "step",
) -> Figure:
    """Draw a path in the plane of its first two principal components, both on one scale, coloured by step.

    `shares` are the components' shares of the variance. `walk` holds the scores that a random walk with these
    steps has on average; it is drawn dashed, turned and sized as the path, because its plane looks structured
    too.

    Raises: InputError unless each step has two scores or more, and so in `walk`.
    """
    points = _plane(scores, steps)
    average = points[:0] if walk is None else _like(_plane(walk, steps), points)
    with styled():
        places, names = _checkpoints(steps)
        right = 14 + 12 + 8 + max(map(measure, names))
        figure = canvas(height := 380)
        axes = place_axes(figure, 52, BOTTOM, WIDTH - 52 - right, height - BOTTOM - 48)
        _equal_scales(axes, np.concatenate([points, average]))
        axes.plot(*average.T, color=MUTED, linewidth=1.3, linestyle=(0, (4, 2.5)))
        norm = Normalize(0, max(len(steps) - 1, 1))
        key = _draw_path(axes, points, norm)
        if walk is not None:
            key.append(("random walk, on average", {"color": MUTED, "linestyle": (0, (2.5, 1.5))}))
        legend_row(figure, 52, height - 34, key)
        _bar(figure, (WIDTH - right + 14, BOTTOM, 12, height - BOTTOM - 48), norm, PASSING, places, names)
        said = [f" ({percent(share)} of the variance)" for share in shares[:2]] + ["", ""]
        place_text(figure, 0, height - 14, f"component 2{said[1]}", color=MUTED)
        place_text(figure, WIDTH, height - 34, x, color=MUTED, ha="right")
        axes.set_xlabel(f"component 1{said[0]}", color=MUTED, loc="right")
    return figure


def _draw_path(axes: Axes, points: np.ndarray, norm: Normalize) -> list[tuple[str, dict[str, Any]]]:
    """Draw a path, its first point a ring and its last one a disc, and return what a legend says of these."""
    pieces = [points[start : start + 2].tolist() for start in range(len(points) - 1)]
    between = PASSING(norm(np.arange(len(pieces)) + 0.5))
    axes.add_collection(LineCollection(pieces, colors=between, linewidths=1.5))
    colours = PASSING(norm(np.arange(len(points))))
    axes.scatter(*points.T, c=colours, s=9, linewidths=0, zorder=3)
    key = []
    for place, words, face in ((0, "first", PAPER), (-1, "last", colours[-1])):
        look = {"color": colours[place], "marker": "o", "markerfacecolor": face, "markeredgewidth": 1.8}
        axes.plot(*points[place], **look, markersize=8, zorder=4, linestyle="")
        key.append((words, {**look, "markersize": 7, "linestyle": ""}))
    return key


def _plane(scores: Sequence[Sequence[float]], steps: Sequence[float]) -> np.ndarray:
    points = drawable(scores)
    if not len(steps) or points.ndim != 2 or len(points) != len(steps) or points.shape[1] < 2:
        raise InputError(f"A path of {len(steps)} steps needs two scores for each, and got {points.shape}.")
    return points[:, :2]


def _like(walk: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Turn components round to agree with the path's, and give the walk the path's size."""
    both = np.isfinite(walk).all(1) & np.isfinite(points).all(1)
    mine, its = points[both], walk[both]
    signs = np.where((mine * its).sum(0) < 0, -1.0, 1.0)
    size = math.sqrt((its**2).sum())
    return walk * signs * (math.sqrt((mine**2).sum()) / size if size else 0.0)


def _equal_scales(axes: Axes, points: np.ndarray) -> None:
    """Give both axes one scale that holds all points."""
    box = axes.get_window_extent()
    shown = points[np.isfinite(points).all(1)]
    low, high = (shown.min(0), shown.max(0)) if len(shown) else (np.zeros(2), np.zeros(2))
    room = np.array([box.width, box.height])
    unit = float(((high - low) / room).max()) * 1.12 or 1 / box.width
    middle = (low + high) / 2
    scale_x(axes, (middle[0] - unit * room[0] / 2, middle[0] + unit * room[0] / 2))
    scale_y(axes, (middle[1] - unit * room[1] / 2, middle[1] + unit * room[1] / 2), False)
    axes.grid(True, axis="both")


def legend_row(
    figure: Figure, left: float, level: float, entries: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """Write names in a row, each behind its mark."""
    for name, look in entries:
        wide = 5.0 if look.get("linestyle") == "" else 18.0
        xs = (left,) if wide == 5.0 else (left, left + wide)
        place_line(figure, xs, (level + 4,) * len(xs), **look)
        place_text(figure, left + wide + 4, level, name, color=INK)
        left += wide + 4 + measure(name) + 18
