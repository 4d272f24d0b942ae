"""The report page of a pruning: what it costs by density, what is certified, where weights are kept."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gramian.bayes.certificate import Certificate
from gramian.files import atomic_folder, write_json
from gramian.report import Column, Page, Plot, Section, Table, curves, save, write
from gramian.report.pruning import DensityPath, density_path, layer_densities, probabilities_over_time
from gramian.tasks.predict_page import plain
from gramian.tasks.pruning_result import Guarantee, Pruned, Pruning
from gramian.tasks.pruning_words import (
    certified,
    density,
    held_out,
    noise,
    rounded_up,
    sentences,
    verdict,
)
from gramian.train.run import versions

USES = {
    "prior": "made the mask and the weights, and the prior of a certificate",
    "bound": "made the certificate; seen by the posterior, never by the prior",
    "held_out": "made nothing; all errors here are on them",
}
"""What each kind of examples was used for."""

HEADINGS = {
    "bound": "bound",
    "value": "certificate, %",
    "confidence": "probability that it holds, %",
    "empirical_risk": "error on the bound set, %",
    "empirical_bound": "the same, bounded by the draws, %",
    "draws": "draws m",
    "sampling": "bound by the draws",
    "variance": "variance of the draws' risks",
    "kl": "KL, nats",
    "kl_per_example": "KL per example, nats",
    "n": "examples of the bound set n",
    "delta": "δ: the bound set misleads",
    "delta_sampling": "δ′: the draws mislead",
    "union": "price of choosing the prior, nats",
    "weight": "λ of the λ bound",
    "prior_examples": "examples of the prior set",
    "seed": "seed of the split",
    "seen": "fingerprint of what made the prior",
    "bound_set": "fingerprint of the bound set",
}
"""Terms of a certificate in the order of the table."""

OF_RANDOM = ("empirical_bound", "draws", "sampling", "kl", "kl_per_example", "delta_sampling", "weight")
"""Terms that a test-set bound does not have."""

EXPORTED = {
    "nonzero_before": "non-zero before",
    "nonzero": "non-zero",
    "compressed_before": "bytes before, under gzip",
    "compressed": "bytes under gzip",
    "small_parameters": "parameters of the small network",
    "small_bytes": "bytes of the small network",
    "small, name": "small network",
    "small, size": "its inputs",
    "small, classes": "its classes",
    "small, widths": "its widths",
    "speed, examples": "examples of a timed pass",
    "speed, threads": "threads",
    "speed, dense": "seconds of the dense network",
    "speed, small": "seconds of the small network",
    "speed, ratio": "dense / small",
}
"""Names of facts of an export; others are shown by their own."""

LONG = 40
"""Letters of a fact from which on it stands below the table."""

NUMBERS, REPORT, FIGURES = "pruning.json", "report.html", "figures"


def write_report(pruning: Pruning, folder: Path) -> Path:
    """Write pruning.json, report.html and the figures into the folder of a run; return the page's path.

    What else is there stays; figures of an earlier report go.
    """
    page = report_page(pruning)
    plots = [block for section in page.sections for block in section.blocks if isinstance(block, Plot)]
    with atomic_folder(folder / FIGURES, replace=True) as temporary:
        for plot in plots:
            save(plot.figure, temporary / f"{plot.title.lower().replace(' ', '_')}.svg")
    write_json(folder / NUMBERS, numbers(pruning))
    write(page, folder / REPORT)
    return folder / REPORT


def report_page(pruning: Pruning) -> Page:
    """Return the page: density path, certificates, layers, probabilities over time, exports."""
    software = ", ".join(f"{name} {versions()[name]}" for name in ("gramian", "torch"))
    counts = {name.replace("_", "-") + " examples": f"{n:,}" for name, n in pruning.examples.items()}
    return Page(
        title=f"Pruning: {pruning.title}",
        lead="\n\n".join((" ".join(verdict(pruning)), *certified(pruning)[:1])),
        facts={"network and data": pruning.title, **counts, "error": pruning.loss, "software": software},
        sections=(
            _what(pruning),
            _path(pruning),
            _certificates(pruning),
            _layers(pruning),
            _over_time(pruning),
            _exports(pruning),
        ),
    )


def numbers(pruning: Pruning) -> dict[str, Any]:
    """Return everything that was found as JSON holds it; what is not finite is null."""
    found = asdict(pruning)
    for outcome, shown in zip(pruning.outcomes, found["outcomes"], strict=True):
        for name, certificate in _predictors(outcome.guarantee).items():
            shown["guarantee"][name] |= {
                "confidence": certificate.confidence,
                "kl_per_example": certificate.kl_per_example,
                "vacuous": certificate.vacuous,
            }
    return plain({**found, "sentences": sentences(pruning)})


def _predictors(guarantee: Guarantee | None) -> dict[str, Certificate]:
    """Return the certificates that there are, by the guarantee's names."""
    if guarantee is None:
        return {}
    found = {"posterior": guarantee.posterior, "prior": guarantee.prior, "fixed": guarantee.fixed}
    return {name: certificate for name, certificate in found.items() if certificate is not None}


