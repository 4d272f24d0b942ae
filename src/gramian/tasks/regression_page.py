"""What a regression tells its reader: a table and sentences, a report page, figures, numbers, predictions."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable
from torch import Tensor

from gramian.core.calibration import LEVELS, coverage
from gramian.core.classification import error_confidence_curve
from gramian.data.tables import Table as DataTable
from gramian.report import Column, Page, Plot, Section, Table, curves, number
from gramian.report.distribution import percent
from gramian.report.intervals import DRAWN, against_truth, doubt, reliability, thinned
from gramian.tasks.predict_page import check_free, plain, write_folder
from gramian.tasks.regression import CONSTANT, Regression, Rows
from gramian.tasks.regression_fit import DEEP, JITTER, PROCESS, TRIED, RegressConfig, Trial
from gramian.tasks.regression_scores import coverage_error, judged
from gramian.train.run import versions

NUMBERS, PREDICTIONS = "regression.json", "predictions.csv"
"""The files of a regression; the first is what its folder is known by."""

FEW = 100
"""Rows below which a number taken of them is called rough."""

LISTED = 20
"""Most rows out of distribution that the report lists."""

COLUMNS = (
    "row", "mean", "std", "lower", "upper", "epistemic_std", "noise_std", "out_of_distribution", "true",
)  # fmt: skip
"""Of predictions.csv; the last one only where the target is known."""

WRONG = (
    "RMSE of the rows that a method is surest of, from a tenth of them to all. It rises where wide intervals "
    "are wide for a reason, and is level, but for chance, where widths tell nothing about errors."
)


def check_place(config: RegressConfig, overwrite: bool) -> None:
    """Raise InputError unless the results may go where they are to go."""
    check_free(config.folder, overwrite, NUMBERS, begun=True)


def terminal_table(found: Regression, config: RegressConfig) -> TerminalTable:
    """Return the scores on the test rows, a method a row."""
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("")
    for heading in ("RMSE", "NLL", "CRPS", f"inside {percent(config.level)}", "width"):
        table.add_column(heading, justify="right")
    for name, scores in found.scores.items():
        inside = percent(scores.coverage)
        cells = (scores.rmse, scores.nll, scores.crps)
        table.add_row(name, *(number(each) for each in cells), inside, number(scores.width))
    return table


def sentences(found: Regression, config: RegressConfig) -> list[str]:
    """Say what was learnt, whether it is of use, whether intervals are honest, and what to be wary of."""
    return [
        f"{found.table.text()}.",
        f"Learnt from {len(found.train):,} rows, chosen and calibrated by {len(found.validation):,}, judged "
        f"by {len(found.test):,}.",
        _use(found),
        _honesty(found, config),
        *_strange(found, config),
        *_warnings(found),
    ]


def _use(found: Regression) -> str:
    """Compare with a constant, by the squared errors of the same rows."""
    name, y = found.fitted.name, found.table.y[found.test]
    own, constant = (found.predictions[each].mean for each in (name, CONSTANT))
    gains = (constant - y).square() - (own - y).square()
    share = 1 - found.scores[name].rmse / found.scores[CONSTANT].rmse
    said = (
        f"{name} misses a test target by {number(found.scores[name].rmse, 3)} (RMSE), "
        f"{percent(abs(share))} {'less' if share > 0 else 'more'} than the mean of the training rows does "
        f"({number(found.scores[CONSTANT].rmse, 3)})"
    )
    if gains.mean() > 2 * gains.std() / len(gains) ** 0.5:
        return f"{said}."
    return f"{said}: no more than chance, so the columns may tell nothing of {found.table.target!r}."


def _honesty(found: Regression, config: RegressConfig) -> str:
    scores, level = found.scores[found.fitted.name], config.level
    error = coverage_error(level, len(found.test), len(found.validation))
    gap = scores.coverage - level
    verdict = "they are honest, within chance"
    if abs(gap) > 2 * error:
        verdict = "they are too wide" if gap > 0 else "they are too narrow"
    return (
        f"Its {percent(level)} intervals, {number(scores.width, 3)} wide on average, hold "
        f"{percent(scores.coverage)} of the test targets; honest ones hold {100 * level:.3g} ± "
        f"{100 * error:.2g} %: {verdict}."
    )


def _strange(found: Regression, config: RegressConfig) -> list[str]:
    """Say how many rows are out of distribution, and how good predictions of new rows are."""
    words = {"test": found.tested} if found.new is None else {"new": found.new, "test": found.tested}
    counts = [
        f"{int(found.far(rows.prediction).sum()):,} of {len(rows.numbers):,} {kind} rows"
        for kind, rows in words.items()
    ]
    said = [
        f"Out of distribution: {' and '.join(counts)}. There models differ by more than "
        f"{number(found.threshold**0.5, 3)} (one standard deviation), as by chance in "
        f"{percent(found.chance)} of rows like those learnt from; far beyond, a mean is a guess."
    ]
    if found.new is not None and found.new.y is not None:
        scores = judged(found.new.prediction, found.new.y, config.level)
        said.append(
            f"The target of the new rows is known: RMSE {number(scores.rmse, 3)}, {percent(scores.coverage)} "
            f"inside the {percent(config.level)} intervals."
        )
    return said


def _warnings(found: Regression) -> list[str]:
    said = []
    if (count := len(found.validation)) < FEW:
        said.append(
            f"Few rows: the {count} that calibrate fix the width of intervals to ± "
            f"{percent((2 * count) ** -0.5)} only; a larger --validation takes more."
        )
    if repeated := found.table.duplicates:
        said.append(
            f"Repeated features ({repeated:,} row{'s' * (repeated != 1)}): where one copy is learnt from and "
            "another judged by, errors look too small."
        )
    return said


def report_page(found: Regression, config: RegressConfig) -> Page:
    """Compose the report of a regression."""
    sections = (
        _result(found, config),
        _calibration(found, config),
        _wrong(found),
        _out(found, config),
        _tried(found),
    )
    return Page(
        title=f"{found.table.target} of {found.table.name}, with intervals",
        lead=" ".join(sentences(found, config)),
        facts=_facts(found, config),
        sections=sections,
    )


def _facts(found: Regression, config: RegressConfig) -> dict[str, str]:
    network = f"{config.activation}, widths {' '.join(map(str, config.widths)) or 'none'}"
    members = "infinitely wide" if found.fitted.name == PROCESS else f"{config.members} networks"
    where = "drawn by the seed" if config.split is None else f"published split {config.split}"
    return {
        "method": f"{found.fitted.name}, {members}, {network}",
        "rows": f"{len(found.train):,} to learn from, {len(found.validation):,} to choose and calibrate by, "
        f"{len(found.test):,} to report on, {where}",
        "seed": str(config.seed),
        "time": f"{found.seconds:.0f} s",
        "software": ", ".join(f"{name} {versions()[name]}" for name in ("gramian", "torch")),
    }


def _result(found: Regression, config: RegressConfig) -> Section:
    level, target = percent(config.level), found.table.target
    table = Table(
        columns=(
            Column("method"),
            Column("RMSE", better="low"),
            Column("NLL", "nats", better="low"),
            Column("CRPS", better="low"),
            Column(f"inside {level}", "%"),
            Column("width"),
            Column("calibration error", "%", better="low"),
        ),
        rows=[
            [name, s.rmse, s.nll, s.crps, 100 * s.coverage, s.width, 100 * s.calibration_error]
            for name, s in found.scores.items()
        ],
        notes=(
            f"On {len(found.test):,} test rows, in the unit of {target}; the method asked for comes first.",
            f"Inside: share of targets inside the {level} intervals, whose mean width stands beside it. NLL: "
            "mean negative log density. CRPS: an absolute error that counts intervals. Calibration error: "
            "mean distance of the share inside from the level, over 19 levels.",
            f"{CONSTANT}: mean and deviation of the training rows, whatever the row.",
        ),
    )
    prediction = found.tested.prediction
    rows = (found.table.y[found.test], prediction.mean, *prediction.interval(config.level))
    figure = against_truth(*(each.tolist() for each in rows), name=target)
    caption = (
        f"Test rows: mean and {level} interval of {found.fitted.name} against what is true.{_drawn(found)}"
    )
    return Section("Result", "", (table, Plot(figure, caption, caption, "Predicted against true")))


def _drawn(found: Regression) -> str:
    return f" {DRAWN} of {len(found.test):,} are drawn." if len(found.test) > DRAWN else ""


def _calibration(found: Regression, config: RegressConfig) -> Section:
    y, numbers = found.table.y[found.test], (len(found.test), len(found.validation))
    figure = reliability(
        LEVELS,
        {name: coverage(each, y).tolist() for name, each in found.predictions.items()},
        [coverage_error(level, *numbers) for level in LEVELS],
    )
    caption = (
        "Share of test targets inside central intervals, by their level. On the dotted line intervals hold "
        "what they say; below it they are too narrow, above it too wide. Shaded: two standard errors by "
        "chance, of so few test rows and so few rows to calibrate by."
    )
    alt = "Share of targets inside intervals against the level of the intervals, one line a method."
    return Section("Calibration", _honesty(found, config), (Plot(figure, caption, alt, "Reliability"),))


def _wrong(found: Regression) -> Section:
    """Show whether wide intervals are wide for a reason."""
    y = found.table.y[found.test]
    first = min(len(y), max(5, len(y) // 10)) - 1
    lines = {}
    for name, each in found.predictions.items():
        if name != CONSTANT:
            curve = error_confidence_curve(-each.std, (each.mean - y).square()).sqrt()[first:]
            kept = thinned(len(curve), 200)
            lines[name] = [100 * (first + 1 + place) / len(y) for place in kept], curve[kept].tolist()
    figure = curves(lines, x="rows kept, surest first (%)", y=f"RMSE of {found.table.target}")
    prediction = found.tested.prediction
    squares = (prediction.mean - y).square()[prediction.std.argsort(stable=True)]
    sure, unsure = (part.mean().sqrt().item() for part in squares.tensor_split(2))
    text = (
        f"The half of the test rows with the narrower intervals of {found.fitted.name} has an RMSE of "
        f"{number(sure, 3)}, the other half one of {number(unsure, 3)}. The noise is taken to be the same in "
        "all rows: widths differ by how much models disagree."
    )
    alt = "RMSE of the surest rows by the share of rows kept, one line a method."
    return Section("Does it know when it is wrong", text, (Plot(figure, WRONG, alt, "Error by confidence"),))


def _out(found: Regression, config: RegressConfig) -> Section:
    groups = {"test rows": found.tested} | ({} if found.new is None else {"new rows": found.new})
    figure = doubt(
        {name: rows.prediction.variance.sqrt().tolist() for name, rows in groups.items()},
        found.threshold**0.5,
        name=found.table.target,
    )
    caption = (
        f"Standard deviation of the models' means, row by row. The dotted line is passed by "
        f"{percent(found.chance)} of rows like those learnt from; rows far beyond it are unlike them."
    )
    blocks: list[Plot | Table] = [Plot(figure, caption, "Epistemic deviation by row.", "Doubt by row")]
    listed = {name: rows for name, rows in groups.items() if found.far(rows.prediction).any()}
    blocks += [_far_rows(found, rows, name, config) for name, rows in listed.items()]
    return Section("Out of distribution", " ".join(_strange(found, config)), blocks)


def _far_rows(found: Regression, rows: Rows, name: str, config: RegressConfig) -> Table:
    """List rows that are out of distribution, the strangest first, each with its most unusual column."""
    prediction, scaled = rows.prediction, found.fitted.x_scale(rows.x)
    order = prediction.variance.argsort(descending=True)
    far = [int(place) for place in order if found.far(prediction)[place]]
    lower, upper = prediction.interval(config.level)
    cells = []
    for place in far[:LISTED]:
        column = int(scaled[place].abs().argmax())
        what = _cell(found.table, column, float(rows.x[place, column]))
        numbers = (prediction.mean, lower, upper, prediction.variance.sqrt())
        true = None if rows.y is None else float(rows.y[place])
        row = [str(int(rows.numbers[place])), *(float(each[place]) for each in numbers), true, what]
        cells.append([*row, float(scaled[place, column])])
    headings = ("row", "mean", "lower", "upper", "deviation of models", "true", "most unusual column")
    return Table(
        columns=[*map(Column, headings), Column("its distance", "deviations")],
        rows=cells,
        title=f"{name.capitalize()} out of distribution",
        notes=(
            f"The strangest {len(cells)} of {len(far):,}. Distance: from the mean of the training rows, in "
            "their standard deviations. A row can be strange by columns that are unusual only together.",
        ),
    )


def _cell(table: DataTable, column: int, value: float) -> str:
    """Write a feature's name and value, the level of a word as it stands."""
    name = table.columns[column]
    if name.partition("=")[0] in table.categories:
        return name if value else f"not {name}"
    return f"{name} = {number(value)}"


