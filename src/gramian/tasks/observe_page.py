"""What an observation tells its reader: a table and plain sentences, a report page, figures, numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable
from rich.text import Text

from gramian.files import atomic_folder, write_json
from gramian.report import Column, Page, Plot, Section, Table, final_profile, number, palette, save, write
from gramian.tasks.observe import READINGS, Layer, Observation, check_free

OUTLIER = 9.0
"""Share from which a neuron is called an outlier: its RMS is three times that of the layer."""

FALL = 2.0
"""Ratio from which the first tokens are said to carry the outliers."""

COLLAPSED = 0.9
"""Mean token correlation from which the tokens are said to have collapsed."""

EXACT = 1e-6
"""Error of the trace identity above which the readings are not to be trusted."""

KURTOSES = ("neuron_kurtosis", "elementwise_kurtosis", "token_excess_kurtosis")
"""Readings that are shown with and without the first token of each sequence."""

HEADINGS = {
    "neuron_kurtosis": "neuron\nkurtosis",
    "elementwise_kurtosis": "element-\nwise\nkurtosis",
    "token_excess_kurtosis": "token\nexcess\nkurtosis",
    "max_median_ratio": "max /\nmedian",
    "max_abs": "max |x|",
    "token_correlation_mean": "token\ncorre-\nlation",
    "effective_rank": "effec-\ntive\nrank",
    "attention_entropy": "atten-\ntion\nentropy",
    "sink_rate": "sink\nrate",
}
"""Readings of the terminal's table, in order."""

MEANINGS = {
    "neuron_kurtosis": (
        "Kurtosis of the neurons' mean squares. 1: all neurons carry the same; the width: one carries all."
    ),
    "elementwise_kurtosis": "Pearson kurtosis of all entries as one sample. 3 for Gaussian entries.",
    "token_excess_kurtosis": (
        "Kurtosis less 3 of each token over its width, negative values as 0, averaged. Near 0 for Gaussian "
        "entries."
    ),
    "max_median_ratio": "Largest over median magnitude of a token, averaged. About 5 for Gaussian entries.",
    "max_abs": "Largest magnitude of any entry.",
    "token_correlation_mean": (
        "Mean inner product of two tokens over the mean squared length. 0: unrelated; 1: all are one."
    ),
    "effective_rank": "Number of directions that the tokens use, by entropy.",
    "attention_entropy": "Mean entropy over the keys, in nats. 0: each query looks at one token.",
    "sink_rate": "Share of the heads that give the first token more than 0.3 of their attention.",
}
"""How to read each figure."""


LOGARITHMIC = {"neuron_kurtosis", "elementwise_kurtosis", "max_median_ratio", "max_abs"}
"""Readings that outliers raise by orders of magnitude."""