def _what(pruning: Pruning) -> Section:
    layers = pruning.outcomes[0].layers if pruning.outcomes else ()
    weights = sum(layer.weights for layer in layers)
    rows = [[name.replace("_", "-"), n, USES.get(name, "")] for name, n in pruning.examples.items() if n]
    return Section(
        "What was pruned",
        f"{weights:,} weights of {len(layers)} layers of {pruning.title}; other parameters, such as biases, "
        "are kept whole. A density is the share of these weights that is kept.\n\n"
        "The random predictor draws a mask (and weights, where they are random too) for every prediction, "
        "with the probabilities λ that were learnt. "
        "The fixed mask keeps the most probable weights: this is the network that is exported.",
        (Table([Column("examples"), Column("number"), Column("use")], rows),),
    )


def _path(pruning: Pruning) -> Section:
    outcomes = pruning.outcomes
    if not outcomes:
        return Section("Density path", "Nothing was pruned.")
    bounds = [_predictors(each.guarantee) for each in outcomes]
    path = DensityPath(
        densities=[each.density for each in outcomes],
        baseline=[each.baseline for each in outcomes],
        random=[each.random for each in outcomes],
        fixed=[each.fixed for each in outcomes],
        certificate=[_value(each.get("posterior")) for each in bounds],
        prior=[_value(each.get("prior")) for each in bounds],
        test_set=[_value(each.get("fixed")) for each in bounds],
    )
    plot = Plot(
        density_path(path, pruning.dense, y=pruning.loss),
        f"Full lines: {pruning.loss} on held-out examples. Broken lines: what is certified of the random "
        "predictor, of the prior itself, and by a test-set bound of the prior's fixed mask. Dotted: dense.",
        "Errors and certificates against density",
        "Density path",
    )
    headings = [
        Column("density"),
        *(
            Column(name, "%")
            for name in ("kept", "mean λ", "starting mask", "random predictor", "fixed mask")
        ),
        Column("fixed − dense", "points"),
        Column("chance", "points"),
        *(Column(name, "% at most") for name in ("certificate", "prior's own", "test-set bound")),
    ]
    rows = [["dense", 100, None, None, None, 100 * pruning.dense, *[None] * 5]]
    for each, bound in zip(outcomes, bounds, strict=True):
        shares = (each.kept, each.expected, each.baseline, each.random, each.fixed)
        rows.append(
            [
                density(each.density),
                *(100 * value for value in shares),
                100 * (each.fixed - pruning.dense),
                _chance(pruning, each),
                *(
                    rounded_up(bound[name].value) if name in bound else None
                    for name in ("posterior", "prior", "fixed")
                ),
            ]
        )
    note = (
        f"Chance: two standard errors of the difference on {held_out(pruning):,} held-out examples, at most."
    )
    return Section("Density path", "", (plot, Table(headings, rows, notes=(note,))))


def _value(certificate: Certificate | None) -> float:
    return math.nan if certificate is None else certificate.value


def _chance(pruning: Pruning, outcome: Pruned) -> float | None:
    if not held_out(pruning) or not math.isfinite(pruning.dense + outcome.fixed):
        return None
    return 100 * noise(pruning.dense, outcome.fixed, held_out(pruning), pruning.deviation)


def _certificates(pruning: Pruning) -> Section:
    found = {each.density: each.guarantee for each in pruning.outcomes if each.guarantee is not None}
    text = "\n\n".join(certified(pruning))
    if not found:
        return Section("Certificate", text)
    tables = [_terms(density(at), guarantee) for at, guarantee in found.items()]
    kinds = list(dict.fromkeys(kind for guarantee in found.values() for kind in guarantee.bounds))
    rows = [
        [density(at), *(rounded_up(g.bounds[kind]) if kind in g.bounds else None for kind in kinds)]
        for at, g in found.items()
    ]
    note = (
        "kl, quadratic, classic and lambda follow from one event, so all of them hold at once. Catoni's is "
        "another event: to take it, one has to choose it before the bound set is seen."
    )
    columns = [Column("density"), *(Column(kind, "% at most") for kind in kinds)]
    return Section(
        "Certificate",
        text,
        (*tables, Table(columns, rows, "The same evidence under each bound", notes=(note,))),
    )


def _terms(at: str, guarantee: Guarantee) -> Table:
    """Return every term of the certificates of one density, one a row."""
    names = {"posterior": "random predictor", "prior": "prior itself", "fixed": "prior's fixed mask"}
    shown = _predictors(guarantee)
    others = {
        field.name: field.name.replace("_", " ")
        for field in fields(Certificate)
        if field.name not in (*HEADINGS, "loss", "fixed")
    }
    rows = [
        [heading, *(_term(certificate, term) for certificate in shown.values())]
        for term, heading in (HEADINGS | others).items()
    ]
    rows.append([f"{guarantee.posterior.loss} on held-out examples, %", *[None] * len(shown)])
    if guarantee.held_out is not None:
        rows[-1][1] = 100 * guarantee.held_out
    return Table([Column("term"), *(Column(names[name]) for name in shown)], rows, f"Density {at}")