def _tried(found: Regression) -> Section:
    """Tell which settings were tried, and which one was chosen."""
    chosen = found.fitted.trial
    rows = [_setting(f"{number}", trial, found.fitted.name) for number, trial in enumerate(found.trials, 1)]
    rows.append(_setting("chosen, all members" if found.trials else "chosen", chosen, found.fitted.name))
    headings = ("setting", "noise variance", "σ_w", "σ_b", "steps")
    notes = ["All on the standardised scale. NLL: of the validation rows, the noise calibrated on the same."]
    if found.trials:
        notes.append(
            f"On trial ensembles have at most {TRIED} members. Members learn from the training rows alone."
        )
    if PROCESS in found.predictions:
        notes.append(f"{PROCESS} adds {JITTER:g} of the mean of its kernel's diagonal to it (jitter).")
    noise = f"The noise of the intervals, calibrated, is {number(found.fitted.noise, 3)} on this scale"
    unit = f"a standard deviation of {number(_noise_std(found), 3)} in the unit of {found.table.target}"
    columns = [*map(Column, headings), Column("NLL", "nats", better="low")]
    return Section("What was tried", f"{noise}, {unit}.", (Table(columns, rows, notes=notes),))


def _setting(name: str, trial: Trial, method: str) -> list[Any]:
    prior = trial.prior
    noise = None if method == DEEP else prior.noise_variance
    return [name, noise, prior.weight_std, prior.bias_std, trial.steps or None, trial.nll]


