"""Hallmarks of trajectories by step, by layer and by principal component, beside those of a random walk."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

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
from gramian.report.style import INK, MUTED, PAPER, SIZE, dash, palette, styled, tick
from gramian.report.trajectory import BOTTOM, TOP, legend_row

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "d")
WALK, DOTTED = (0, (4, 2.5)), (0, (2, 2))
NOISE = "rounding noise"
_NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Trace:
    """A hallmark by step, with the ends of its band of error, and the level that is rounding noise."""

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    floor: Sequence[float] = ()


def traces(
    series: Mapping[str, Trace],
    *,
    y: str,
    x: str = "step",
    unit: str = "",
    colours: Mapping[str, str] | None = None,
    references: Mapping[str, float] = _NONE,
    log: bool = False,
    log_x: bool = False,
) -> Figure:
    """Draw one line a series with its band of error, dotted horizontals at `references`, noise shaded below.

    `unit` follows the level of a reference without a space. `log` and `log_x` make the axes logarithmic;
    what is not positive there is left out. A floor far below all values is not drawn.

    Raises: InputError when there is no series, or one has not as many values as steps.
    """
    with styled():
        chosen = _colours(series, colours)
        rows = {name: _rows(name, each, log, log_x) for name, each in series.items()}
        levels = {short(f"{name} {tick(level)}{unit}"): float(level) for name, level in references.items()}
        levels = {label: level for label, level in levels.items() if math.isfinite(drawable(level, log))}
        names = [_label(name, row[0] + row[1]) for name, row in rows.items()]
        names += [*levels, *([NOISE] if any(len(each.floor) for each in series.values()) else [])]
        figure, axes = _beside(names, height := 300 + 14 * max(0, len(names) - 14))
        body = [*chain(*(row[1:4].ravel() for row in rows.values())), *levels.values()]
        least = min((value for value in body if math.isfinite(value)), default=math.nan)
        noise = [level for row in rows.values() for level in row[4] if log and level > least / 100]
        scale_y(axes, limits([*body, *noise], log), log)
        _scale_steps(axes, [*chain(*(row[0] for row in rows.values()))], log_x)
        ends = [_draw_level(axes, label, level) for label, level in levels.items()]
        ends += _shade_noise(axes, list(rows.values()))
        for name, (steps, values, low, high, _) in rows.items():
            colour = chosen[name]
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            mark = "o" if np.isfinite(values).sum() <= 60 else ""
            axes.plot(steps, values, color=colour, linestyle=dash(colour), linewidth=1.5, marker=mark, ms=3)
            ends.append(_end(axes, steps, values, name, colour))
        _name_ends(figure, axes, ends)
        place_text(figure, 0, height - 14, y, color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
    return figure


def update_angles(
    series: Mapping[str, Trace],
    *,
    y: str = "angle between consecutive updates, degrees",
    colours: Mapping[str, str] | None = None,
    log_x: bool = False,
) -> Figure:
    """Draw angles between updates by step, beside a random walk's 90° and the 120° of jitter about a point.

    Raises: InputError as `traces`.
    """
    marks = {"random walk": 90.0, "jitter": 120.0}
    figure = traces(series, y=y, unit="°", colours=colours, references=marks, log_x=log_x)
    axes = figure.axes[0]
    if 45 < np.ptp(axes.get_ylim()) < 400:
        axes.yaxis.set_major_locator(MultipleLocator(30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda angle, _: f"{tick(angle)}°"))
    return figure


def update_lengths(
    series: Mapping[str, Trace],
    *,
    y: str = "length of the update per step",
    colours: Mapping[str, str] | None = None,
    log_x: bool = False,
) -> Figure:
    """Draw lengths of updates by step on a logarithmic scale, noise of rounding shaded.

    Raises: InputError as `traces`.
    """
    return traces(series, y=y, colours=colours, log=True, log_x=log_x)


def _rows(name: str, trace: Trace, log: bool, log_x: bool) -> np.ndarray:
    """Return steps, values, low, high and floor as rows; NaN where there is nothing to draw."""
    count = len(trace.steps)
    given = (trace.values, trace.low, trace.high, trace.floor)
    if len(trace.values) != count or any(len(row) not in (0, count) for row in given):
        raise InputError(f"Series {name!r} needs as many values, ends of its band and floors as steps.")
    empty = np.full(count, np.nan)
    rows = [drawable(row, log) if len(row) else empty for row in given]
    return np.array([drawable(trace.steps, log_x), *rows])


def _scale_steps(axes: Axes, steps: Sequence[float], log: bool) -> None:
    if not log:
        return scale_x(axes, limits(steps, margin=0.02), integer=True)
    ends = limits(steps, True, margin=0.02)
    axes.set_xscale("log")
    axes.set_xlim(*ends)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if ends[1] / ends[0] > 300 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    return None


def _draw_level(axes: Axes, label: str, level: float) -> tuple[Any, ...]:
    axes.axhline(level, color=MUTED, linewidth=1.0, linestyle=DOTTED)
    return _end(axes, axes.get_xlim(), (level, level), label, MUTED, MUTED)


def _shade_noise(axes: Axes, rows: Sequence[np.ndarray]) -> list[tuple[Any, ...]]:
    """Shade what is below the floors, and return where to name them, if one is within the axes."""
    bottom = axes.get_ylim()[0]
    seen = [row for row in rows if (row[4] > bottom).any()]
    for steps, *_, floor in seen:
        axes.fill_between(steps, bottom, floor, color=MUTED, alpha=0.16, linewidth=0)
    highest = max(seen, key=lambda row: np.nanmax(row[4]), default=None)
    return [] if highest is None else [_end(axes, highest[0], highest[4], NOISE, MUTED, MUTED)]


def layer_profile(
    kinds: Mapping[str, Sequence[float]],
    layers: Sequence[str],
    *,
    y: str,
    x: str = "layer",
    unit: str = "",
    colours: Mapping[str, str] | None = None,
    references: Mapping[str, float] = _NONE,
) -> Figure:
    """Draw a hallmark by layer in the order of the model: `kind -> values`, NaN where a layer has no such.

    Each kind of part (Q, K, V, O, MLP, norm, …) has a colour and a mark of its own.

    Raises: InputError when there is no kind, or one has not as many values as layers.
    """
    for kind, values in kinds.items():
        if len(values) != len(layers):
            raise InputError(f"Kind {kind!r} needs a value or NaN for each of {len(layers)} layers.")
    with styled():
        chosen = _colours(kinds, colours)
        labels = {f"{name} {tick(level)}{unit}": level for name, level in references.items()}
        entries = [(short(kind), _mark(chosen[kind], place)) for place, kind in enumerate(kinds)]
        entries += [(short(label), {"color": MUTED, "linestyle": DOTTED}) for label in labels]
        legend = _wrapped(entries, WIDTH - 52)
        figure = canvas(height := 300 + 18 * len(legend))
        axes = place_axes(figure, 52, BOTTOM, WIDTH - 52 - 16, 300 - BOTTOM - 26)
        rows = [drawable(values) for values in kinds.values()]
        levels = drawable(list(references.values()))
        scale_y(axes, limits([*chain(*rows), *levels]), False)
        axes.set_xlim(-0.6, max(len(layers), 1) - 0.4)
        axes.set_xticks(*_layer_names(layers, WIDTH - 68))
        for level in levels[np.isfinite(levels)]:
            axes.axhline(level, color=MUTED, linewidth=1.0, linestyle=DOTTED)
        size = 6.0 if len(layers) <= 30 else 4.5
        for place, (kind, row) in enumerate(zip(kinds, rows, strict=True)):
            axes.plot(row, color=chosen[kind], linewidth=0.9, alpha=0.5)
            axes.plot(row, **_mark(chosen[kind], place, size))
        for index, line in enumerate(legend):
            legend_row(figure, 52, height - 34 - 18 * index, line)
        place_text(figure, 0, height - 14, y, color=MUTED)
        axes.set_xlabel(x, color=MUTED, loc="right")
    return figure


def _mark(colour: str, place: int, size: float = 6.0) -> dict[str, Any]:
    marker = MARKERS[place % len(MARKERS)]
    look = {"color": colour, "marker": marker, "linestyle": "", "markeredgecolor": PAPER}
    return {**look, "markersize": size * (1.15 if marker in "PX" else 1.0), "markeredgewidth": 0.4}


def _wrapped(entries: Sequence[tuple[str, dict[str, Any]]], room: float) -> list[list[Any]]:
    """Part the entries of a legend into rows that fit."""
    rows: list[list[Any]] = [[]]
    left = 0.0
    for name, look in entries:
        wide = measure(name) + 44
        if rows[-1] and left + wide > room:
            rows.append([])
            left = 0.0
        rows[-1].append((name, look))
        left += wide
    return rows


def _layer_names(layers: Sequence[str], room: float) -> tuple[list[int], list[str]]:
    """Return the places and names of the layers that are written: words first, then round numbers, as fit."""
    texts = [short(layer, 12) for layer in layers]
    halves = [(measure(text) + 6) / 2 * len(texts) / room for text in texts]
    numbers = [place for place, text in enumerate(texts) if text.isdecimal()]
    every = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 10**9) if 28 * len(numbers) <= step * room)
    wished = [place for place in range(len(texts)) if place not in numbers]
    wished += [place for place in numbers if int(texts[place]) % every == 0]
    chosen: list[int] = []
    for place in wished:
        if all(abs(place - other) >= halves[place] + halves[other] for other in chosen):
            chosen.append(place)
    return sorted(chosen), [texts[place] for place in sorted(chosen)]


def component_shares(
    shares: Mapping[str, Sequence[float]],
    walk: Sequence[float] | None = None,
    *,
    most: int = 10,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the shares of the variance in the first components, and those of a random walk dashed.

    Without `walk` these are 6 / (π² k²), the limit of many evenly spaced checkpoints. Shares below 0.01 %
    are below the axis.

    Raises: InputError when there is no series.
    """
    reference = [6 / (math.pi * k) ** 2 for k in range(1, most + 1)] if walk is None else walk
    with styled():
        chosen = _colours(shares, colours)
        lines = [("random walk", MUTED, WALK, reference)]
        lines += [(name, chosen[name], dash(chosen[name]), values) for name, values in shares.items()]
        rows = [drawable(values, log=True)[:most] for *_, values in lines]
        figure, axes = _beside([_label(name, row) for (name, *_), row in zip(lines, rows, strict=True)], 300)
        values = np.concatenate(rows)
        floor = max(min(limits(values, True, 0.0)[0], 0.05), 1e-4)
        scale_y(axes, (floor / 1.2, 1.2), True)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{tick(100 * share)} %"))
        scale_x(axes, (0.7, max(2, *map(len, rows)) + 0.3), ticks=most, integer=True)
        ends = []
        for (name, colour, dashes, _), row in zip(lines, rows, strict=True):
            at = np.arange(1, len(row) + 1)
            axes.plot(at, row, marker="o", color=colour, linestyle=dashes, markersize=4.5)
            ends.append(_end(axes, at, row, name, colour, MUTED if colour == MUTED else INK))
        _name_ends(figure, axes, ends)
        place_text(figure, 0, 300 - 14, "share of the variance", color=MUTED)
        axes.set_xlabel("principal component", color=MUTED, loc="right")
    return figure