def _term(certificate: Certificate, name: str) -> str | float | None:
    """Return a term as a cell, shares in percent; bounds are rounded up, the confidence down."""
    value = getattr(certificate, name)
    if value is None or (certificate.fixed and name in OF_RANDOM):
        return None
    if name in ("value", "empirical_bound"):
        return rounded_up(value)
    if name == "confidence":
        return math.floor(value * 1e4 + 1e-8) / 100
    return 100 * value if name == "empirical_risk" else str(value) if name == "seed" else value


def _layers(pruning: Pruning) -> Section:
    plots: list[Plot | Table] = []
    for each in pruning.outcomes:
        shares = {layer.name: (layer.kept / layer.weights, layer.expected) for layer in each.layers}
        if shares:
            plots.append(
                Plot(
                    layer_densities(shares, whole=each.kept),
                    "Full: share that the fixed mask keeps. Pale: mean probability. Bars beyond the dotted "
                    "line: layers that need more than their part.",
                    f"Shares of weights kept by layer at density {density(each.density)}",
                    f"Layers at density {each.density:g}",
                )
            )
    return Section("Where weights are kept", "", (*plots, *_layer_table(pruning.outcomes)))


def _layer_table(outcomes: Sequence[Pruned]) -> list[Table]:
    if not outcomes or not outcomes[0].layers:
        return []
    columns = [
        Column("layer"),
        Column("weights"),
        *(Column(f"kept at {density(o.density)}") for o in outcomes),
    ]
    kept = [{layer.name: layer.kept for layer in each.layers} for each in outcomes]
    rows = [
        [layer.name, layer.weights, *(each.get(layer.name) for each in kept)] for layer in outcomes[0].layers
    ]
    return [Table(columns, rows, notes=("Kept: weights that the fixed mask keeps.",))]


def _over_time(pruning: Pruning) -> Section:
    """Return the histograms of λ over steps, summed over layers, and the loss while it was learnt."""
    learnt = [each for each in pruning.outcomes if each.history]
    if not learnt:
        return Section("Probabilities over time", "Nothing was learnt.")
    plots = []
    for each in learnt:
        moments = [moment for moment in each.history if moment.histograms]
        if moments:
            counts = [
                [sum(bins) for bins in zip(*moment.histograms.values(), strict=True)] for moment in moments
            ]
            figure = probabilities_over_time(
                [moment.step for moment in moments], counts, mean=[moment.density for moment in moments]
            )
            plots.append(
                Plot(
                    figure,
                    "How many weights, or groups of them, have which probability λ of being kept. At 0 and 1 "
                    "the masks are decided; the line is the mean.",
                    f"Histograms of λ over steps at density {density(each.density)}",
                    f"Probabilities at density {each.density:g}",
                )
            )
    losses = {
        density(each.density): (
            [moment.step for moment in each.history],
            [moment.loss for moment in each.history],
        )
        for each in learnt
    }
    plots.append(
        Plot(
            curves(losses, x="step", y="loss of the batch"),
            "Loss that was learnt from, on batches, by density.",
            "Loss over steps by density",
            "Loss over steps",
        )
    )
    return Section("Probabilities over time", "", plots)


def _exports(pruning: Pruning) -> Section:
    """Return a table of what was exported, one fact a row; sentences are below it."""
    found = {density(each.density): _flat(each.export) for each in pruning.outcomes if each.export}
    if not found:
        return Section("Export", "Nothing was exported.")
    notes: dict[str, list[str]] = {}
    for at, entries in found.items():
        for name in [name for name, cell in entries.items() if isinstance(cell, str) and len(cell) > LONG]:
            notes.setdefault(f"{name[0].upper()}{name[1:]}: {entries.pop(name)}", []).append(at)
    names = dict.fromkeys(name for entries in found.values() for name in entries)
    rows = [[name, *(entries.get(name) for entries in found.values())] for name in names]
    text = (
        "The state with zeros loads into the dense network and takes as long as it. A smaller network exists "
        "only where whole neurons or channels are gone."
    )
    said = [f"{note} ({', '.join(places)})." for note, places in notes.items()]
    return Section("Export", text, (Table([Column("density"), *map(Column, found)], rows, notes=said),))


def _flat(entries: Mapping[str, Any], of: str = "") -> dict[str, float | str]:
    """Return the numbers and words of an export by readable names, what is in groups after the group's."""
    found: dict[str, float | str] = {}
    for name, value in entries.items():
        path = f"{of}{name}"
        heading = EXPORTED.get(path, path.replace("_", " "))
        if isinstance(value, Mapping):
            found |= _flat(value, f"{path}, ")
        elif isinstance(value, list | tuple):
            found[heading] = ", ".join(map(str, value))
        elif value is not None:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            found[heading] = value if number else str(value)
    return found
