"""What a prediction of shaped transformers tells its reader: a sentence, tables, figures, numbers."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from gramian.report import Column, Page, Plot, Section, Table, number
from gramian.report.distribution import Band, bands, histograms, percent, shares
from gramian.tasks.covariance import (
    MEAN,
    NORM,
    PAIR,
    RARE,
    CovarianceConfig,
    CovariancePrediction,
    Ensemble,
    Region,
)
from gramian.tasks.predict_page import check_free, plain, write_folder
from gramian.tasks.samples import QUANTILES, Share, Summary
from gramian.tasks.verdict import COLLAPSED, FAR
from gramian.train.run import versions

UNITS = {PAIR: "correlation of tokens 1 and 2", NORM: "ln of the mean square of token 1"}
HEADINGS = {
    PAIR: "cosine\npair 1, 2",
    MEAN: "cosine\nall pairs",
    NORM: "ln norm²\ntoken 1",
}
ROWS = (*(f"{100 * level:g} %" for level in QUANTILES), "mean", "std")


def sentences(prediction: CovariancePrediction, config: CovarianceConfig) -> list[str]:
    """Return what the distribution is, whether networks agree, and what to change where that is needed."""
    found = (_verdict(prediction), _agreement(prediction), _advice(prediction, config))
    return [each for each in found if each]


def _verdict(prediction: CovariancePrediction) -> str:
    theory = prediction.theory
    fate = _fate(theory.blown_up, "blow up")
    if not prediction.starts_collapsed:
        collapse = "collapse to rank one"
        none = not theory.blown_up.count + theory.collapsed.count
        fate += f" or {collapse}" if none else f" and {_fate(theory.collapsed, collapse)}"
    if (left := len(theory.final[PAIR])) < 2:
        return f"Unstable: at depth/width {prediction.time:.3g} {('no', 'one')[left]} path is left; {fate}."
    pair, norm = theory.through[PAIR][-1].quantiles, theory.through[NORM][-1].quantiles
    kind = {"": "At", "blow up": "Unstable: at", "collapse": "Rank collapse: at"}[trouble(prediction)]
    return (
        f"{kind} depth/width {prediction.time:.3g} correlations of two tokens end between {_short(pair[0])} "
        f"and {_short(pair[-1])} (5 to 95 %), median {_short(pair[2])}; the squared norm of a token spreads "
        f"by a factor {_factor(norm[-1] - norm[0])} (95 % over 5 %); {fate}."
    )


def trouble(prediction: CovariancePrediction) -> str:
    """Return whether too many paths `blow up` or `collapse`, or nothing."""
    if prediction.theory.blown_up.fraction >= RARE:
        return "blow up"
    collapses = prediction.theory.collapsed.fraction >= RARE and not prediction.starts_collapsed
    return "collapse" if collapses else ""


def _fate(share: Share, what: str) -> str:
    if not share.count:
        return f"none of {share.total:,} paths {what}"
    return f"{_share(share)} of the paths {what}"


def _share(share: Share) -> str:
    """Write a share with its standard error, to that error's first digit."""
    percentages = 100 * share.fraction, 100 * share.error
    digits = max(0, -math.floor(math.log10(percentages[1]))) if share.error else 0
    return " ± ".join(f"{each:.{digits}f}" for each in percentages) + " %"


def _short(value: float) -> str:
    return f"{value + 0.0:.2f}".replace("-", "−")


def _factor(logarithm: float) -> str:
    return number(math.exp(logarithm), 3) if logarithm < 200 else "beyond numbers"


