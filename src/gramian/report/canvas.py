"""Places on a figure in points, ranges and ticks of axes, and names moved apart."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from gramian.report.style import SIZE, tick

WIDTH = 500.0
STEPS = [1, 2, 2.5, 5, 10]


class LinearTicks(Formatter):
    """Numbers of one axis with equally many decimals."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Write one number alone."""
        return tick(x)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Write the numbers of an axis."""
        texts = [tick(value) for value in values]
        places = max((len(text.partition(".")[2]) for text in texts), default=0)
        if any("×" in text for text in texts):
            return texts
        return [f"{value:,.{places}f}".replace("-", "−") for value in values]


def short(text: str, limit: int = 28) -> str:
    """Make a name fit for a drawing: no control characters, cut at `limit`."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def measure(text: str) -> float:
    """Return the width of a text in DejaVu Sans, which is wider than most fonts of pages."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=SIZE), ismath=False)[0]


def drawable(values: Any, log: bool = False) -> np.ndarray:
    """Return values as float64, with NaN for all that cannot be drawn."""
    array = np.asarray(values, dtype=float)
    allowed = np.isfinite(array) & (np.abs(array) < 1e100)
    return np.where(allowed & (array > 1e-100) if log else allowed, array, np.nan)


def limits(values: Iterable[float], log: bool = False, margin: float = 0.05) -> tuple[float, float]:
    """Return the range of the finite values, a little wider; never empty."""
    finite = [math.log10(value) if log else value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.5 if log or abs(low) < 1e-90 else abs(low) / 2
        low, high = low - half, high + half
    low, high = low - margin * (high - low), high + margin * (high - low)
    return (10**low, 10**high) if log else (low, high)


def canvas(height: float) -> Figure:
    """Return an empty figure of the width of half a page."""
    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72)


def place_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes placed in points from the lower left corner."""
    full_width, full_height = figure.get_size_inches() * 72
    return figure.add_axes(
        (left / full_width, bottom / full_height, width / full_width, height / full_height)
    )


def place_text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write text placed in points from the lower left corner."""
    width, height = figure.get_size_inches() * 72
    figure.text(x / width, y / height, text, **style)


def place_line(figure: Figure, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
    """Draw a line through positions in points from the lower left corner."""
    width, height = figure.get_size_inches() * 72
    figure.add_artist(Line2D([x / width for x in xs], [y / height for y in ys], **style))


def scale_y(axes: Axes, limits: tuple[float, float], log: bool, ticks: int = 5) -> None:
    """Set limits, scale and ticks of the vertical axis."""
    decades = math.log10(limits[1] / limits[0]) if log else 0.0
    if log:
        axes.set_yscale("log")
    axes.set_ylim(*limits)
    many = LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0), numticks=ticks + 2)
    axes.yaxis.set_major_locator(many if decades > 1 else MaxNLocator(ticks, steps=STEPS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(tick) if log else LinearTicks())


def scale_x(axes: Axes, limits: tuple[float, float], ticks: int = 5, integer: bool = False) -> None:
    """Set limits and ticks of the horizontal axis."""
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=integer, steps=STEPS))
    axes.xaxis.set_major_formatter(LinearTicks())


def spread(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return heights in [low, high], ordered as the targets, at least `gap` apart and closest to them."""
    gap = min(gap, (high - low) / max(len(targets) - 1, 1))
    order = sorted(range(len(targets)), key=lambda index: targets[index])
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, count = targets[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    top = high - (len(targets) - 1) * gap
    heights = [min(max(mean, low), top) for mean, count in pools for _ in range(count)]
    return [heights[order.index(index)] + order.index(index) * gap for index in range(len(targets))]


def edges(centres: np.ndarray) -> np.ndarray:
    """Return borders of cells half-way between their centres."""
    if centres.size == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
