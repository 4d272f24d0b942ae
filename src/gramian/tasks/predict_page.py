"""What a prediction tells its reader: a table and a sentence, a report page, figures, numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from gramian.errors import InputError
from gramian.files import atomic_folder, write_json, write_text
from gramian.report import Column, Page, Plot, Section, Table, save, write
from gramian.report.overlay import Overlay, overlay
from gramian.tasks.predict import PredictConfig, Prediction
from gramian.tasks.verdict import COLLAPSED, FAR, Profile
from gramian.train.run import versions

PREDICTION = "prediction.json"
"""The file by which a folder is known as that of a prediction."""

MOMENT = "Mean square of the features. Level: signals survive. Straight and steep: a factor a layer."
GRADIENT = "Squared norm of the gradient at each layer over that at the last one."
CORRELATION = "Cosines of pairs of inputs, or of tokens. 1: the network cannot tell them apart any more."


UNFINISHED = "unfinished"
"""The folder, in that of the results, of what a command that can go on after a stop has found so far."""


def check_free(folder: Path, overwrite: bool, marker: str = PREDICTION, *, begun: bool = False) -> None:
    """Raise InputError unless results may go into a folder: a new or empty one, or one with the marker.

    With `begun` it may also hold the beginning of a result.
    """
    kind = Path(marker).stem
    if folder.is_dir() and (folder / marker).exists():
        if not overwrite:
            raise InputError(
                f"the folder {folder} already holds a {kind}; pass --overwrite to replace it, or another "
                "--output"
            )
    elif folder.exists() and not (folder.is_dir() and _names(folder) <= ({UNFINISHED} if begun else set())):
        raise InputError(f"{folder} holds something that is no {kind}; choose another --output")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def shown_layers(depth: int) -> list[int]:
    """Return 0, 1, 2, 4, 8, … and the last layer."""
    powers = [2**exponent for exponent in range(depth.bit_length())]
    return sorted({0, *powers, depth})


def terminal_table(prediction: Prediction) -> TerminalTable:
    """Return some layers, one a row: theory, and behind it the median network measured.

    Of several pairs the one that starts furthest apart is shown.
    """
    columns, correlations = _columns(prediction), prediction.theory.correlations
    furthest = min(correlations, key=lambda name: correlations[name][0])
    kept = {
        heading.replace(", ", "\n").replace(" ", "\n", 1): take
        for heading, take in columns.items()
        if not heading.startswith(PAIR) or heading == PAIR + furthest
    }
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("layer", justify="right")
    for heading in kept:
        table.add_column(heading, justify="right")
        if prediction.measured:
            table.add_column("measured", justify="right")
    for layer, *cells in _rows(prediction, kept.values()):
        table.add_row(str(layer), *(_cell(value) for value in cells))
    return table


PAIR = "correlation, "

Take = Callable[[Profile], Sequence[float]]


def _columns(prediction: Prediction) -> dict[str, Take]:
    """Return every curve's name and how to take it from a profile."""
    found: dict[str, Take] = {"second moment": lambda p: p.second_moment}
    for name in prediction.theory.correlations:
        found[PAIR + name] = lambda p, name=name: p.correlations[name]
    return found | {"squared gradient": lambda p: p.gradient}


def _rows(prediction: Prediction, curves: Iterable[Take]) -> list[list[Any]]:
    curves = list(curves)
    rows = []
    for layer in shown_layers(len(prediction.theory.second_moment) - 1):
        row: list[Any] = [layer]
        for take in curves:
            row.append(_chopped(take(prediction.theory)[layer]))
            if prediction.measured:
                row.append(median(take(each)[layer] for each in prediction.measured))
        rows.append(row)
    return rows


def _chopped(value: float) -> float:
    """Return 0 for what rounding leaves of a correlation of zero."""
    return 0.0 if abs(value) < 1e-12 else value


def _cell(value: float) -> str:
    return f"{value:.4g}"