def terminal_table(observation: Observation) -> TerminalTable:
    """Return one row a layer; below each kurtosis stands that without the first token of each sequence."""
    table = TerminalTable(box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.caption = "below each kurtosis: without the first token of each sequence"
    numbered = [layer.site for layer in observation.layers if layer.label.isdigit()]
    if numbered:
        table.caption += f"\nlayer 1: {numbered[0]} … layer {len(numbered)}: {numbered[-1]}"
    table.add_column("layer", overflow="fold")
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right", overflow="fold")
    for layer in observation.layers:
        cells = []
        for name in HEADINGS:
            cell = Text(_cell(layer.readings.get(name)))
            if name in KURTOSES:
                cell.append(f"\n{_cell(layer.without_first.get(name))}", "dim")
            cells.append(cell)
        table.add_row(layer.label, *cells)
    return table


def sentences(observation: Observation) -> list[str]:
    """Say in plain words what was seen, from the numbers alone."""
    streams = [layer for layer in observation.layers if layer.trace_error is not None]
    said = []
    if streams:
        said += [_largest(streams), _outliers(streams), _first_token(streams), _tokens(streams)]
    said += [_attention(observation.layers), _check(streams)]
    return [sentence for sentence in said if sentence]


def _name(layer: Layer) -> str:
    return f"layer {layer.label} ({layer.site})" if layer.label.isdigit() else layer.site


def _largest(layers: Sequence[Layer]) -> str:
    peaks = [layer for layer in layers if layer.peak is not None]
    if not peaks:
        return ""
    layer = max(peaks, key=_height)
    peak = layer.peak
    assert peak is not None
    where = f"at neuron {peak.neuron} of {_name(layer)}, token {layer.token!r}"
    where += f" after {layer.before!r}" if layer.before else ""
    where += f" (position {peak.position} of sequence {peak.sequence}, counted from 0)"
    if not math.isfinite(peak.value):
        return f"A value is not finite: {where}."
    times = abs(peak.value) / layer.readings["rms"]
    return f"The largest value is {_cell(peak.value)}, {_cell(times)} times the layer's RMS, {where}."


def _height(layer: Layer) -> float:
    assert layer.peak is not None
    return abs(layer.peak.value) if math.isfinite(layer.peak.value) else math.inf


def _outliers(layers: Sequence[Layer]) -> str:
    loudest = max(layers, key=lambda layer: _finite(layer.neurons[0][1]))
    neuron, share = loudest.neurons[0]
    if not math.isfinite(share):
        return ""
    times = f"{_cell(share)} times the mean square of the neurons"
    if share < OUTLIER:
        return f"No neuron is an outlier: the loudest, {neuron} of {_name(loudest)}, has {times}."
    leads = [layer for layer in layers if layer.neurons[0][0] == neuron and layer.neurons[0][1] >= OUTLIER]
    return (
        f"Neuron {neuron} is an outlier, first at {_name(leads[0])} and in {len(leads)} of {len(layers)} "
        f"streams, with up to {times}."
    )


def _first_token(layers: Sequence[Layer]) -> str:
    pairs = [
        (layer.readings["neuron_kurtosis"], layer.without_first["neuron_kurtosis"])
        for layer in layers
        if layer.without_first
    ]
    before, after = (max((_finite(pair[side]) for pair in pairs), default=0.0) for side in (0, 1))
    if not before or not after:
        return ""
    both = f"is {_cell(before)} with and {_cell(after)} without"
    change = f"from {_cell(before)} to {_cell(after)}"
    if before > FALL * after:
        return f"Without each sequence's first token the largest neuron kurtosis falls {change}: it is there."
    return f"The largest neuron kurtosis {both} each sequence's first token."


def _tokens(layers: Sequence[Layer]) -> str:
    first, last = layers[0], layers[-1]
    layer = max(layers, key=lambda layer: _finite(layer.readings["token_correlation_mean"]))
    highest = layer.readings["token_correlation_mean"]
    if not math.isfinite(highest):
        return ""
    ranks = " to ".join(_cell(end.readings["effective_rank"]) for end in (first, last))
    verdict = "Tokens collapse" if highest >= COLLAPSED else "Tokens do not collapse"
    return (
        f"{verdict}: their mean correlation is at most {highest:.3f}, at {_name(layer)}; "
        f"the effective rank goes from {ranks}."
    )


def _attention(layers: Sequence[Layer]) -> str:
    seen = [layer for layer in layers if "sink_rate" in layer.readings]
    if not seen:
        return "No attention was seen: the model calls neither fused attention nor a softmax of its own."
    seen = [layer for layer in seen if math.isfinite(layer.readings["attention_entropy"])]
    if not seen:
        return ""
    layer = max(seen, key=lambda layer: layer.readings["sink_rate"])
    low = min(seen, key=lambda layer: layer.readings["attention_entropy"])
    entropy = f"the lowest entropy is {_cell(low.readings['attention_entropy'])} nats, in {_name(low)}"
    rate = layer.readings["sink_rate"]
    if not rate > 0:
        return f"Attention sinks nowhere: no head gives the first token more than 0.3 of it; {entropy}."
    return f"Attention sinks: in {_name(layer)} {rate:.0%} of the heads rest on the first token; {entropy}."


def _check(layers: Sequence[Layer]) -> str:
    if not layers:
        return ""
    errors = [layer.trace_error for layer in layers if layer.trace_error is not None]
    worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    if worst <= EXACT:
        return f"self-check: trace identity holds to {worst:.0e}"
    return f"self-check FAILED: trace identity is off by {worst:.0e}; do not trust these readings"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _cell(value: float | None) -> str:
    """Write a number in at most eight characters."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def write_report(observation: Observation, *, overwrite: bool = False) -> Path:
    """Write readings.json, report.html and the figures into the observation's folder; return the page's path.

    The folder is there whole or not at all.

    Raises: InputError when the folder is taken.
    """
    folder = observation.folder
    check_free(folder, overwrite)
    page = report_page(observation)
    with atomic_folder(folder, replace=True) as temporary:
        write_json(temporary / READINGS, readings(observation))
        for section in page.sections:
            for block in section.blocks:
                if isinstance(block, Plot):
                    save(block.figure, temporary / "figures" / f"{block.title.lower().replace(' ', '_')}.svg")
        write(page, temporary / "report.html")
    return folder / "report.html"


def readings(observation: Observation) -> dict[str, Any]:
    """Return all numbers as JSON holds them; what is not finite is null."""
    layers = [
        {**asdict(layer), "neurons": [_named(*pair) for pair in layer.neurons]}
        for layer in observation.layers
    ]
    return {
        "facts": observation.facts,
        "tokens": observation.tokens,
        "sequences": observation.sequences,
        "layers": _plain(layers),
    }


def _named(neuron: int, share: float) -> dict[str, float]:
    return {"neuron": neuron, "share": share}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_page(observation: Observation) -> Page:
    """Compose the report of an observation."""
    streams = [layer for layer in observation.layers if layer.trace_error is not None]
    sections = []
    if streams:
        sections += [
            _profiles("Outlier neurons", streams, [*KURTOSES, "max_median_ratio", "max_abs"]),
            _neurons(streams),
            _profiles("Tokens", streams, ["token_correlation_mean", "effective_rank"]),
        ]
    attentions = [layer for layer in observation.layers if "sink_rate" in layer.readings]
    if attentions:
        sections.append(_profiles("Attention", attentions, ["attention_entropy", "sink_rate"]))
    return Page(
        title=f"What {observation.model} does with a text",
        lead=" ".join(sentences(observation)),
        facts=observation.facts,
        sections=(*sections, _table(observation)),
    )


def _profiles(heading: str, layers: Sequence[Layer], names: Sequence[str]) -> Section:
    """Return a section with a profile over depth of each reading."""
    text = "Layer by layer, from the input to the output"
    if layers[-1].label == "output":
        text += "; the last point is what leaves the last layer"
    return Section(heading, text + ".", [_profile(layers, name) for name in names])


def _profile(layers: Sequence[Layer], name: str) -> Plot:
    title = name.replace("_", " ").capitalize()
    series = {"all tokens": [layer.readings.get(name, math.nan) for layer in layers]}
    if any(layer.without_first.get(name) is not None for layer in layers):
        series["without the first"] = [layer.without_first.get(name, math.nan) for layer in layers]
    log = name in LOGARITHMIC
    figure = final_profile(series, y=title.lower(), colours=palette(series), log=log)
    return Plot(figure, MEANINGS[name], f"{title} by layer.", title)


def _neurons(layers: Sequence[Layer]) -> Section:
    """Return the table of the loudest neurons and of the largest entries."""
    count = max(len(layer.neurons) for layer in layers)
    columns = [Column("layer")]
    columns += [Column(f"neuron {place} (× mean square)") for place in range(1, count + 1)]
    columns += [Column("largest value"), Column("its neuron"), Column("its token"), Column("after")]
    rows: list[list[str | float | None]] = []
    for layer in layers:
        loudest = [f"{neuron} ({number(share, 3)})" for neuron, share in layer.neurons]
        peak = layer.peak
        largest = [None, None] if peak is None else [peak.value, str(peak.neuron)]
        rows.append(
            [_name(layer), *loudest, *[None] * (count - len(loudest)), *largest, layer.token, layer.before]
        )
    notes = (
        "Behind each neuron: its mean square over the mean of all neurons' mean squares. About 1 for every "
        f"neuron at initialisation; from {OUTLIER:g} on, three times the RMS, it is called an outlier here.",
    )
    return Section("Loudest neurons", "", (Table(columns, rows, notes=notes),))


def _table(observation: Observation) -> Section:
    columns = [Column("layer")]
    for name in HEADINGS:
        title = name.replace("_", " ")
        columns += [Column(title), Column(f"{title} without first")] if name in KURTOSES else [Column(title)]
    rows: list[list[str | float | None]] = []
    for layer in observation.layers:
        row: list[str | float | None] = [_name(layer)]
        for name in HEADINGS:
            row.append(layer.readings.get(name))
            if name in KURTOSES:
                row.append(layer.without_first.get(name))
        rows.append(row)
    notes = (
        "The three kurtoses are different quantities and not to be compared with one another.",
        "Kurtosis alone does not predict what int8 costs: gramian quantise measures it.",
    )
    return Section("All layers", "", (Table(columns, rows, notes=notes),))
