"""What a quantisation tells its reader: two tables and plain sentences, a report page, figures, numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from gramian.files import atomic_folder, write_json
from gramian.report import Column, Page, Plot, Section, Table, dumbbells, final_profile, number, save, write
from gramian.tasks.quantise import LayerResult, Quantisation, SchemeResult

REPORT, NUMBERS = "report.html", "quantisation.json"

CAUTION = (
    "Kurtosis alone does not predict what quantisation costs: between models trained by different optimisers "
    "the order can be the reverse. Look at both."
)
SIMULATION = (
    "Simulated schemes compute in floating point on the values that the smaller numbers have: their loss is "
    "real, size and speed are not measured. Speed is that of a forward pass of this machine, not compiled."
)


def schemes_table(found: Quantisation) -> TerminalTable:
    """Return one row a scheme."""
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("scheme", overflow="fold")
    for heading in ("loss", "Δ loss", "Δ %", "perplexity", "MB", "speed ×"):
        table.add_column(heading, justify="right", overflow="fold")
    for result in found.results:
        added, share = found.added(result), _share(found, result)
        table.add_row(
            result.title,
            _fixed(result.loss, ".4f"),
            _fixed(added, "+.5f") if result.scheme != "exact" else "",
            _fixed(share, "+.2f") if result.scheme != "exact" else "",
            _cell(_perplexity(result.loss)),
            _cell(_megabytes(result)),
            _fixed(result.speed, ".2f"),
        )
    return table


def layers_table(found: Quantisation) -> TerminalTable:
    """Return one row a layer: what it adds to the loss, beside its outliers."""
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("quantised alone", overflow="fold")
    for heading in ("Δ loss", "neuron kurtosis", "max / median"):
        table.add_column(heading, justify="right", overflow="fold")
    for layer in found.layers:
        table.add_row(
            layer.layer,
            _fixed(layer.added_loss, "+.5f"),
            _cell(layer.neuron_kurtosis),
            _cell(layer.max_median_ratio),
        )
    return table


def sentences(found: Quantisation) -> list[str]:
    """Say the outcome in plain words, from the numbers alone."""
    said = [f"{name}: {fact}" for name, fact in found.facts.items()]
    said += [f"{result.title}: {result.note}" for result in found.results if result.note]
    if worst := _worst(found.layers):
        said.append(
            f"quantised alone, {worst.layer} adds most: {worst.added_loss:+.5f} nats; the largest neuron "
            f"kurtosis is {_cell(_largest_kurtosis(found.layers))}"
        )
    return [*said, CAUTION]


def write_report(found: Quantisation, folder: Path) -> Path:
    """Write numbers, page and figures into a new folder, which appears whole or not at all."""
    page = report_page(found)
    with atomic_folder(folder) as temporary:
        write_json(temporary / NUMBERS, asdict(found))
        for section in page.sections:
            for block in section.blocks:
                if isinstance(block, Plot):
                    name = block.title.lower().replace(" ", "_")
                    save(block.figure, temporary / "figures" / f"{name}.svg")
        write(page, temporary / REPORT)
    return folder / REPORT


def report_page(found: Quantisation) -> Page:
    """Compose the report."""
    used = ", ".join(
        f"{name} {found.versions[name]}"
        for name in ("gramian", "torch", "torchao", "python")
        if name in found.versions
    )
    return Page(
        title=f"{found.name} in smaller numbers",
        lead=_lead(found),
        facts={**found.facts, "versions": used},
        sections=(_schemes(found), *([_layers(found)] if found.layers else [])),
    )


def _lead(found: Quantisation) -> str:
    token = "token" if found.causal else "hidden token"
    said = [f"The exact model predicts this text at {found.exact:.4f} nats a {token}."]
    for result in found.results[1:]:
        added = found.added(result)
        if added is not None:
            said.append(f"{result.title}: {added:+.5f} nats ({_fixed(_share(found, result), '+.2f')} %).")
    if found.layers:
        said.append(f"The largest neuron kurtosis is {_cell(_largest_kurtosis(found.layers))}.")
    return " ".join([*said, CAUTION])


def _schemes(found: Quantisation) -> Section:
    token = "nats / token" if found.causal else "nats / hidden token"
    table = Table(
        columns=[
            Column("scheme"),
            Column("loss", token),
            Column("Δ loss", token, better="low"),
            Column("Δ", "%", better="low"),
            Column("perplexity"),
            Column("size", "MB", better="low"),
            Column("speed", "× exact", better="high"),
        ],
        rows=[
            [
                result.title,
                result.loss,
                found.added(result) if result.scheme != "exact" else None,
                _share(found, result) if result.scheme != "exact" else None,
                _perplexity(result.loss),
                _megabytes(result),
                result.speed,
            ]
            for result in found.results
        ],
        notes=(SIMULATION, *(f"{result.title}: {result.note}." for result in found.results if result.note)),
    )
    pairs = {
        result.title: (found.exact, result.loss)
        for result in found.results[1:]
        if result.loss is not None and math.isfinite(result.loss)
    }
    if not pairs:
        return Section("Schemes", "", (table,))
    plot = Plot(
        dumbbells(pairs, value=f"loss ({token})", before="exact", after="quantised"),
        "Loss of the exact model (ring) and in each scheme (dot). A short distance means that the model can "
        "be shipped so.",
        "Loss before and after quantisation, one line a scheme.",
        "Loss by scheme",
    )
    return Section("Schemes", "", (table, plot))


def _layers(found: Quantisation) -> Section:
    inside = [layer for layer in found.layers if layer.neuron_kurtosis is not None]
    kurtoses = [layer.neuron_kurtosis or math.nan for layer in inside]
    table = Table(
        columns=[
            Column("quantised alone"),
            Column("Δ loss", "nats / token", better="low"),
            Column("neuron kurtosis"),
            Column("max / median"),
        ],
        rows=[
            [layer.layer, layer.added_loss, layer.neuron_kurtosis, layer.max_median_ratio]
            for layer in found.layers
        ],
        notes=(
            "Only this layer is quantised, by the complete static recipe; the shares need not add up to the "
            "whole.",
            "Kurtosis and max / median are those of the residual stream entering the layer, over all tokens.",
        ),
    )
    plots = (
        Plot(
            final_profile({"static W8A8": [layer.added_loss for layer in inside]}, y="Δ loss (nats / token)"),
            "Loss that one layer alone adds when it is quantised by the complete static recipe.",
            "Added loss by layer.",
            "Added loss by layer",
        ),
        Plot(
            final_profile(
                {"stream entering": kurtoses}, y="neuron kurtosis", references={"all equal": 1.0}, log=True
            ),
            "Kurtosis of the neurons' mean squares in the stream entering each layer. 1: all neurons carry "
            "the same; the width: one carries all.",
            "Neuron kurtosis by layer.",
            "Kurtosis by layer",
        ),
    )
    return Section("Layer by layer", CAUTION, (*plots, table))


def _worst(layers: Sequence[LayerResult]) -> LayerResult | None:
    return max(layers, key=lambda layer: layer.added_loss, default=None)


def _largest_kurtosis(layers: Sequence[LayerResult]) -> float | None:
    return max((layer.neuron_kurtosis for layer in layers if layer.neuron_kurtosis is not None), default=None)


def _share(found: Quantisation, result: SchemeResult) -> float | None:
    added = found.added(result)
    return None if added is None or not found.exact else 100 * added / found.exact


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


def _megabytes(result: SchemeResult) -> float | None:
    return None if result.size is None else result.size / 1e6


def _fixed(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _cell(value: float | None) -> str:
    return "–" if value is None else number(value)
