"""One self-contained HTML page: no script, no network, light and dark, equal bytes for equal content."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from gramian.errors import InputError
from gramian.files import write_text
from gramian.report.style import THEME, css, inline, number

Cell = str | float | None


@dataclass(frozen=True)
class Plot:
    """A figure with the caption that says what is shown, in what unit and how to read it."""

    figure: Figure
    caption: str
    alt: str
    title: str = ""

    def __post_init__(self) -> None:
        if not self.caption.strip() or not self.alt.strip():
            raise InputError("A plot needs a caption and an alternative text, and one of them is empty.")


@dataclass(frozen=True)
class Column:
    """A column: its unit is in the heading, `better` marks the best value, `ratio` compares with row one."""

    heading: str
    unit: str = ""
    better: Literal["low", "high"] | None = None
    ratio: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each naming its series; None shows a dash; `colours` as from `palette`."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    notes: Sequence[str] = ()
    colours: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise InputError(f"A table of {len(self.columns)} columns got a row of {len(wrong[0])} cells.")


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs parted by empty lines, then plots and tables."""

    heading: str
    text: str = ""
    blocks: Sequence[Plot | Table] = ()


@dataclass(frozen=True)
class Page:
    """The whole report: title, a paragraph that says the result, facts of the run, sections."""

    title: str
    lead: str
    facts: Mapping[str, str]
    sections: Sequence[Section]


@dataclass(frozen=True)
class _Shown:
    """A cell as the page shows it."""

    text: str
    numeric: bool
    ratio: str
    best: bool


def _column(column: Column, cells: Sequence[Cell]) -> list[_Shown]:
    """Return a column's cells; the best is marked only where at least two differ."""
    finite = [cell for cell in cells if isinstance(cell, int | float) and math.isfinite(cell)]
    best = None
    if column.better and len(set(finite)) > 1:
        best = min(finite) if column.better == "low" else max(finite)
    first = cells[0] if cells else None
    shown = []
    for index, cell in enumerate(cells):
        ratio = ""
        if column.ratio and isinstance(cell, int | float) and isinstance(first, int | float) and first:
            quotient = cell / first
            ratio = "" if index == 0 or not math.isfinite(quotient) else f"{number(float(quotient), 3)}×"
        text = "–" if cell is None else cell if isinstance(cell, str) else number(cell)
        shown.append(_Shown(text, not isinstance(cell, str), ratio, best is not None and cell == best))
    return shown


def _rows(table: Table) -> list[tuple[_Shown, ...]]:
    cells = [[row[index] for row in table.rows] for index in range(len(table.columns))]
    return list(zip(*map(_column, table.columns, cells), strict=True))


def _groups(blocks: Sequence[Plot | Table]) -> list[list[Plot] | Table]:
    """Neighbouring plots two by two, tables alone."""
    groups: list[list[Plot] | Table] = []
    for block in blocks:
        if isinstance(block, Table):
            groups.append(block)
        elif groups and isinstance(groups[-1], list) and len(groups[-1]) == 1:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def render(page: Page) -> str:
    """Return the page as HTML; every string of the content is escaped."""
    source = files("gramian.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(source.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    plots = [block for section in page.sections for block in section.blocks if isinstance(block, Plot)]
    pictures = {
        id(plot): (
            index,
            Markup(inline(plot.figure, f"f{index}", plot.alt)),
        )  # serialised from a tree: escaped
        for index, plot in enumerate(plots, 1)
    }
    text = template.render(
        page=page,
        style=Markup(source.joinpath("page.css").read_text(encoding="utf-8")),
        theme=THEME,
        pictures=pictures,
        groups=_groups,
        rows=_rows,
        css=css,
        paragraphs=lambda text: [part.strip() for part in text.split("\n\n") if part.strip()],
        is_table=lambda block: isinstance(block, Table),
        key=id,
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # paths may hold bytes that are no UTF-8


def write(page: Page, path: Path) -> None:
    """Render the page and replace the content of `path` by it, atomically."""
    write_text(path, render(page))
