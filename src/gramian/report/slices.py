"""Images of a slice: side by side on one scale with a bar of its length, and one row of them as curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gramian.errors import InputError
from gramian.files import atomic_file
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
)
from gramian.report.style import INK, MUTED, RULE, dash, palette, styled, tick
from gramian.report.trajectory import legend_row

GREY = "gray"
"""Of values: black is the least, white the greatest."""
DOUBT = "inferno"
"""Of deviations: black is none."""
COLUMNS, GAP, NAME, TOP, BOTTOM = 3, 10.0, 24.0, 46.0, 30.0
"""Panels in a row, room between and above them, and room above and below all."""
WIDEST = 245.0
"""Side of a panel at most."""
LEFT, UNDER, ROW, SHADE = 52.0, 44.0, 18.0, 0.25


def write_grey(path: Path, image: np.ndarray, ends: tuple[float, float]) -> None:
    """Write an image as a grey PNG of one pixel each, atomically; values beyond the ends are cut there.

    Shapes: image (rows, columns).
    Raises: InputError for ends without width and an image that is not finite.
    Holds: to half a step of 1/255.
    """
    low, high = _ends(ends)
    if image.ndim != 2 or not np.isfinite(image).all():
        raise InputError(f"a picture needs finite numbers of (rows, columns), got {image.shape}")
    grey = np.rint(255 * np.clip((image - low) / (high - low), 0, 1)).astype(np.uint8)
    with atomic_file(path) as temporary:
        imsave(temporary, np.repeat(grey[..., None], 3, axis=-1), format="png")


def slices(
    images: Mapping[str, np.ndarray],
    *,
    value: str,
    ends: tuple[float, float],
    pixel_mm: float,
    colours: str = GREY,
) -> Figure:
    """Draw images of one size side by side, all on the scale above them, with a bar of a round length below.

    Values beyond the ends have the colour of the ends.

    Raises: InputError for no image, images of several sizes, ends without width and pixels without size.
    """
    shapes = {image.shape for image in images.values()}
    if len(shapes) != 1 or not pixel_mm > 0:
        raise InputError(f"slices side by side are one or more of one size, got {sorted(shapes)}")
    low, high = _ends(ends)
    (shape,) = shapes
    columns = min(len(images), COLUMNS)
    rows = math.ceil(len(images) / columns)
    wide = min((WIDTH - GAP * (columns - 1)) / columns, WIDEST)
    tall = wide * shape[0] / shape[1]
    with styled():
        figure = canvas(height := TOP + rows * (tall + NAME) + BOTTOM)
        for place, (name, image) in enumerate(images.items()):
            row, column = divmod(place, columns)
            left, bottom = column * (wide + GAP), height - TOP - (row + 1) * (tall + NAME)
            axes = place_axes(figure, left, bottom, wide, tall)
            axes.imshow(drawable(image), cmap=colours, vmin=low, vmax=high, aspect="auto")
            axes.set_axis_off()
            place_text(figure, left, bottom + tall + 6, short(name), color=INK)
        _scale(figure, height, value, (low, high), colours)
        _bar(figure, wide / (shape[1] * pixel_mm), wide)
    return figure


def _scale(figure: Figure, height: float, value: str, ends: tuple[float, float], colours: str) -> None:
    axes = place_axes(figure, WIDTH - 220, height - 14, 205, 9)
    norm = Normalize(*ends)
    scale = figure.colorbar(ScalarMappable(norm, colours), cax=axes, orientation="horizontal")
    scale.set_ticks(MaxNLocator(4))
    scale.ax.xaxis.set_major_formatter(FuncFormatter(tick))
    scale.outline.set_edgecolor(RULE)  # type: ignore[operator]
    scale.solids.set_rasterized(True)  # type: ignore[union-attr]
    place_text(figure, WIDTH - 230, height - 13, value, color=MUTED, ha="right")


def _bar(figure: Figure, points_per_mm: float, wide: float) -> None:
    length = round_length(wide / points_per_mm / 3)
    end = length * points_per_mm
    place_line(figure, (0, end), (12, 12), color=INK, linewidth=3, solid_capstyle="butt")
    place_text(figure, end + 8, 8, f"{tick(length)} mm", color=INK)


def round_length(most: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten that is at most so long."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(power * factor for factor in (1, 2, 5) if power * factor <= most * (1 + 1e-9))


def profile(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    value: str,
    place: str,
    interval: str = "",
) -> Figure:
    """Draw values along a line through images, one curve an image, and around the first its interval.

    Raises: InputError without a curve, and for curves or ends of the interval of another length than x.
    """
    every = [*lines.values(), *(band or ())]
    if not lines or any(len(row) != len(x) for row in every):
        raise InputError(f"a profile needs one curve or more, each of {len(x)} values")
    with styled():
        colours = palette(lines)
        first = next(iter(colours.values()))
        entries = [
            (short(name), {"color": colours[name], "linestyle": dash(colours[name])}) for name in lines
        ]
        if band is not None:
            shade = {"color": first, "linewidth": 8, "alpha": SHADE, "solid_capstyle": "butt"}
            entries.insert(1, (interval, shade))
        legend = _wrapped(entries)
        figure = canvas(height := 300 + ROW * len(legend))
        axes = place_axes(figure, LEFT, UNDER, WIDTH - LEFT - 12, 300 - UNDER - 26)
        if band is not None:
            low, high = map(drawable, band)
            axes.fill_between(x, low, high, color=first, alpha=SHADE, linewidth=0)
        for order, (name, values) in enumerate(lines.items()):
            look = {"color": colours[name], "linestyle": dash(colours[name])}
            axes.plot(x, drawable(values), linewidth=1.4, zorder=3 - 0.1 * order, **look)
        scale_y(axes, limits(np.concatenate([drawable(row) for row in every])), False)
        scale_x(axes, limits(x, margin=0.0))
        for index, line in enumerate(legend):
            legend_row(figure, LEFT, height - 34 - ROW * index, line)
        place_text(figure, 0, height - 14, value, color=MUTED)
        axes.set_xlabel(place, color=MUTED, loc="right")
    return figure


def _wrapped(entries: Sequence[tuple[str, dict]]) -> list[list[tuple[str, dict]]]:
    """Part the entries of a legend into rows that fit."""
    rows: list[list[tuple[str, dict]]] = [[]]
    room = WIDTH - LEFT
    for name, look in entries:
        need = measure(name) + 44
        if rows[-1] and need > room:
            rows.append([])
            room = WIDTH - LEFT
        rows[-1].append((name, look))
        room -= need
    return rows


def _ends(ends: tuple[float, float]) -> tuple[float, float]:
    if not -math.inf < ends[0] < ends[1] < math.inf:
        raise InputError(f"a scale goes from a smaller to a larger number, not from {ends[0]} to {ends[1]}")
    return ends