def report_page(prediction: Prediction, facts: dict[str, str]) -> Page:
    """Compose the report of a prediction."""
    theory = prediction.theory
    layers = range(len(theory.second_moment))

    def drawn(take: Take) -> Overlay:
        return Overlay(layers, take(theory), [take(each) for each in prediction.measured])

    pairs = {name: drawn(lambda p, name=name: p.correlations[name]) for name in theory.correlations}
    plots = []
    for title, series, caption, log in (
        ("Second moment", {"limit": drawn(lambda p: p.second_moment)}, MOMENT, True),
        ("Correlation", pairs, CORRELATION, False),
        ("Gradient", {"limit": drawn(lambda p: p.gradient)}, GRADIENT, True),
    ):
        figure = overlay(series, x="layer", y=title.lower(), log=log)
        plots.append(Plot(figure, caption, f"{title} by layer, predicted and measured.", title))
    measured = "Lines: infinite width. Dots and bars: median and range of the networks measured."
    headings = [Column("layer")]
    for name in _columns(prediction):
        headings += [Column(name), Column("measured")] if prediction.measured else [Column(name)]
    rows = [[str(layer), *cells] for layer, *cells in _rows(prediction, _columns(prediction).values())]
    notes = (
        f"Exploding or vanishing: beyond a factor {FAR:g}. Collapsed: correlations from {COLLAPSED} on.",
    )
    return Page(
        title=f"Before training: {prediction.title}",
        lead=" ".join(sentences(prediction)),
        facts=facts,
        sections=(
            Section("Through depth", measured if prediction.measured else "", plots),
            Section("Numbers", "", (Table(headings, rows, notes=notes),)),
        ),
    )


def sentences(prediction: Prediction) -> list[str]:
    """Return the verdict, and the advice where there is one."""
    return [each for each in (prediction.verdict.sentence, prediction.advice) if each]


def write_report(prediction: Prediction, config: PredictConfig, *, overwrite: bool = False) -> Path:
    """Write prediction.json, report.html and the figures into a folder; return the page's path.

    The folder is there whole or not at all.

    Raises: InputError when the folder is taken.
    """
    folder = config.folder
    check_free(folder, overwrite)
    settings = {name: str(value) for name, value in asdict(config).items() if value is not None}
    facts = {
        "network": _described(config),
        "measured": f"{config.networks} networks, float64" if config.networks else "nothing: theory alone",
        "software": ", ".join(f"{name} {versions()[name]}" for name in ("gramian", "torch")),
    }
    page = report_page(prediction, facts)
    write_folder(folder, {"settings": settings, **plain(asdict(prediction))}, page)
    return folder / "report.html"


def write_folder(
    folder: Path,
    numbers: dict[str, Any],
    page: Page,
    marker: str = PREDICTION,
    texts: Mapping[str, str] = MappingProxyType({}),
    binaries: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Replace a folder by one with numbers as JSON, other files, report.html and the figures as .svg."""
    with atomic_folder(folder, replace=True) as temporary:
        write_json(temporary / marker, numbers)
        for name, text in texts.items():
            write_text(temporary / name, text)
        for name, content in binaries.items():
            (temporary / name).write_bytes(content)
        for section in page.sections:
            for block in section.blocks:
                if isinstance(block, Plot):
                    save(block.figure, temporary / "figures" / f"{block.title.lower().replace(' ', '_')}.svg")
        write(page, temporary / "report.html")


def _described(config: PredictConfig) -> str:
    """Say how the network is built, by the settings that it takes."""
    names = ["depth", "width", "activation", "norm"]
    if config.transformer:
        names += ["tokens", "heads"]
    else:
        names += ["shaping", "bias_std"] + ["weight_std"] * (config.weight_std is not None)
        names += ["gains"] * ("residual" in config.name)
    return ", ".join([config.name, *(f"{name} {getattr(config, name)}" for name in names)])


def plain(value: Any) -> Any:
    """Return what JSON holds; what is not finite is null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