def _agreement(prediction: CovariancePrediction) -> str:
    distances, measured = prediction.distances, prediction.measured
    if measured is None:
        return ""
    lost = f"{measured.blown_up.count:,} of {measured.blown_up.total:,} networks blow up. "
    lost = lost if measured.blown_up.count else ""
    if not distances:
        return lost.strip()
    largest = max(distances, key=lambda name: distances[name].value)
    gap, chance = distances[largest].value, distances[largest].noise * _several(len(distances))
    word, beside = ("agree", "within") if gap <= chance else ("differ", "beyond")
    return (
        f"{lost}{measured.blown_up.total:,} finite networks {word}: Kolmogorov–Smirnov distance at most "
        f"{gap:.3f}, of the {largest}, {beside} the {chance:.3f} that chance reaches in 5 % of cases for "
        f"one of {len(distances)} readings."
    )


def _several(readings: int) -> float:
    """Return by how much the level of one distance grows for the largest of several (Bonferroni)."""
    return math.sqrt(math.log(2 * readings / 0.05) / math.log(2 / 0.05))


def _advice(prediction: CovariancePrediction, config: CovarianceConfig) -> str:
    if not trouble(prediction):
        return ""
    region = prediction.region
    if region is None:
        return "To change: a smaller --gamma or a larger --tau0; without --no-region the report says which."
    gamma, tau = largest_gamma(region, config.tau0), smallest_tau(region, config.gamma)
    changes = []
    if gamma is not None and gamma < config.gamma:
        changes.append(f"--gamma {gamma:g}")
    if tau is not None and tau > config.tau0:
        changes.append(f"--tau0 {tau:g}")
    if not changes and (gamma := largest_gamma(region, region.taus[-1])) is not None:
        changes.append(f"--gamma {gamma:g} --tau0 {region.taus[-1]:g}")
    if not changes:
        return "To change: fewer blocks or more width; no γ and τ₀ looked at is stable at this depth/width."
    return f"To change: {' or '.join(changes)}; there fewer than {100 * RARE:g} % of the paths are lost."


def largest_gamma(region: Region, tau: float) -> float | None:
    """Return the largest γ up to which all are stable at this τ₀."""
    stable = None
    for gamma in region.gammas:
        if not region.stable(gamma, tau):
            break
        stable = gamma
    return stable


def smallest_tau(region: Region, gamma: float) -> float | None:
    """Return the smallest τ₀ from which on all are stable at this γ."""
    stable = None
    for tau in reversed(region.taus):
        if not region.stable(gamma, tau):
            break
        stable = tau
    return stable


def _numbers(summary: Summary) -> list[float]:
    return [*summary.quantiles, summary.mean, summary.deviation]


