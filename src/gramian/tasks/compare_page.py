"""What a comparison tells its reader: a table on the terminal, a report page, figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as TerminalTable

from gramian.report import (
    Column,
    Page,
    Plot,
    Section,
    Table,
    curves,
    dumbbells,
    final_profile,
    gains,
    palette,
    profiles_over_time,
    save,
    write,
)
from gramian.tasks.compare import Comparison
from gramian.tasks.examine import BlockResult

Points = tuple[Sequence[float], Sequence[float]]

COLUMNS: tuple[tuple[Column, Callable[[BlockResult], Any]], ...] = (
    (Column("block"), lambda result: result.block),
    (Column("block parameters", "", ratio=True), lambda result: result.block_parameters),
    (
        Column("training speed", "tokens / s", better="high", ratio=True),
        lambda result: round(result.tokens_per_second),
    ),
    (
        Column("validation loss", "nats / token", better="low"),
        lambda result: round(result.validation_loss, 4),
    ),
    (Column("validation loss", "bits / byte", better="low"), lambda result: round(result.bits_per_byte, 4)),
    (Column("max neuron kurtosis", better="low"), lambda result: result.max_neuron_kurtosis),
    (Column("max / median", better="low"), lambda result: result.max_median_ratio),
    (Column("int8 loss", "nats / token", better="low"), lambda result: round(result.int8_loss, 4)),
    (Column("int8 gap", "nats / token", better="low"), lambda result: round(result.int8_gap, 5)),
)
"""Heading and value of every column, in order."""


def terminal_table(comparison: Comparison) -> TerminalTable:
    """Return the results as a table for the terminal, one column a block; ratios are to the first block."""
    table = TerminalTable(caption=f"unigram entropy {comparison.unigram_entropy:.3f} nats/token")
    table.add_column("", overflow="fold")
    for result in comparison.results:
        table.add_column(result.block, justify="right", overflow="fold")
    first = comparison.results[0]
    for column, value in COLUMNS[1:]:
        unit = f" ({column.unit})" if column.unit else ""
        cells = [value(result) for result in comparison.results]
        table.add_row(column.heading + unit, *(f"{c:,}" if isinstance(c, int) else f"{c:.4g}" for c in cells))
        if column.ratio:
            table.add_row("  × the first", *(f"{cell / value(first):.2f}" for cell in cells), style="dim")
    return table


def write_report(comparison: Comparison) -> Path:
    """Write report.html and the figures as SVG into the comparison's folder; return the page's path."""
    page = report_page(comparison)
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                name = block.title.lower().replace(" ", "_")
                save(block.figure, comparison.folder / "figures" / f"{name}.svg")
    path = comparison.folder / "report.html"
    write(page, path)
    return path


def report_page(comparison: Comparison) -> Page:
    """Compose the report of a comparison."""
    colours = palette([result.block for result in comparison.results])
    return Page(
        title=f"Transformer blocks compared: {comparison.folder.name}",
        lead=_lead(comparison),
        facts=comparison.facts,
        sections=(
            _results(comparison, colours),
            _learning(comparison, colours),
            _outliers(comparison, colours),
            _tokens(comparison, colours),
            *_gains(comparison, colours),
            _int8(comparison, colours),
        ),
    )


def _lead(comparison: Comparison) -> str:
    """Say the outcome in plain words, from the numbers alone."""
    first, *others = comparison.results
    sentences = [
        f"{first.block} ends at {first.validation_loss:.3f} nats a token "
        f"(a model that uses no context: {comparison.unigram_entropy:.3f})."
    ]
    for result in others:
        difference = result.validation_loss - first.validation_loss
        where = f"{abs(difference):.3f} nats {'above' if difference > 0 else 'below'} it"
        sentences.append(
            f"{result.block} ends {where}, with {result.block_parameters / first.block_parameters:.2f} × "
            f"its block parameters and {result.tokens_per_second / first.tokens_per_second:.2f} × its speed."
        )
    calm = min(comparison.results, key=lambda result: result.max_neuron_kurtosis)
    sound = min(comparison.results, key=lambda result: result.int8_gap)
    sentences.append(
        f"{calm.block} has the mildest outlier neurons (kurtosis {calm.max_neuron_kurtosis:.2f}); "
        f"{sound.block} loses least in int8 ({sound.int8_gap:+.5f} nats)."
    )
    return " ".join(sentences)


def _results(comparison: Comparison, colours: Mapping[str, str]) -> Section:
    table = Table(
        columns=[column for column, _ in COLUMNS],
        rows=[[value(result) for _, value in COLUMNS] for result in comparison.results],
        notes=(
            "Small figures are ratios to the first block. Block parameters leave embeddings and head out.",
            "Speed is the median over groups of training steps taken in turn with the other blocks.",
            "Kurtosis and max / median ratio are the largest over the layers, on validation text. Neuron "
            "kurtosis is 1 when all neurons carry equal mean squares, and the width when one carries all.",
            "int8 is the published static W8A8: weights and all activations (linear layers, norms, attention "
            "scores and probabilities, residual sums), one scale a tensor, simulated; the head stays exact.",
            "One seed a block: differences in loss of a few hundredths of a nat can be noise.",
        ),
        colours=colours,
    )
    return Section("Results", "", (table,))


def _learning(comparison: Comparison, colours: Mapping[str, str]) -> Section:
    by_step = {name: _evaluations(rows, "step") for name, rows in comparison.records.items()}
    by_time = {name: _evaluations(rows, "seconds") for name, rows in comparison.records.items()}
    return Section(
        "Learning",
        "All blocks see the same batches in the same order.",
        (
            Plot(
                curves(
                    by_step,
                    x="step",
                    y="validation loss (nats / token)",
                    colours=colours,
                    references={"unigram entropy": comparison.unigram_entropy},
                ),
                "Validation loss after so many steps; lower is better. The dotted line is what token "
                "frequencies alone give: only below it has a model learnt from context.",
                "Validation loss of every block against the training step.",
                "Loss by step",
            ),
            Plot(
                curves(by_time, x="training time (s)", y="validation loss (nats / token)", colours=colours),
                "The same losses against time spent training, evaluation left out: at equal height, further "
                "left is faster.",
                "Validation loss of every block against training time.",
                "Loss by time",
            ),
        ),
    )


def _outliers(comparison: Comparison, colours: Mapping[str, str]) -> Section:
    final = {result.block: _layers(result.readings, "neuron_kurtosis") for result in comparison.results}
    return Section(
        "Outlier neurons",
        "Neurons whose activations dwarf the others' waste the range of low-precision numbers.",
        (
            Plot(
                profiles_over_time(
                    {name: _profiles(rows, "neuron_kurtosis") for name, rows in comparison.records.items()},
                    reading="neuron kurtosis",
                    colours=colours,
                    log=True,
                ),
                "Kurtosis of the neurons' mean squares in the residual stream entering each layer (the last "
                "row leaves the last layer). 1 is even; larger means that fewer neurons carry more.",
                "Neuron kurtosis by layer and step, one panel a block.",
                "Kurtosis by layer and step",
            ),
            Plot(
                final_profile(
                    final, y="neuron kurtosis", colours=colours, references={"all neurons equal": 1.0}
                ),
                "The same reading at the end, on validation text.",
                "Final neuron kurtosis by layer, one line a block.",
                "Final kurtosis by layer",
            ),
        ),
    )


def _tokens(comparison: Comparison, colours: Mapping[str, str]) -> Section:
    correlation, entropy = (
        {result.block: _layers(result.readings, reading) for result in comparison.results}
        for reading in ("token_correlation_mean", "attention_entropy")
    )
    return Section(
        "Tokens and attention",
        "When all tokens point the same way, the rest of the network cannot tell them apart.",
        (
            Plot(
                final_profile(correlation, y="mean token correlation", colours=colours),
                "Mean inner product of two different tokens in the stream entering each layer, over the mean "
                "squared length, at the end. 0: unrelated; 1: collapsed onto one direction.",
                "Final mean token correlation by layer, one line a block.",
                "Token correlation by layer",
            ),
            Plot(
                final_profile(entropy, y="attention entropy (nats)", colours=colours),
                "Mean entropy of the softmax over keys at the end, before any shaping gain. 0: each query "
                "looks at one token; higher: it averages many.",
                "Final attention entropy by layer, one line a block.",
                "Attention entropy by layer",
            ),
        ),
    )


def _gains(comparison: Comparison, colours: Mapping[str, str]) -> tuple[Section, ...]:
    """Return the section on trainable gains, or none when no block has any."""
    series = {name: _gain_curves(rows) for name, rows in comparison.records.items()}
    series = {name: named for name, named in series.items() if named}
    if not series:
        return ()
    figure = gains(series, y="gain, mean over layers", colours=colours)
    caption = (
        "Trainable gains, averaged over layers and heads. Identity, softmax and centring weigh the three "
        "terms of shaped attention, which starts as the identity; centring takes away what uniform attention "
        "would add. Sink is the logit of a sink beside the keys, gate opening the mean σ of its bias."
    )
    alt = "Trainable gains against the training step, one panel a block."
    return (Section("Gains", "", (Plot(figure, caption, alt, "Gains"),)),)


def _int8(comparison: Comparison, colours: Mapping[str, str]) -> Section:
    pairs = {result.block: (result.validation_loss, result.int8_loss) for result in comparison.results}
    figure = dumbbells(
        pairs, value="validation loss (nats / token)", before="float", after="int8", colours=colours
    )
    caption = (
        "Validation loss before and after the linear layers compute with 8-bit integers. A short distance "
        "means that the model can be shipped in int8 as it is. Kurtosis alone does not predict this distance."
    )
    alt = "Validation loss in float and int8, one line a block."
    return Section("Eight-bit integers", "", (Plot(figure, caption, alt, "Loss in int8"),))


def _evaluations(rows: Sequence[Mapping[str, Any]], x: str) -> Points:
    seen = [row for row in rows if row["kind"] == "evaluate"]
    return [row[x] for row in seen], [row["validation_loss"] for row in seen]


def _layers(sites: Mapping[str, Mapping[str, float]], reading: str) -> list[float]:
    return [values[reading] for values in sites.values() if reading in values]


def _profiles(rows: Sequence[Mapping[str, Any]], reading: str) -> tuple[list[float], list[list[float]]]:
    seen = [row for row in rows if row["kind"] == "observe"]
    return [row["step"] for row in seen], [_layers(row["sites"], reading) for row in seen]


def _gain_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Return each gain's mean over the layers that have it, by step."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["kind"] != "evaluate":
            continue
        for name in dict.fromkeys(name for layer in row["gains"] for name in layer):
            values = [layer[name] for layer in row["gains"] if name in layer]
            steps, means = found.setdefault(name, ([], []))
            steps.append(row["step"])
            means.append(sum(values) / len(values))
    return dict(found)
