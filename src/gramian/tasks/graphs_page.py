"""What a comparison of networks on graphs leaves behind: a report page, figures, numbers, predictions."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

from gramian.data.graphs import NODE_TASKS
from gramian.files import atomic_folder, write_json, write_text
from gramian.interop.message_passing import LAYERS
from gramian.report import Column, Page, Plot, Section, Table, curves, number, palette, save, write
from gramian.report.graphs import OUTER, reach, seed_scores
from gramian.tasks.graph_predictions import Judged, by_target, judge, predictions_csv
from gramian.tasks.graph_scores import LOWER
from gramian.tasks.graphs import Comparison, GraphsConfig, spread
from gramian.tasks.graphs_words import CONSTANT, NAMES, ranked, reading, scaled, sentences, tests
from gramian.tasks.predict_page import plain
from gramian.train.run import versions

NUMBERS, PREDICTIONS, REPORT, FIGURES = "graphs.json", "predictions.csv", "report.html", "figures"

LISTED = 50
"""Most classes, labels or targets that the report lists."""


def report_page(found: Comparison, config: GraphsConfig, judged: Judged | None) -> Page:
    """Compose the report: scores, learning, how far filters look, classes or targets, what was tried."""
    colours = palette(config.models)
    sections = [_result(found, colours), _learning(found, colours)]
    if judged is not None:
        sections += [*_reach(judged), *_targets(found, judged)]
    if len(config.schedule.learning_rates) > 1:
        sections.append(_tried(found))
    return Page(
        title=f"Networks on graphs: {found.graphs.name}",
        lead="\n\n".join((" ".join(reading(found)), " ".join(sentences(found, config)))),
        facts=_facts(found, config),
        sections=sections,
    )


def _facts(found: Comparison, config: GraphsConfig) -> dict[str, str]:
    architecture, schedule, split = config.architecture, config.schedule, found.split
    positions = architecture.encoding
    if positions != "none":
        positions += f", {architecture.encoding_size}"
    rates = " ".join(f"{rate:g}" for rate in schedule.learning_rates)
    there = _versions(config)
    return {
        "graphs": f"{found.graphs.text()}; {len(split.train):,} to learn from, {len(split.validation):,} to "
        f"choose by, {len(split.test):,} to report on, fold {config.source.fold}",
        "networks": f"{architecture.layers} layers, at most {architecture.parameters:,} parameters, dropout "
        f"{architecture.dropout:g}, read-out {architecture.readout}, positions {positions}",
        "training": f"{schedule.epochs} epochs at most, batches of {schedule.batch}, learning rates {rates}, "
        f"weight decay {schedule.weight_decay:g}, {schedule.precision}",
        "seeds": " ".join(map(str, config.seeds)),
        "software": ", ".join(f"{name} {there[name]}" for name in there if name in SHOWN),
    }


SHOWN = ("gramian", "torch", "torch_geometric")


def _versions(config: GraphsConfig) -> dict[str, str]:
    standard = set(config.models) & set(LAYERS)
    return versions() | ({"torch_geometric": metadata.version("torch_geometric")} if standard else {})


def _result(found: Comparison, colours: Mapping[str, str]) -> Section:
    name, metric = NAMES[found.metric], found.metric
    unit = "%" if metric == "accuracy" else ""
    rows: list[list[Any]] = []
    for model, outcomes in found.outcomes.items():
        if not outcomes:
            rows.append([f"{model}: diverged", *[None] * 8])
            continue
        own, deviation = spread([scaled(metric, each.test) for each in outcomes])
        validation = scaled(metric, mean(each.validation for each in outcomes))
        network = [model, outcomes[0].parameters, f"{outcomes[0].learning_rate:g}", len(outcomes)]
        scores = [own, None if isnan(deviation) else deviation, validation]
        rows.append(
            [*network, *scores, *(mean(getattr(o, key) for o in outcomes) for key in ("epoch", "seconds"))]
        )
    rows.append([CONSTANT, *[None] * 3, scaled(metric, found.constant), *[None] * 4])
    better = "low" if metric in LOWER else "high"
    table = Table(
        columns=(
            Column("network"),
            Column("parameters"),
            Column("learning rate"),
            Column("seeds"),
            Column(f"test {name}", unit, better=better),
            Column("deviation over seeds", unit),
            Column(f"validation {name}", unit, better=better),
            Column("best epoch"),
            Column("training", "s"),
        ),
        rows=rows,
        notes=(
            "Weights, epoch and learning rate are those of the best validation metric; the test part is only "
            "reported on. Means over seeds. Training is without evaluations.",
            f"{CONSTANT}: the best that can be said of every graph alike, by the training part.",
        ),
    )
    series = {
        model: [scaled(metric, value) for value in tests(outcomes)]
        for model, outcomes in found.outcomes.items()
        if outcomes
    }
    label = f"test {name}" + (f" ({unit})" if unit else "")
    figure = seed_scores(series, value=label, constant=scaled(metric, found.constant), colours=colours)
    caption = (
        f"{label}, {'lower' if better == 'low' else 'higher'} is better. A dot is a seed, a bar the mean."
    )
    alt = f"{label} of every network, one dot a seed."
    return Section("Result", "", (table, Plot(figure, caption, alt, "Test scores")))


def _learning(found: Comparison, colours: Mapping[str, str]) -> Section:
    name = NAMES[found.metric]
    label = f"validation {name}" + (" (%)" if found.metric == "accuracy" else "")
    epochs, times = {}, {}
    for model, rows in _evaluations(found).items():
        values = [scaled(found.metric, row[f"validation_{found.metric}"]) for row in rows]
        epochs[model] = list(range(len(rows))), values
        times[model] = [row["seconds"] for row in rows], values
    log = found.metric in LOWER
    caption = "The first seed of every network, with the learning rate that was kept"
    scale = ", on a logarithmic scale" if log else ""
    by_epoch = curves(epochs, x="epoch", y=label, colours=colours, log=log, integer=True)
    by_time = curves(times, x="training time (s)", y=label, colours=colours, log=log)
    return Section(
        "Learning",
        "",
        (
            Plot(by_epoch, f"{caption}{scale}.", f"{label} by epoch.", "Validation by epoch"),
            Plot(
                by_time,
                "The same against time spent training: at equal height, further left is faster.",
                f"{label} by training time.",
                "Validation by time",
            ),
        ),
    )


def _evaluations(found: Comparison) -> dict[str, list[dict[str, float]]]:
    """Return the evaluations of the first seed of every network, an epoch each, the first before training."""
    return {model: found.evaluations(outcomes[0]) for model, outcomes in found.outcomes.items() if outcomes}


def _reach(judged: Judged) -> list[Section]:
    if judged.reach is None:
        return []
    trained, start = judged.reach
    hops = len(trained[0]) - 1
    now, before = ([float(each[-1].mean()) for each in part] for part in judged.reach)
    low, high = (number(end(now), 2) for end in (min, max))
    text = (
        f"A layer takes in what lies k hops away times λ^k, in each of its {trained[0].shape[1]} units with "
        f"a λ of its own. What lies {hops} hops away, as far as filters look, has {low} to {high} times the "
        f"weight of the node itself, on average over units; before training it had "
        f"{number(sum(before) / len(before), 2)}."
    )
    figure = reach([each.numpy() for each in trained], [each.numpy() for each in start])
    caption = (
        "|λ|^k against distance k, layer by layer, of the first seed. Near 1: what is far counts like what "
        "is near. The dashed line is where the layer started; how much of a unit is read out is not in it."
    )
    alt = "Weight by distance, a panel for each layer."
    return [Section("How far it looks", text, (Plot(figure, caption, alt, "Reach by layer"),))]


def _targets(found: Comparison, judged: Judged) -> list[Section]:
    graphs, rows = found.graphs, by_target(found, judged)
    if len(rows) < 2:
        return []
    what = "class" if graphs.classifies else "label" if graphs.task == "multilabel" else "target"
    of = "nodes" if graphs.task in NODE_TASKS else "graphs"
    metric, unit = ("share found", "%") if graphs.classifies else (NAMES[found.metric], "")
    count = f"{of} with it" if graphs.task == "multilabel" else of
    columns = Column(what), Column(count), Column(metric, unit)
    notes = [f"{judged.outcome.model}, seed {judged.outcome.seed}, on the test part."]
    if len(rows) > LISTED:
        notes.append(f"The first {LISTED} of {len(rows)}; {NUMBERS} has all.")
    return [Section(f"By {what}", "", (Table(columns, rows[:LISTED], notes=notes),))]


def _tried(found: Comparison) -> Section:
    unit = "%" if found.metric == "accuracy" else ""
    columns = Column("network"), Column("learning rate"), Column(f"validation {NAMES[found.metric]}", unit)
    rows = [[o.model, f"{o.learning_rate:g}", scaled(found.metric, o.validation)] for o in found.tried]
    note = (
        "The first seed of every network; the best rate was kept for the others. Diverged ones are not there."
    )
    return Section("What was tried", "", (Table(columns, rows, notes=(note,)),))


def write_report(found: Comparison, config: GraphsConfig) -> Path:
    """Write graphs.json, predictions.csv, report.html and figures into the run folder; return the folder.

    Of a network that diverged there are no predictions.
    """
    judged, folder = judge(found, config), found.folder
    page = report_page(found, config, judged)
    with atomic_folder(folder / FIGURES, replace=True) as temporary:
        for section in page.sections:
            for block in section.blocks:
                if isinstance(block, Plot):
                    save(block.figure, temporary / f"{block.title.lower().replace(' ', '_')}.svg")
    if judged is not None:
        write_text(folder / PREDICTIONS, predictions_csv(found, judged))
    write_json(folder / NUMBERS, numbers(found, config, judged))
    write(page, folder / REPORT)
    return folder


def numbers(found: Comparison, config: GraphsConfig, judged: Judged | None) -> dict[str, Any]:
    """Return what graphs.json holds: settings, versions, graphs, scores, learning, how far filters look."""
    graphs, split = found.graphs, found.split
    return plain(
        {
            "settings": asdict(config) | {"runs": str(config.runs)},
            "versions": _versions(config),
            "graphs": {
                "name": graphs.name,
                "task": graphs.task,
                "count": len(graphs),
                "nodes": len(graphs.x),
                "edges": graphs.edge_index.shape[1],
                "directed": graphs.directed,
                "left_out_edges": graphs.dropped,
                "outputs": graphs.outputs,
                "classes": graphs.classes,
            },
            "split": {part: len(numbers) for part, numbers in vars(split).items()},
            "hops": found.hops,
            "metric": found.metric,
            "constant": found.constant,
            "outcomes": {model: [vars(each) for each in found.outcomes[model]] for model in found.outcomes},
            "tried": [vars(each) for each in found.tried],
            "gain_of_best": ranked(found),
            "learning": _evaluations(found),
            "sentences": [*reading(found), *sentences(found, config)],
            "by_target": [] if judged is None else by_target(found, judged),
            "reach": None if judged is None else _reach_numbers(judged),
        }
    )


def _reach_numbers(judged: Judged) -> list[dict[str, Any]] | None:
    """Return mean and outer quantiles of |λ|^k over units by distance, for each layer."""
    if judged.reach is None:
        return None
    return [
        {
            "mean": now.mean(1).tolist(),
            "quantiles": {f"{share:g}": now.quantile(share, 1).tolist() for share in OUTER},
            "mean_at_start": before.mean(1).tolist(),
        }
        for now, before in zip(*judged.reach, strict=True)
    ]