def _noise_std(found: Regression) -> float:
    return float(found.fitted.noise**0.5 * found.fitted.y_scale.scale)


def predictions_csv(found: Regression, config: RegressConfig) -> str:
    """Return the new rows, or without them the test rows, as text with the columns of `COLUMNS`."""
    rows = found.new or found.tested
    prediction = rows.prediction
    columns: list[Tensor] = [
        rows.numbers,
        prediction.mean,
        prediction.std,
        *prediction.interval(config.level),
        prediction.variance.sqrt(),
        prediction.aleatoric.sqrt(),
        found.far(prediction).int(),
        *([] if rows.y is None else [rows.y]),
    ]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS[: len(columns)])
    writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return stream.getvalue()


def write_report(found: Regression, config: RegressConfig, *, overwrite: bool = False) -> Path:
    """Write predictions.csv, regression.json, report.html and the figures into a folder; return its path.

    The folder is there whole or not at all.

    Raises: InputError when the folder is taken.
    """
    check_place(config, overwrite)
    texts = {PREDICTIONS: predictions_csv(found, config)}
    write_folder(config.folder, numbers(found, config), report_page(found, config), NUMBERS, texts)
    return config.folder


def numbers(found: Regression, config: RegressConfig) -> dict[str, Any]:
    """Return what regression.json holds: settings, versions, table, rows, what was tried, scores."""
    table = found.table
    groups = {"test": found.tested} | ({} if found.new is None else {"new": found.new})
    return plain(
        {
            "settings": {name: str(value) for name, value in asdict(config).items() if value is not None},
            "versions": versions(),
            "table": {
                "name": table.name,
                "rows": len(table),
                "target": table.target,
                "columns": table.columns,
                "levels": dict(table.categories),
                "left_out_as_constant": table.dropped,
                "repeated_features": table.duplicates,
            },
            "rows": {part: len(getattr(found, part)) for part in ("train", "validation", "test")},
            "tried": [asdict(trial) for trial in found.trials],
            "chosen": asdict(found.fitted.trial),
            "noise_std": _noise_std(found),
            "scores": {name: asdict(scores) for name, scores in found.scores.items()},
            "out_of_distribution": {
                "threshold_std": found.threshold**0.5,
                "share_by_chance": found.chance,
                "rows": {name: int(found.far(rows.prediction).sum()) for name, rows in groups.items()},
            },
            "seconds": found.seconds,
        }
    )
