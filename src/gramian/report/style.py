"""The look of figures and page: colours in light and dark, numbers for reading, writing and inlining."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.figure import Figure

from gramian.errors import InputError
from gramian.files import atomic_file

SERIES = (  # (light, dark): six that colour-blind readers tell apart, then six more, drawn dashed
    ("#3049a5", "#5e69b8"),
    ("#b14813", "#f5b061"),
    ("#04a496", "#88d6db"),
    ("#7f3b57", "#bf8687"),
    ("#c18719", "#8d6a00"),
    ("#6171c5", "#859df0"),
    ("#d96973", "#ae545e"),
    ("#3d814a", "#b4f2a3"),
    ("#41365e", "#ab71c0"),
    ("#38687a", "#20868c"),
    ("#335120", "#86aa4b"),
    ("#b97cc7", "#db9ad2"),
)
THEME = {
    "paper": ("#fefefd", "#14161a"),
    "ink": ("#1c2026", "#e9e8e4"),
    "muted": ("#5d6570", "#a0a7b1"),
    "rule": ("#dcdfe3", "#343a43"),
    **{f"series-{index}": pair for index, pair in enumerate(SERIES)},
}
PAPER, INK, MUTED, RULE = (THEME[name][0] for name in ("paper", "ink", "muted", "rule"))
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in THEME.items()}
DASHES = ("-", (0, (4, 2)), (0, (1, 1.4)), (0, (7, 2, 1, 2)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
SIZE = 12.0
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": SIZE,
    "text.parse_math": False,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": SIZE - 1,
    "ytick.labelsize": SIZE - 1,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.dpi": 72,
    "svg.fonttype": "none",
}


@contextmanager
def styled(salt: str = "gramian") -> Iterator[None]:
    """Draw with these settings, whatever the user's are; glyphs missing in DejaVu are left to the page."""
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE, {"svg.hashsalt": salt}]):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def number(value: float, digits: int = 4) -> str:
    """Write a number for reading: integers in full, others to `digits` significant figures (3 below 1)."""
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, Integral) or value == 0:
        return f"{int(value):,}".replace("-", "−")
    digits = min(digits, 3) if abs(value) < 1 else digits
    magnitude = int(f"{value:.{digits - 1}e}".split("e")[1])
    if -4 <= magnitude < 6:
        return f"{value:,.{max(digits - 1 - magnitude, 0)}f}".replace("-", "−")
    power = str(magnitude).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.2e}".split("e")[0].replace("-", "−") + "×10" + power


def tick(value: float, _: Any = None) -> str:
    """Write a number on an axis: as `number`, without trailing zeros."""
    if abs(value) < 1e7 and value == int(value):
        return number(int(value))
    text = number(value)
    return re.sub(r"\.?0+(?=$|×)", "", text) if "." in text else text


def palette(names: Iterable[str]) -> dict[str, str]:
    """Give each name a colour, by order: six that colour-blind readers tell apart, then six drawn dashed.

    After twelve the colours repeat; labels stand beside every line, so no figure rests on colour alone.
    """
    return {name: SERIES[index % len(SERIES)][0] for index, name in enumerate(dict.fromkeys(names))}


def css(colour: str) -> str:
    """Return the page's variable for a colour of the theme, which differs in light and dark."""
    return _VARIABLES.get(colour, colour)


def dash(colour: str) -> Any:
    """Return the dashes of a colour: none for the first six, some for the others."""
    return DASHES[0] if colour in [light for light, _ in SERIES[:6]] else DASHES[1]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as .png or .svg, in the light colours on paper; the same figure gives the same bytes.

    Raises: InputError for another suffix.
    """
    if (kind := Path(path).suffix) not in (".png", ".svg"):
        raise InputError(f"A figure is written as .png or .svg, and {Path(path).name!r} has another suffix.")
    metadata = {"Software": None} if kind == ".png" else {"Date": None, "Creator": None}
    with styled(), atomic_file(path) as temporary:
        tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.15}
        figure.savefig(temporary, format=kind[1:], dpi=200, facecolor=PAPER, metadata=metadata, **tight)


def inline(figure: Figure, key: str, alt: str) -> str:
    """Turn a figure into an `<svg>` element for an HTML page, described by `alt`.

    Ids begin with `key`, so that figures on one page do not meet; colours of the theme become the page's
    variables, and text takes the page's font.
    """
    buffer = io.StringIO()
    with styled(key):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", dpi=200, facecolor="none", metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                value = f"{key}-{value}"
            elif name == "href" and value.startswith("#"):
                value = f"#{key}-{value[1:]}"
            elif name == "style":
                value = re.sub(r"#[0-9a-f]{6}", lambda match: css(match[0]), value)
                value = re.sub(r"font-family: [^;]*;?", "", value)
            element.set(name, value.replace("url(#", f"url(#{key}-"))
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": alt})
    return ElementTree.tostring(root, encoding="unicode")