def terminal_table(prediction: CovariancePrediction) -> TerminalTable:
    """Return quantiles, mean and deviation of every reading at the end, networks behind theory."""
    ensembles = _ensembles(prediction)
    table = TerminalTable(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("")
    columns: list[list[float]] = []
    for name in prediction.theory.final:
        for words, ensemble in ensembles.items():
            table.add_column(HEADINGS[name] if words == "SDE" else words, justify="right")
            columns.append(_numbers(ensemble.through[name][-1]))
    for index, row in enumerate(ROWS):
        table.add_row(row, *(_short(column[index]) for column in columns))
    if prediction.distances:
        for row, take in (("KS", lambda d: d.value), ("chance", lambda d: d.noise)):
            cells = [f"{take(prediction.distances[name]):.3f}" for name in prediction.distances]
            table.add_row(row, *(cell for each in cells for cell in ("", each)))
    table.add_section()
    for row, take in (("blown up", lambda e: e.blown_up), ("collapse", lambda e: e.collapsed)):
        table.add_row(row, *(f"{take(e).count:,}/{take(e).total:,}" for e in ensembles.values()))
    return table


def _ensembles(prediction: CovariancePrediction) -> dict[str, Ensemble]:
    found = {"SDE": prediction.theory}
    return found if prediction.measured is None else {**found, "networks": prediction.measured}


def report_page(prediction: CovariancePrediction, config: CovarianceConfig, facts: dict[str, str]) -> Page:
    """Compose the report of a prediction."""
    through, end = _through(prediction), _end(prediction)
    sections = [
        Section("Through depth", "Paths that have blown up are left out from then on, and counted.", through),
        Section("At the end", "", end),
    ]
    if prediction.region is not None:
        sections.append(_stability(prediction.region, config))
    sections.append(Section("Numbers", "", _tables(prediction)))
    return Page(
        title=f"Before training: shaped transformer, depth {config.depth}, width {config.width}",
        lead=" ".join(sentences(prediction, config)),
        facts=facts,
        sections=[section for section in sections if section.blocks],
    )


def _names(prediction: CovariancePrediction) -> tuple[str, str]:
    theory, measured = prediction.theory, prediction.measured
    networks = measured.blown_up.total if measured else 0
    return f"SDE, {theory.blown_up.total:,} paths", f"{networks:,} networks"


def _band(ensemble: Ensemble, name: str) -> Band:
    return Band(ensemble.depths, list(zip(*(each.quantiles for each in ensemble.through[name]), strict=True)))


def _through(prediction: CovariancePrediction) -> list[Plot]:
    caption = (
        "{}. Shades: 5 to 95 % and 25 to 75 % of the SDE's paths, line: median. Bars and dots: the same of "
        "the networks."
    )
    words = {
        "Correlation through depth": (PAIR, "Correlation of one pair of tokens"),
        "Norm through depth": (NORM, "Natural logarithm of ⟨x, x⟩/n of one token"),
    }
    plots = []
    for title, (name, said) in words.items():
        measured = prediction.measured and _band(prediction.measured, name)
        figure = bands(
            _band(prediction.theory, name), measured, x="block", y=UNITS[name], names=_names(prediction)
        )
        plots.append(Plot(figure, caption.format(said), f"{title}, predicted and measured.", title))
    return plots


def _end(prediction: CovariancePrediction) -> list[Plot]:
    plots = []
    for title, name in (("Correlation at the end", PAIR), ("Norm at the end", NORM)):
        theory = prediction.theory.final[name]
        measured = prediction.measured.final[name] if prediction.measured else []
        if not theory and not measured:
            continue
        figure = histograms(theory, measured, x=UNITS[name], names=_names(prediction))
        caption = "Filled: the SDE. Outline: finite networks. One value a path and a network."
        if distance := prediction.distances.get(name):
            caption += (
                f" Kolmogorov–Smirnov distance {distance.value:.3f}; chance reaches {distance.noise:.3f} in "
                "5 % of cases."
            )
        plots.append(Plot(figure, caption, f"{title}: histograms of theory and networks.", title))
    return plots


def _stability(region: Region, config: CovarianceConfig) -> Section:
    gamma, tau = largest_gamma(region, config.tau0), smallest_tau(region, config.gamma)
    words = [
        f"At τ₀ {config.tau0:g} no γ looked at is stable"
        if gamma is None
        else f"At τ₀ {config.tau0:g} the largest γ looked at that is stable is {gamma:g}",
        f"at γ {config.gamma:g} no τ₀ is."
        if tau is None
        else f"at γ {config.gamma:g} the smallest τ₀ that is stable is {tau:g}.",
    ]
    rule = (
        f"Stable: fewer than {100 * RARE:g} % of the paths blow up, or collapse. Framed: what was asked for."
    )
    plots = []
    for title, rows, reading in (
        ("Stable region", region.blown_up, "paths that blow up"),
        ("Collapse", region.collapsed, "paths that collapse to rank one"),
    ):
        if title == "Collapse" and not any(map(any, rows)):
            continue
        figure = shares(
            rows, across=region.taus, upward=region.gammas, x="τ₀, temperature", y="γ, weight of a branch",
            reading=reading, chosen=(config.tau0, config.gamma),
        )  # fmt: skip
        caption = (
            f"Share of {region.paths} {reading} by depth/width {config.time:.3g}; standard error at "
            f"{100 * RARE:g} %: {percent((RARE * (1 - RARE) / region.paths) ** 0.5)}."
        )
        plots.append(Plot(figure, caption, f"{reading} by γ and τ₀, as a table of colours.", title))
    figure = shares(
        region.blown_up_by, across=region.times, upward=region.gammas, x="depth/width",
        y="γ, weight of a branch", reading="paths that blow up", chosen=(config.time, config.gamma),
    )  # fmt: skip
    caption = f"Share of {region.paths} paths that blow up by each depth/width, at τ₀ {config.tau0:g}."
    plots.insert(1, Plot(figure, caption, "Blow-up by γ and depth/width, as a table of colours.", "By depth"))
    return Section("Stability", f"{'; '.join(words)} {rule}", plots)


def _tables(prediction: CovariancePrediction) -> Sequence[Table]:
    ensembles, distances = _ensembles(prediction), prediction.distances
    columns = [Column("reading"), Column("of"), *map(Column, ROWS)]
    if distances:
        columns += [Column("KS distance"), Column("by chance", unit="95 %")]
    rows = []
    for name in prediction.theory.final:
        for words, ensemble in ensembles.items():
            row = [name, words, *_numbers(ensemble.through[name][-1])]
            if distances:
                last = distances.get(name) if words == "networks" else None
                row += [last.value, last.noise] if last else [None, None]
            rows.append(row)
    notes = (
        "One number a path and reading, which makes them independent. Mean correlation: over all pairs of "
        "a path. Log norm: ln ⟨x, x⟩/n. KS: Kolmogorov–Smirnov.",
    )
    fates, lost = [Column("of"), Column("paths or networks")], []
    for what in ("blown up", "collapsed"):
        fates += [Column(what), Column("share", unit="%"), Column("standard error", unit="%")]
    for words, ensemble in ensembles.items():
        row = [words, ensemble.blown_up.total]
        for share in (ensemble.blown_up, ensemble.collapsed):
            row += [share.count, 100 * share.fraction, 100 * share.error]
        lost.append(row)
    meaning = (
        f"Blown up: entries beyond {number(FAR)} times the largest at the start. Collapsed: correlations of "
        f"{COLLAPSED} or above in size, all of them. Of none seen among N: below 3/N (95 %).",
    )
    return (
        Table(columns, rows, title="At the end", notes=notes),
        Table(fates, lost, title="Lost on the way", notes=meaning),
    )


def write_report(
    prediction: CovariancePrediction, config: CovarianceConfig, *, overwrite: bool = False
) -> Path:
    """Write prediction.json, report.html and the figures into a folder; return the page's path.

    The folder is there whole or not at all.

    Raises: InputError when the folder is taken.
    """
    folder = config.folder
    check_free(folder, overwrite)
    settings = {name: str(value) for name, value in asdict(config).items() if value is not None}
    numbers = asdict(prediction)
    for ensemble in (numbers["theory"], numbers["measured"]):
        if ensemble is not None:
            del ensemble["final"]  # thousands of numbers, whose quantiles stand there
    page = report_page(prediction, config, _facts(config))
    write_folder(folder, {"settings": settings, **plain(numbers)}, page)
    return folder / "report.html"


def _facts(config: CovarianceConfig) -> dict[str, str]:
    attention = "causal" if config.causal else "bidirectional"
    start = f"all correlations {config.correlation:g}" if config.gram is None else str(config.gram)
    steps = config.steps or config.depth
    return {
        "network": f"shaped, {config.depth} blocks, width {config.width}, γ {config.gamma:g}, "
        f"τ₀ {config.tau0:g}, c₊ {config.positive:g}, c₋ {config.negative:g}, {attention}",
        "tokens": f"{config.tokens}, start: {start}" if config.gram is None else f"start: {start}",
        "theory": f"{config.paths:,} paths, {steps} steps, float64",
        "measured": f"{config.networks} networks, key width {config.key_width}"
        if config.networks
        else "nothing: theory alone",
        "software": ", ".join(f"{name} {versions()[name]}" for name in ("gramian", "torch")),
    }
