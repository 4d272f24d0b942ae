"""What the five-axes study tells its reader: a table on the terminal, a page, the Pareto figure."""

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

from rich.table import Table as TerminalTable

from gramian.report import Column, Page, Plot, Section, Table, number, save, write
from gramian.report.scatter import scatter
from gramian.tasks.five_axes import (
    BASE,
    LEAST_SPEED,
    MOST_INT8,
    MOST_KURTOSIS,
    MOST_PARAMETERS,
    Axes,
    Study,
)

HEADINGS: Mapping[str, tuple[str, str]] = {
    "loss": ("loss above pre_norm", "nats / token, ≤ 0"),
    "parameters": ("block parameters", f"× pre_norm, ≤ {MOST_PARAMETERS:g}"),
    "speed": ("training speed", f"× pre_norm, ≥ {LEAST_SPEED:g}"),
    "kurtosis": ("max neuron kurtosis", f"< {MOST_KURTOSIS:g}"),
    "int8": ("int8 gap", f"% of the loss, < {100 * MOST_INT8:g}"),
}
"""Heading of every axis with its unit and the bound that wins it."""


def _cells(each: Axes) -> dict[str, str]:
    """Write every axis of one trial, with a mark where it is won."""
    error = f" ± {each.loss_error:.3f}" if each.loss_error == each.loss_error else ""
    texts = {
        "loss": f"{each.loss_excess:+.3f}{error}",
        "parameters": f"{each.parameters:.3f}",
        "speed": f"{each.speed:.2f}",
        "kurtosis": f"{each.kurtosis:.2f}",
        "int8": f"{100 * each.int8:+.2f}",
    }
    met, numbers = each.met(), (each.loss_excess, each.parameters, each.speed, each.kurtosis, each.int8)
    return {
        axis: "–" if isnan(value) else f"{text} {'✓' if met[axis] else '·'}"
        for (axis, text), value in zip(texts.items(), numbers, strict=True)
    }


def terminal_table(study: Study) -> TerminalTable:
    """Return the trials as a table, best first."""
    table = TerminalTable(caption="✓ where an axis is won; kurtosis and int8 gap are the worst seed's")
    table.add_column("trial", overflow="fold", min_width=14)
    for heading, unit in HEADINGS.values():
        table.add_column(f"{heading} ({unit})", justify="right", overflow="fold")
    table.add_column("seeds", justify="right")
    for each in study.axes:
        style = "bold" if each.trial in study.winners else ""
        table.add_row(each.trial, *_cells(each).values(), str(each.seeds), style=style)
    return table


def lead(study: Study) -> str:
    """Say the outcome in plain words."""
    if study.winners:
        best = next(each for each in study.axes if each.trial in study.winners)
        return (
            f"{', '.join(study.winners)} won on all five axes with {best.seeds} seeds; {best.trial} ends "
            f"{number(abs(best.loss_excess))} nats {'below' if best.loss_excess < 0 else 'above'} {BASE}."
        )
    best = study.axes[0]
    lost = [HEADINGS[axis][0] for axis, won in best.met().items() if not won]
    missed = ", ".join(lost) or "seeds"
    return f"No trial won on all five axes with every seed; {best.trial} comes nearest and misses {missed}."


def write_report(study: Study) -> Path:
    """Write report.html and the Pareto figure into the study's folder; return the page's path."""
    figure = _pareto(study)
    save(figure.figure, study.folder / "figures" / "pareto.svg")
    columns = [
        Column("trial"),
        *(Column(heading, unit) for heading, unit in HEADINGS.values()),
        Column("seeds"),
    ]
    rows: list[list[Any]] = [[each.trial, *_cells(each).values(), each.seeds] for each in study.axes]
    notes = (
        "✓ marks an axis that is won, – what has no number: a trial that diverged with a seed, SOAP's speed.",
        "Trials are ordered by axes won, then by loss.",
        "The finalists ran with every seed, the others with the first; ± is the standard error over seeds of "
        "the difference to pre_norm.",
        "Speed is that of whole training steps of a larger model (see above), timed in turn with pre_norm's. "
        "That of SOAP is not measured: it works in bursts.",
        "Kurtosis is the largest of any layer, the last one's output included. It does not predict the int8 "
        "gap, which is therefore measured. Settings and readings of every run are in its own folder.",
    )
    page = Page(
        title=f"One block on five axes: {study.folder.name}",
        lead=lead(study),
        facts=study.facts,
        sections=(Section("Trials", "", (figure, Table(columns, rows, notes=notes))),),
    )
    path = study.folder / "report.html"
    write(page, path)
    return path


def _pareto(study: Study) -> Plot:
    points = {each.trial: (each.kurtosis, each.loss_excess) for each in study.axes}
    return Plot(
        scatter(
            points,
            x="max neuron kurtosis",
            y="loss above pre_norm (nats / token)",
            chosen=study.winners,
            log=True,
        ),
        "Loss against outliers; lower and further left is better, and the line joins the trials that no "
        "other beats on both. Full points win on all five axes.",
        "Every trial's loss above pre_norm against its largest neuron kurtosis.",
        "Pareto",
    )