def _colours(series: Mapping[str, Any], colours: Mapping[str, str] | None) -> Mapping[str, str]:
    if not series:
        raise InputError("A figure needs at least one series, and got none.")
    if missing := [name for name in series if colours is not None and name not in colours]:
        raise InputError(f"The colours given have none for {missing[0]!r}; pass palette(names) of all names.")
    return palette(series) if colours is None else colours


def _label(name: str, values: np.ndarray) -> str:
    """Return the name as it is written, and that there is nothing to see if so."""
    return short(name) if np.isfinite(values).any() else f"{short(name, 20)}: none"


def _beside(names: Sequence[str], height: float) -> tuple[Figure, Axes]:
    """Return a figure whose axes leave room for names on their right."""
    figure = canvas(height)
    room = 22 + max(map(measure, names))
    return figure, place_axes(figure, 52, BOTTOM, WIDTH - 52 - room, height - BOTTOM - TOP)


def _end(axes: Axes, xs: Any, ys: Any, name: str, colour: str, ink: str = INK) -> tuple[Any, ...]:
    """Return where a line was last seen, in points, with its label and colours."""
    xs, ys = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    seen = np.flatnonzero(np.isfinite(xs + ys))
    label = _label(name, xs + ys)
    if not seen.size:
        return None, axes.transAxes.transform((1.0, 1.0))[1], label, colour, MUTED
    x, y = axes.transData.transform((xs[seen[-1]], ys[seen[-1]]))
    return x, y, label, colour, ink


def _name_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[Any, ...]]) -> None:
    """Write names on the right of the axes, moved apart and tied to the ends of their lines."""
    right, floor = axes.transAxes.transform((1.0, 0.0))
    ceiling = axes.transAxes.transform((1.0, 1.0))[1]
    levels = [min(max(end[1], floor), ceiling) for end in ends]
    for (x, _, text, colour, ink), level, place in zip(
        ends, levels, spread(levels, SIZE + 3, floor, ceiling), strict=True
    ):
        if x is not None:
            thin = {"color": colour, "linewidth": 0.8, "alpha": 0.6}
            place_line(figure, (x, right), (level, level), linestyle=(0, (1, 3)), **thin)
            place_line(figure, (right, right + 10, right + 14), (level, place, place), **thin)
        place_text(figure, right + 17, place, text, color=ink, va="center_baseline")
